"""Tokens: cached tokens are those of the source, or are made anew; a split is a partition."""

import logging
import multiprocessing
import os
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, strategies as st

from rinsx import data


TEXTS = ["one document", "", "another, längeres", "x" * 3000]
TOKENIZER = data.Bytes()
CORPORA = st.lists(st.text(max_size=40), min_size=1, max_size=12).filter(any)


def reference(texts):
    return [[*text.encode(), 256] for text in texts]


def contents(tokens):
    return [tokens[i].tolist() for i in range(len(tokens))]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "text").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{i}.txt").write_text(text, "utf-8")
    return data.text(tmp_path / "text")


@given(texts=CORPORA)
def test_tokens_of_a_corpus(texts):
    tokens = data.tokenize(data.documents(texts), TOKENIZER)
    assert contents(tokens) == reference(texts)
    assert tokens.tokens.dtype == np.uint16 and tokens.offsets.dtype == np.int64
    assert tokens.offsets.tolist() == np.cumsum([0, *map(len, reference(texts))]).tolist()
    assert tokens.number_of_bytes == sum(len(text.encode()) for text in texts)
    assert tokens.number_of_tokens == tokens.number_of_bytes + len(texts)


def test_the_file_holds_what_memory_does(corpus, tmp_path):
    memory, written = data.tokenize(corpus, TOKENIZER), data.tokenize(corpus, TOKENIZER, tmp_path / "new" / "cache")
    assert contents(memory) == contents(written) == reference(TEXTS)
    assert isinstance(written.tokens, np.memmap) and not written.tokens.flags.writeable
    assert [path.suffix for path in (tmp_path / "new" / "cache").iterdir()] == [".tokens"]


class Counting(data.AbstractSource):
    """Counts how often the documents are read."""

    def __init__(self, texts):
        self.texts, self.read = texts, 0

    def documents(self):
        self.read += 1
        return iter(self.texts)

    def fingerprint(self):
        return data.documents(self.texts).fingerprint()

    def place(self, index):
        return f"document {index}"


def test_a_corpus_is_tokenised_once(tmp_path):
    source = Counting(TEXTS)
    for _ in range(3):
        assert contents(data.tokenize(source, TOKENIZER, tmp_path)) == reference(TEXTS)
    assert source.read == 1
    source.texts = [*TEXTS, "more"]
    assert contents(data.tokenize(source, TOKENIZER, tmp_path)) == reference(source.texts)
    assert source.read == 2


@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_one_wrong_byte_or_a_cut_is_noticed(where, flip, cut):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        source = Counting(TEXTS)
        data.tokenize(source, TOKENIZER, folder)
        (name,) = os.listdir(folder)
        path = os.path.join(folder, name)
        with open(path, "rb") as file:
            raw = bytearray(file.read())
        # Half of the places in the header, which is longer than these tokens.
        at = int(where * len(raw))
        raw[at] ^= flip
        with open(path, "wb") as file:
            file.write(raw[:at] if cut else raw)
        assert contents(data.tokenize(source, TOKENIZER, folder)) == reference(TEXTS)
        assert source.read == 2 and os.listdir(folder) == [name]
        assert contents(data.tokenize(source, TOKENIZER, folder)) == reference(TEXTS)
        assert source.read == 2


def test_why_a_file_is_not_used_is_logged(corpus, tmp_path, caplog):
    folder = tmp_path / "cache"
    caplog.set_level(logging.INFO, "rinsx.data")

    def again(reason, raw):
        caplog.clear()
        path.write_bytes(raw)
        assert contents(data.tokenize(corpus, TOKENIZER, folder)) == reference(TEXTS)
        assert reason in caplog.text and path.read_bytes() == good

    data.tokenize(corpus, TOKENIZER, folder)
    assert "tokenising" in caplog.text
    (path,) = folder.iterdir()
    good = path.read_bytes()
    again("no file of tokens", b"")
    again("no file of tokens", b"another program's file" * 1000)
    again("its header is damaged", good[:1000] + b"x" + good[1001:])
    again(f"it has {len(good) - 8} bytes, not {len(good)}", good[:-8])
    again(f"it has {len(good) + 8} bytes", good + b"\0" * 8)
    again("its checksum is wrong", good[:4100] + bytes([good[4100] ^ 1]) + good[4101:])
    # A whole and sound file of another corpus under this name.
    data.tokenize(data.documents(["other"]), TOKENIZER, tmp_path / "other")
    (other,) = (tmp_path / "other").iterdir()
    again("its source is", other.read_bytes())
    bpe = data.BPE.train(corpus, 258)
    data.tokenize(corpus, bpe, tmp_path / "bpe")
    (other,) = (tmp_path / "bpe").iterdir()
    again("its tokenizer is", other.read_bytes())


