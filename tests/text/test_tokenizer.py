"""The tokenizer: every text comes back byte for byte, and training is repeatable."""

import pickle

import numpy as np
import pytest

from experiments.tokenizer import BEGIN, SPECIAL, Tokenizer, train
from tests.text.kernel_tree import files

TEXTS = list(files().values())
ANY = [
    b"",
    bytes(range(256)) * 3,
    np.random.default_rng(0).bytes(200_000),
    "é 漢字 ▁▁ ⁇ \u2028\ufeff".encode(),
    b"<s> <unk> </s> <0x0A>",
    b" \t\n\r\f\v\x00" * 50,
    b"no line feed " * 20_000,
    b"short lines\n" * 20_000,
]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train(TEXTS, 400)


def test_every_text_comes_back_byte_for_byte_and_its_tokens_say_how_long_it_is(model):
    tokenizer = Tokenizer(model)
    assert len(tokenizer.pieces) == 400
    for text, tokens in zip(TEXTS + ANY, tokenizer.encode_all(TEXTS + ANY, threads=2), strict=True):
        assert tokenizer.decode(tokens.tolist()) == text
        assert int(tokenizer.lengths[tokens].sum()) == len(text)
        assert tokens.dtype == np.int32
        assert len(text) == 0 or tokens.min() >= SPECIAL
        np.testing.assert_array_equal(tokens, tokenizer.encode(text))


def test_texts_like_those_of_the_training_take_fewer_tokens_than_bytes(model):
    tokenizer = Tokenizer(model)
    size, tokens = sum(map(len, TEXTS)), sum(map(len, tokenizer.encode_all(TEXTS)))
    assert tokens < size / 3
    assert b";\n\t" in tokenizer.pieces  # the end of a line with the indentation of the next


def test_special_tokens_and_tokens_that_there_are_not_stand_for_no_bytes(model):
    tokenizer = Tokenizer(model)
    assert tokenizer.decode([BEGIN, *tokenizer.encode(b"int x").tolist(), 0, 400, 9999]) == b"int x"
    np.testing.assert_array_equal(np.flatnonzero(tokenizer.lengths == 0), [0, BEGIN])


def test_training_again_on_the_same_texts_gives_the_same_bytes_and_on_others_not(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert train(TEXTS, 400) == model
    assert Tokenizer(train(TEXTS[1:], 400)).sha256 != Tokenizer(model).sha256
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts", [[], [b"a"], [b"int x;\n" * 3]])
def test_short_texts_give_a_smaller_vocabulary_that_still_has_every_byte(texts):
    tokenizer = Tokenizer(train(texts, 8192))
    assert 258 <= len(tokenizer.pieces) < 300
    assert tokenizer.decode(tokenizer.encode(bytes(range(256))).tolist()) == bytes(range(256))


def test_a_tokenizer_goes_to_another_process(model):
    there = pickle.loads(pickle.dumps(Tokenizer(model)))
    np.testing.assert_array_equal(there.encode(TEXTS[0]), Tokenizer(model).encode(TEXTS[0]))
