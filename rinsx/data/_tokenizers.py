"""Tokenisers: text to integers and back, with the bytes that each token stands for."""

import abc
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, final

import numpy as np
from jaxtyping import Int32

from ._sources import AbstractSource


# The bytes that each token of `Bytes` stands for.
_BYTES = [*(bytes([i]) for i in range(256)), b""]


class AbstractTokenizer(abc.ABC):
    """Turns text into integers below `vocab_size`, and back.

    A tokeniser of your own is a subclass. `encode` must lose nothing: the bytes of the tokens of a text are its UTF-8 bytes.

    **Attributes:**

    - `vocab_size`: how many tokens there are, `end` included.
    - `end`: the token between documents. No text is encoded to it.
    - `bytes_per_token`: int32 `[vocab_size]`, how many UTF-8 bytes of text each token stands for; 0 for `end`. The sum
        over the tokens of a text is its length in bytes, from which bits per byte are computed.
    """

    vocab_size: int
    end: int
    bytes_per_token: Int32[np.ndarray, " vocab"]

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The tokens of a text, without `end`: an integer array `[n]`."""

    @abc.abstractmethod
    def decode(self, ids: Any) -> str:
        """The text of tokens. `end` gives nothing; bytes that are no UTF-8, as at a cut, give the replacement
        character."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A hash. Tokenisers with the same hash encode every text alike."""


@final
class Bytes(AbstractTokenizer):
    """UTF-8 bytes as tokens: 0 to 255, and 256 for the end of a document.

    !!! example

        ```python
        import rinsx as rx

        tokenizer = rx.data.Bytes()
        ids = tokenizer.encode("naïve")  # array([110, 97, 195, 175, 118, 101])
        tokenizer.decode(ids)  # "naïve"
        ```
    """

    def __init__(self):
        self.vocab_size = 257
        self.end = 256
        self.bytes_per_token = _lengths(_BYTES)

    def __repr__(self) -> str:
        return "Bytes()"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode(self, ids: Any) -> str:
        return _decode(ids, _BYTES)

    def fingerprint(self) -> str:
        return hashlib.sha256(b"bytes").hexdigest()