def test_changed_source_and_tokeniser(corpus, tmp_path):
    folder = tmp_path / "cache"
    old = data.tokenize(corpus, TOKENIZER, folder)
    (tmp_path / "text" / "1.txt").write_text("no longer empty")
    texts = [TEXTS[0], "no longer empty", *TEXTS[2:]]
    assert contents(data.tokenize(corpus, TOKENIZER, folder)) == reference(texts)
    bpe = data.BPE.train(corpus, 260)
    tokens = data.tokenize(corpus, bpe, folder)
    assert [bpe.decode(tokens[i]) for i in range(len(tokens))] == texts
    assert tokens.number_of_bytes == sum(len(text.encode()) for text in texts)
    # What is mapped stays as it was.
    assert contents(old) == reference(TEXTS)


def test_a_failure_leaves_no_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nbroken\n')
    with pytest.raises(ValueError, match="line 2"):
        data.tokenize(data.jsonl(path), TOKENIZER, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def _race(folder, barrier, queue):
    barrier.wait()
    queue.put(contents(data.tokenize(data.documents(TEXTS), TOKENIZER, folder)))


def test_processes_may_race(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_race, args=(tmp_path, barrier, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=120) for _ in workers] == [reference(TEXTS)] * 2
    for worker in workers:
        worker.join()
    assert [path.suffix for path in tmp_path.iterdir()] == [".tokens"]


def test_empty_corpora(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "a.jsonl").write_text("")
    for source in (data.text(tmp_path / "a.txt"), data.jsonl(tmp_path / "a.jsonl"), data.documents(["", ""])):
        for folder in (None, tmp_path / "cache"):
            with pytest.raises(ValueError, match=r"the corpus is empty: .*(a\.txt|a\.jsonl|2 texts)"):
                data.tokenize(source, TOKENIZER, folder)


class Shifted(data.AbstractTokenizer):
    """A tokeniser by a user, with a token too many."""

    vocab_size, end, bytes_per_token = 200, 199, np.ones(200, np.int32)

    def encode(self, text):
        return np.array([ord(letter) + 100 for letter in text])

    def decode(self, ids):
        return "".join(chr(i - 100) for i in ids)

    def fingerprint(self):
        return "shifted"


def test_a_token_beyond_the_vocabulary_names_the_place(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "!!"}\n{"text": "!!c"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: token 2 of the document is 299, beyond.*200 tokens"):
        data.tokenize(data.jsonl(tmp_path / "a.jsonl"), _High())


class _High(Shifted):
    def encode(self, text):
        return np.array([ord(letter) + (200 if letter == "c" else 1) for letter in text])


@pytest.mark.parametrize("size, dtype", [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)])
def test_the_smallest_type(size, dtype):
    tokenizer = Shifted()
    tokenizer.vocab_size, tokenizer.end, tokenizer.bytes_per_token = size, size - 1, np.ones(size, np.int32)
    tokens = data.tokenize(data.documents(["!"]), tokenizer)
    assert tokens.tokens.dtype == dtype and tokens[0].tolist() == [133, size - 1]


def test_tokens_of_arrays():
    tokens = data.Tokens.of([np.array([1, 2]), [3]], TOKENIZER)
    assert contents(tokens) == [[1, 2], [3]] and contents(tokens.subset([1])) == [[3]]
    for wrong in ([], [[]], [[0.5]], [[[1]]]):
        with pytest.raises(ValueError, match="must be|empty"):
            data.Tokens.of(wrong, TOKENIZER)


def places(tokens):
    """Every place in the array that a span has, with the document's number."""
    return Counter(
        (int(document), place)
        for document, (start, stop) in zip(tokens.documents, tokens.spans.tolist())
        for place in range(start, stop)
    )


@given(texts=CORPORA, seed=st.integers(0, 2**40), by=st.sampled_from(["document", 1, 2, 7]), again=st.booleans())
def test_a_split_is_a_partition(texts, seed, by, again):
    tokens = data.tokenize(data.documents([*texts, "a", "b"]), TOKENIZER)
    parts = data.split(tokens, "1/2", by=by, seed=seed)
    same = data.split(tokens, "1/2", by=by, seed=seed)
    assert [part.spans.tolist() for part in parts] == [part.spans.tolist() for part in same]
    assert all(part.tokens is tokens.tokens for part in parts)
    assert places(parts[0]) + places(parts[1]) == places(tokens)
    assert parts[0].number_of_bytes + parts[1].number_of_bytes == tokens.number_of_bytes
    if by == "document":
        assert not set(parts[0].documents) & set(parts[1].documents)
        assert len(parts[1]) == max(1, round(Fraction(len(tokens), 2)))
    elif again and len(set(parts[0].documents)) > 1:
        # Documents that are in pieces already stay together.
        train, held_out = data.split(parts[0], "1/2", seed=seed)
        assert places(train) + places(held_out) == places(parts[0])
        assert not set(train.documents) & set(held_out.documents)


@given(seed=st.integers(0, 1000))
def test_chunks_held_out_of_every_document(seed):
    tokens = data.tokenize(data.documents(["x" * 9_999, "y" * 4_999, "z" * 99]), TOKENIZER)
    train, held_out = data.split(tokens, "1/100", by=10, seed=seed)
    taken = Counter()
    for document, (start, stop) in zip(held_out.documents.tolist(), held_out.spans.tolist()):
        assert (start - tokens.spans[document, 0]) % 10 == 0 and (stop - start) % 10 == 0
        taken[document] += (stop - start) // 10
    assert (taken[0], taken[1]) == (10, 5) and taken[2] <= 1
    # No piece could be joined to the next one of its document.
    for part in (train, held_out):
        joins = (part.spans[1:, 0] == part.spans[:-1, 1]) & (part.documents[1:] == part.documents[:-1])
        assert not joins.any()
    # The other documents have no say.
    longer = data.tokenize(data.documents(["x" * 9_999, "w" * 77_000, "z" * 99]), TOKENIZER)
    other = data.split(longer, "1/100", by=10, seed=seed)[1]
    first = lambda part: part.spans[part.documents == 0].tolist()
    assert first(other) == first(held_out)


def test_shares_that_are_no_integers_are_right_on_average():
    tokens = data.tokenize(data.documents(["x" * 9] * 4000), TOKENIZER)
    held_out = data.split(tokens, 0.1, by=5)[1]
    # 8000 chunks, 1/5 chunk of each document of two: binomial, with a deviation of 25 about 800.
    assert abs(held_out.number_of_tokens / 5 - 800) < 150
    assert max(Counter(held_out.documents.tolist()).values()) == 1


def test_seeds_differ():
    tokens = data.tokenize(data.documents([str(i) for i in range(100)]), TOKENIZER)
    held_out = {tuple(data.split(tokens, "1/10", seed=seed)[1].documents.tolist()) for seed in range(20)}
    assert len(held_out) == 20


def test_splits_that_cannot_be():
    one = data.tokenize(data.documents(["a"]), TOKENIZER)
    many = data.tokenize(data.documents(["a"] * 5), TOKENIZER)
    for message, arguments in {
        "1 document": lambda: data.split(one),
        "nothing is held out": lambda: data.split(one, "1/1000000", by=1),
        "nothing is left": lambda: data.split(one, "999999/1000000", by=10),
        "above 0 and below 1; got 0": lambda: data.split(many, 0),
        "got '3/2'": lambda: data.split(many, "3/2"),
        "must be a number.*'half'": lambda: data.split(many, "half"),
        "`by` must be.*got 0": lambda: data.split(many, by=0),
        "`seed`.*got -1": lambda: data.split(many, seed=-1),
    }.items():
        with pytest.raises(ValueError, match=message):
            arguments()
