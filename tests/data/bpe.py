"""Small tokenizers: byte-level BPE with the special tokens of a chat, trained on the spot; letters with byte fallback."""

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


def write_byte_fallback(folder: Path) -> Path:
    """Writes one as Llama 2 has: letters, a space before every text, and bytes for all other characters."""
    tokens = ['<unk>', '<end>', *(f'<0x{byte:02X}>' for byte in range(256)), *'\u2581abcdefghijklmnopqrstuvwxyz<>/']
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True, unk_token='<unk>'))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')])
    steps = [decoders.Replace('\u2581', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(['<end>'])
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<end>'}))
    return folder