@final
class BPE(AbstractTokenizer):
    """Byte-level byte-pair encoding, by the `tokenizers` library (`pip install 'rinsx[text]'`).

    Any text can be encoded, and comes back as it was. The text of a special token, such as `<|endoftext|>` within a document,
    is text like any other. `.tokenizer` is the `tokenizers.Tokenizer`.

    !!! example

        ```python
        import rinsx as rx

        source = rx.data.documents(["low lower lowest", "new newer newest"])
        tokenizer = rx.data.BPE.train(source, vocab_size=262)
        tokenizer.decode(tokenizer.encode("lower"))  # "lower"
        ```
    """

    def __init__(self, tokenizer: Any, end: str | None = None):
        """**Arguments:**

        - `tokenizer`: a byte-level `tokenizers.Tokenizer`.
        - `end`: which of its special tokens ends a document, such as `"<|endoftext|>"`. Where it is left out, that is one new
            token, after all that the tokeniser has.

        **Raises:**

        `ValueError` if the tokeniser is not byte-level, lacks a byte, or changes the text before it is split; and if `end` is a token
        that text is encoded to.
        """
        _tokenizers()
        tokenizer = type(tokenizer).from_str(tokenizer.to_str())
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        if end is not None and end not in vocab:
            raise ValueError(f"`end` must be one of the tokeniser's tokens; got {end!r}, which it does not have")
        if end is not None:
            _check_end(tokenizer, end)
        self.tokenizer = tokenizer
        self.end = max(vocab.values(), default=-1) + 1 if end is None else vocab[end]
        self._named = end
        self._table = _table(tokenizer, vocab)
        self._table[self.end :] = [b"", *self._table[self.end + 1 :]]
        self.vocab_size = len(self._table)
        self.bytes_per_token = _lengths(self._table)

    def __repr__(self) -> str:
        return f"BPE(vocab_size={self.vocab_size})"

    @classmethod
    def train(cls, source: AbstractSource, vocab_size: int) -> "BPE":
        """Learns merges from a corpus. The same corpus gives the same tokeniser.

        **Arguments:**

        - `source`: the corpus. That of a source of images is [`rinsx.data.captions_of`][].
        - `vocab_size`: how many tokens there are to be, at least 257: the bytes, the merges, and `end`.

        **Returns:**

        A `BPE`.

        **Raises:**

        `ValueError` if the corpus is too small for so many; `TypeError` if it is no source of texts.
        """
        library = _tokenizers()
        if not isinstance(source, AbstractSource):
            raise TypeError(
                f"`source` must be a source of texts; got {source!r}. Of images it is rx.data.captions_of(source)."
            )
        if vocab_size < 257:
            raise ValueError(f"`vocab_size` must be at least 257: the 256 bytes, and `end`; got {vocab_size}")
        byte_level = library.pre_tokenizers.ByteLevel
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=sorted(byte_level.alphabet()), show_progress=False
        )
        tokenizer.train_from_iterator(_checked(source), trainer)
        if tokenizer.get_vocab_size() != vocab_size - 1:
            raise ValueError(
                f"{source!r} is too small for vocab_size={vocab_size}: its text gives {tokenizer.get_vocab_size() + 1} "
                "tokens and then has no pair left to merge"
            )
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | os.PathLike, end: str | None = None) -> "BPE":
        """Reads a `tokenizer.json`, as `save` writes it, or as published with a byte-level model such as GPT-2.

        **Arguments:**

        - `path`: the file.
        - `end`: which token ends a document, as for the class.

        **Returns:**

        A `BPE`.

        **Raises:**

        `FileNotFoundError` if it is missing, and `ValueError` if it holds no tokeniser, or none that is byte-level.
        """
        text = pathlib.Path(path).read_text("utf-8")
        try:
            tokenizer = _tokenizers().Tokenizer.from_str(text)
        except Exception as error:  # the library raises a plain `Exception`
            raise ValueError(f"{path} does not hold a tokeniser: {error}") from None
        return cls(tokenizer, end)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a `tokenizer.json`.

        **Arguments:**

        - `path`: the file. Another one of this name is replaced.
        """
        pathlib.Path(path).write_text(self.tokenizer.to_str(), "utf-8")

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Any) -> str:
        return _decode(ids, self._table)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._named!r} {self.tokenizer.to_str()}".encode()).hexdigest()


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("rx.data.BPE needs the `tokenizers` library: pip install 'rinsx[text]'") from error
    return tokenizers


def _checked(source: AbstractSource) -> Iterator[str]:
    """The documents; one that has no UTF-8 is an error with its place."""
    for index, text in enumerate(source.documents()):
        utf8(text, source, index)
        yield text


def utf8(text: str, source: AbstractSource, index: int) -> int:
    """The length of a document in UTF-8 bytes. Half of a surrogate pair, which JSON can hold, has none."""
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{source.place(index)}: character {error.start} ({text[error.start]!r}) is half of a surrogate pair, which has "
            "no UTF-8 bytes"
        ) from None


def _decode(ids: Any, table: list[bytes]) -> str:
    ids = np.asarray(ids)
    if ids.size and not (ids.dtype.kind in "iu" and 0 <= ids.min() and ids.max() < len(table)):
        raise ValueError(
            f"tokens must be integers from 0 to {len(table) - 1}; got {ids.dtype} {ids.min()} to {ids.max()}"
        )
    return b"".join(table[i] for i in ids.reshape(-1).tolist()).decode("utf-8", "replace")


def _lengths(table: list[bytes]) -> Int32[np.ndarray, " vocab"]:
    lengths = np.array([len(token) for token in table], np.int32)
    lengths.flags.writeable = False
    return lengths


def _table(tokenizer: Any, vocab: dict[str, int]) -> list[bytes]:
    """The bytes of each token, for a tokeniser that is byte-level and loses nothing."""
    spec = json.loads(tokenizer.to_str())
    if spec["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(spec["pre_tokenizer"]):
        raise ValueError(
            f"the tokeniser must be byte-level BPE; got the model {spec['model']['type']} with the pre-tokeniser "
            f"{spec['pre_tokenizer']}"
        )
    if spec["normalizer"] is not None:
        raise ValueError(
            f"the tokeniser changes the text before it is split: {spec['normalizer']}. Remove its normalizer."
        )
    for token in spec["added_tokens"]:
        if token["lstrip"] or token["rstrip"]:
            raise ValueError(
                f"the token {token['content']!r} swallows the white space beside it; set lstrip and rstrip to false"
            )
    letters = _letters()
    # Bytes that UTF-8 has. Without one of them, text that has it would be dropped.
    spelled = {letter for letter, byte in letters.items() if byte < 0xF5 and byte not in (0xC0, 0xC1)}
    if missing := sorted(letters[letter] for letter in spelled - spec["model"]["vocab"].keys()):
        raise ValueError(
            f"the tokeniser must have a token for each byte; it has none for {len(missing)}, the first of them {missing[0]:#04x}. "
            "Train it with initial_alphabet=ByteLevel.alphabet()."
        )
    added = {token["id"]: token["content"] for token in spec["added_tokens"]}
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, i in vocab.items():
        if i not in added and not letters.keys() >= set(token):
            raise ValueError(
                f"the tokeniser must be byte-level; its token {i} is {token!r}, which does not spell bytes"
            )
        table[i] = added[i].encode() if i in added else bytes(letters[letter] for letter in token)
    probe = "".join(map(chr, range(0x250))) + " a  b\r\n\n 1234 it's \u2028 日本 🙂 e\u0301 "
    ids = tokenizer.encode(probe, add_special_tokens=False).ids
    if b"".join(table[i] for i in ids) != probe.encode():
        raise ValueError("the tokeniser does not give the text back; it must be byte-level, without a prefix space")
    return table


def _check_end(tokenizer: Any, end: str) -> None:
    """Refuses an end of documents that stands for text: what is encoded to it would be lost."""
    spec = json.loads(tokenizer.to_str())
    special = {token["content"] for token in spec["added_tokens"] if token["special"]}
    # Merges are pairs; older files have both in one text.
    merged = {"".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in spec["model"]["merges"]}
    met = tokenizer.token_to_id(end) in tokenizer.encode(end, add_special_tokens=False).ids
    if end not in special or end in merged or end in _letters() or met:
        shown = f"its special tokens are {sorted(special)}" if special else "it has no special token"
        raise ValueError(
            f"`end` must be a special token, which no text is encoded to; got {end!r}, which text is encoded to, and {shown}. Leave "
            "`end` out for a new one."
        )


def _letters() -> dict[str, int]:
    """The letter that stands for each byte in the vocabulary of a byte-level tokeniser: GPT-2's convention."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(others)}
