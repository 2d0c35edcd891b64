"""Tokenizers round-trip text and account for its bytes."""

import itertools
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from elastic_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from elastic_jax.errors import UserError
from elastic_jax.infer.text import Reader, encode_within, text_after
from tests.data.bpe import write_byte_fallback, write_tokenizer


@pytest.fixture(scope='module')
def bpe_folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp('bpe'))


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert tokenizer.byte_lengths()[tokenizer.eos_id] == 0


@pytest.mark.parametrize('text', ['def f(x): return x', 'größe → 日本語 🙂', '  indented\n\ttabs'])
def test_a_hugging_face_tokenizer_round_trips_and_its_tokens_bytes_add_up(bpe_folder, text):
    tokenizer = load_tokenizer(str(bpe_folder))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.encode(text.encode()).tolist() == ids.tolist()
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert len(ids) < len(text.encode()) or 'def' not in text
    assert tokenizer.byte_lengths()[tokenizer.eos_id] == 0 and tokenizer.vocab_size == len(tokenizer.byte_lengths())
    assert load_tokenizer(tokenizer.spec).eos_id == tokenizer.eos_id
    assert ids.dtype == np.int32


def test_added_tokens_stand_for_their_own_text_in_byte_level_bpe(tmp_path):
    path = write_tokenizer(tmp_path) / 'tokenizer.json'
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.add_tokens([tokenizers.AddedToken('<｜tool▁sep｜>', special=False)])
    tokenizer.save(str(path))
    text = 'def <｜tool▁sep｜> größe'
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.byte_lengths()[loaded.encode(text)].sum() == len(text.encode())


def test_a_growing_text_of_byte_tokens_keeps_what_it_has_shown(tmp_path):
    """Characters without tokens of their own, one after another: each is shown once it is complete, whatever follows."""
    tokenizer = load_tokenizer(str(write_byte_fallback(tmp_path)))
    text = 'ab …日 🙂🙂c'
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.decode(ids) == tokenizer.tokenizer.decode(ids) == text
    reader = Reader(tokenizer, (), 100)
    shown = [reader.read([token]).text for token in ids]
    assert all(after.startswith(before) for before, after in itertools.pairwise(shown)) and shown[-1] == text
    assert Reader(tokenizer, (), 9).read(ids[:9]).text == 'ab …\ufffd'  # ended within a character
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
    assert tokenizer.decode([*ids, tokenizer.eos_id], special=True) == text + '<end>'


@pytest.mark.parametrize('text', ['hello world', 'ab …日 🙂🙂c', ' two  spaces'])
def test_what_goes_on_a_prompt_keeps_its_spaces_and_characters_wherever_the_prompt_ends(tmp_path, bpe_folder, text):
    for tokenizer in (load_tokenizer(str(write_byte_fallback(tmp_path))), load_tokenizer(str(bpe_folder)), ByteTokenizer()):
        ids = tokenizer.encode(text).tolist()
        for place in range(1, len(ids)):
            reader = Reader(tokenizer, (), 100, ids[:place])
            shown = [reader.read([token]).text for token in ids[place:]]
            assert all(after.startswith(before) for before, after in itertools.pairwise(shown))
            assert tokenizer.decode(ids[:place]).rstrip('\ufffd') + shown[-1] == text
            assert text_after(ids[:place], ids[place:], tokenizer) == shown[-1]
        for string in ('</think>', '\n', ' ', 'a'):
            assert tokenizer.decode([*ids, *encode_within(string, tokenizer)]) == text + string


@pytest.mark.parametrize('size', [1, 2, 3, 7])
def test_of_several_stop_strings_the_one_that_is_complete_first_ends_a_text_however_pieces_fall(size):
    reader, ids = Reader(ByteTokenizer(), ('abcd', 'bc'), 20), list(b'xabcdzz')
    done = [reader.read(ids[start : start + size]) for start in range(0, 7, size)][-1]
    assert (done.text, done.tokens, done.finish) == ('xa', list(b'xabc'), 'stop')


class Counting(ByteTokenizer):
    """Counts the tokens that it decodes."""

    decoded = 0

    def decode(self, ids, special=False):
        ids = list(ids)
        self.decoded += len(ids)
        return super().decode(ids, special)


def test_a_long_text_and_long_stop_strings_are_read_in_the_time_of_their_length():
    tokenizer = Counting()
    reader = Reader(tokenizer, ('a' * 10**6,), 10**6)
    for _ in range(200):
        done = reader.read([97] * 8)
    assert (done.text, len(done.tokens)) == ('', 1600) and tokenizer.decoded < 10 * 1600
    assert reader.read([98]).text == 'a' * 1600 + 'b'


def test_all_tokens_that_a_model_names_as_ends_end_what_it_writes(tmp_path):
    folder = write_tokenizer(tmp_path, ('<end>', '<turn>', '<tool>'))
    assert load_tokenizer(str(folder)).stop_ids == (0,)
    for named, expected in ((1, (0, 1)), ([2, 0], (0, 2)), (None, (0,))):
        (folder / 'generation_config.json').write_text(json.dumps({'eos_token_id': named}))
        tokenizer = load_tokenizer(str(folder))
        assert tokenizer.stop_ids == expected and tokenizer.eos_id == 0
    assert load_tokenizer(str(folder), also_stop=[2, 0]).stop_ids == (0, 2)
    assert ByteTokenizer().stop_ids == (ByteTokenizer.eos_id,)


def test_what_is_no_tokenizer_is_said(tmp_path, bpe_folder):
    with pytest.raises(UserError, match=r'has no tokenizer\.json'):
        load_tokenizer(str(tmp_path))
    (tmp_path / 'tokenizer.json').write_text('{}')
    with pytest.raises(UserError, match='cannot be read as a tokenizer'):
        load_tokenizer(str(tmp_path))
    (tmp_path / 'tokenizer.json').write_text((bpe_folder / 'tokenizer.json').read_text())
    with pytest.raises(UserError, match='names no end-of-text token'):
        load_tokenizer(str(tmp_path))


def test_ids_may_have_gaps(tmp_path):
    """A vocabulary is as large as its last id asks for: counts would be wrapped, cut off or looked up past the end."""
    words = tokenizers.models.WordLevel({'a': 0, 'bcd': 70_000, '<end>': 70_001}, unk_token='a')
    whole = tokenizers.Tokenizer(words)
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    whole.add_special_tokens(['<end>'])
    whole.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<end>'}))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer.encode('bcd a')
    assert ids.tolist() == [70_000, 0] and tokenizer.vocab_size == 70_002
    assert tokenizer.byte_lengths()[[*ids, tokenizer.eos_id]].tolist() == [3, 1, 0]
