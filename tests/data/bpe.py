"""A small byte-level BPE tokenizer with the special tokens of a chat, trained on the spot."""

import json
from pathlib import Path

import tokenizers


def write_tokenizer(folder: Path, specials: tuple[str, ...] = ('<end>',), **config) -> Path:
    """Writes tokenizer.json and tokenizer_config.json to a folder."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(['def function(argument): return argument * 2 # größe'] * 50, trainer)
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<end>', **config}))
    return folder
