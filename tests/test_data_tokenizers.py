"""Tokenisers: any text comes back, and the bytes add up."""

import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, strategies as st

from rinsx import data


CORPUS = data.documents(["the cat sat on the mat, " * 5, "naïve café: größer than 日本語 🙂🙂", "<|end|> is text"] * 3)
BPE = data.BPE.train(CORPUS, 300)
TEXTS = st.text() | st.lists(st.sampled_from(["the ", "cat", "\r\n", "<|end|>", "é", "\0", "  ", "🙂"])).map("".join)


@pytest.mark.parametrize("tokenizer", [data.Bytes(), BPE], ids=repr)
@given(text=TEXTS)
def test_round_trip_and_bytes(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode())
    assert tokenizer.end not in ids and np.all((ids >= 0) & (ids < tokenizer.vocab_size))
    assert tokenizer.decode([*ids, tokenizer.end]) == text


def test_bytes_are_bytes():
    tokenizer = data.Bytes()
    assert (tokenizer.vocab_size, tokenizer.end) == (257, 256)
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.bytes_per_token.dtype == np.int32 and tokenizer.bytes_per_token.tolist() == [1] * 256 + [0]
    assert tokenizer.decode([0xC3]) == "\ufffd"
    for wrong in ([257], [-1], [0.5]):
        with pytest.raises(ValueError, match="from 0 to 256"):
            tokenizer.decode(wrong)


def test_bpe_learns_and_is_deterministic():
    assert BPE.vocab_size == 300 and BPE.end == 299
    assert len(BPE.encode("the cat sat")) < len("the cat sat")
    again = data.BPE.train(CORPUS, 300)
    assert again.fingerprint() == BPE.fingerprint() != data.BPE.train(CORPUS, 299).fingerprint()
    assert BPE.bytes_per_token.shape == (300,) and BPE.bytes_per_token[BPE.end] == 0
    assert data.BPE.train(CORPUS, 257).encode("abc").shape == (3,)


def test_bpe_is_saved_and_loaded(tmp_path):
    BPE.save(tmp_path / "t.json")
    loaded = data.BPE.load(tmp_path / "t.json")
    assert loaded.fingerprint() == BPE.fingerprint()
    assert loaded.encode("the cat").tolist() == BPE.encode("the cat").tolist()


def test_bpe_with_special_tokens():
    tokenizer = tokenizers.Tokenizer.from_str(BPE.tokenizer.to_str())
    tokenizer.add_special_tokens(["<|eot|>"])
    tokenizer.enable_truncation(2)
    named, plain = data.BPE(tokenizer, "<|eot|>"), data.BPE(tokenizer)
    assert (named.vocab_size, named.end) == (300, 299) and (plain.vocab_size, plain.end) == (301, 300)
    assert named.fingerprint() != plain.fingerprint()
    text = "a <|eot|> within text"
    for wrapped in (named, plain):
        assert wrapped.decode(wrapped.encode(text)) == text and 299 not in wrapped.encode(text)
    # What was given is left as it was.
    assert len(tokenizer.encode(text).ids) == 2


def test_an_end_that_text_is_encoded_to_is_refused():
    special = lambda token, special=True: tokenizers.AddedToken(token, special=special)
    for end, added in {
        "a": None,
        "at": None,
        "<x>": special("<x>", False),
        "c": special("c"),
        "Ġthe": special("Ġthe"),
    }.items():
        tokenizer = tokenizers.Tokenizer.from_str(BPE.tokenizer.to_str())
        assert end == "<x>" or tokenizer.token_to_id(end) is not None
        if added is not None:
            tokenizer.add_tokens([added])
        with pytest.raises(ValueError, match=f"`end` must be a special token, .*; got '{end}'"):
            data.BPE(tokenizer, end)


def test_a_vocabulary_that_lacks_a_byte_is_refused():
    def tokenizer(alphabet):
        found = tokenizers.Tokenizer(tokenizers.models.BPE())
        found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = tokenizers.decoders.ByteLevel()
        # Every byte that the constructor tries is there.
        tried = "".join(map(chr, range(0x250))) + " a  b\r\n\n 1234 it's \u2028 日本 🙂 e\u0301 "
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
        found.train_from_iterator([tried], trainer)
        return found

    with pytest.raises(ValueError, match="a token for each byte; it has none for .* the first of them 0x"):
        data.BPE(tokenizer([]))
    # UTF-8 has no byte 0xff.
    whole = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    wrapped = data.BPE(tokenizer([letter for letter in whole if letter != "ÿ"]))
    assert wrapped.decode(wrapped.encode("中文 ασφ привет")) == "中文 ασφ привет"


def test_what_is_not_byte_level_is_refused(tmp_path):
    with pytest.raises(ValueError, match="byte-level"):
        data.BPE(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")))
    for change, message in {
        "lower": (lambda t: setattr(t, "normalizer", tokenizers.normalizers.Lowercase()), "normalizer"),
        "prefix": (lambda t: setattr(t, "pre_tokenizer", tokenizers.pre_tokenizers.ByteLevel(True)), "prefix space"),
        "white": (lambda t: setattr(t, "pre_tokenizer", tokenizers.pre_tokenizers.Whitespace()), "byte-level"),
        "strip": (lambda t: t.add_tokens([tokenizers.AddedToken("<x>", lstrip=True)]), "white space"),
    }.values():
        tokenizer = tokenizers.Tokenizer.from_str(BPE.tokenizer.to_str())
        change(tokenizer)
        with pytest.raises(ValueError, match=message):
            data.BPE(tokenizer)
    with pytest.raises(ValueError, match="'<none>'"):
        data.BPE(BPE.tokenizer, "<none>")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json does not hold a tokeniser"):
        data.BPE.load(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError):
        data.BPE.load(tmp_path / "none.json")


def test_vocabularies_that_cannot_be():
    with pytest.raises(ValueError, match="at least 257.*got 100"):
        data.BPE.train(CORPUS, 100)
    with pytest.raises(ValueError, match="too small for vocab_size=5000"):
        data.BPE.train(CORPUS, 5000)


@pytest.mark.parametrize(
    "library, use, extra",
    [
        ("tokenizers", lambda path: data.BPE.train(CORPUS, 300), r"rinsx\[text\]"),
        ("zstandard", lambda path: list(data.jsonl(path).documents()), r"rinsx\[text\]"),
        ("pyarrow", lambda path: list(data.parquet(path).documents()), r"rinsx\[text\]"),
        ("datasets", lambda path: data.huggingface("name"), r"rinsx\[hub\]"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(library, use, extra, monkeypatch, tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=f"`{library}`.*{extra}"):
        use(path)
