"""Sources: every kind gives its documents in order, and names the file and place of what is wrong."""

import ast
import bz2
import gzip
import hashlib
import io
import json
import lzma
import sysconfig
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, strategies as st

from rinsx import data


PACK = {"": lambda raw: raw, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
TEXTS = ["first\r\nline two\n", "zweites Dokument: größer", "", "三つ目 🙂"]


def lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def write(path, raw):
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return path


@pytest.fixture(scope="module")
def stdlib():
    return data.stdlib()


def test_stdlib_is_real_text_without_tests(stdlib):
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in stdlib.paths]
    assert {"argparse.py", "json/decoder.py", "asyncio/base_events.py"} <= set(names)
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not any(name.startswith("_sysconfigdata") for name in names)
    assert [Path(name).parts for name in names] == sorted(Path(name).parts for name in names)
    texts = list(stdlib.documents())
    assert len(texts) == len(names) > 300 and sum(map(len, texts)) > 5_000_000
    assert texts[names.index("argparse.py")].encode() == (root / "argparse.py").read_bytes()
    assert stdlib.place(0) == str(stdlib.paths[0])
    ast.parse(texts[names.index("json/decoder.py")])


def test_stdlib_skips_by_rule_and_counts(tmp_path, monkeypatch):
    write(tmp_path / "good.py", "x = 1\n")
    write(tmp_path / "empty.py", "")
    write(tmp_path / "latin.py", b"# caf\xe9\n")
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "a.py", "y = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    source = data.stdlib()
    assert list(source.documents()) == ["x = 1\n"]
    reasons = {path.name: reason for path, reason in source.skipped}
    assert reasons.keys() == {"empty.py", "latin.py"} and "utf-8" in reasons["latin.py"]
    (tmp_path / "good.py").unlink()
    with pytest.raises(FileNotFoundError, match="no readable"):
        data.stdlib()


def test_text_keeps_the_text(tmp_path):
    paths = [write(tmp_path / f"{i}.txt", text) for i, text in enumerate(TEXTS)]
    source = data.text(*paths)
    assert list(source.documents()) == TEXTS == list(source.documents())
    assert source.place(1) == str(paths[1])
    assert list(data.text(write(tmp_path / "l1", b"caf\xe9"), encoding="latin-1").documents()) == ["café"]


def test_folders_and_patterns_are_sorted(tmp_path):
    (tmp_path / "b" / ".git").mkdir(parents=True)
    for name in ("b/2.txt", "b/10.txt", "a.txt", "c.md", ".hidden", "b/.git/x"):
        write(tmp_path / name, name)
    assert list(data.text(tmp_path).documents()) == ["a.txt", "b/10.txt", "b/2.txt", "c.md"]
    assert list(data.text(str(tmp_path / "**" / "*.txt")).documents()) == ["a.txt", "b/10.txt", "b/2.txt"]
    assert list(data.text(tmp_path / "c.md", tmp_path / "b").documents()) == ["c.md", "b/10.txt", "b/2.txt"]


@pytest.mark.parametrize("make", [data.text, data.jsonl, data.parquet])
def test_missing_files(make, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        make(tmp_path / "*.nothing")
    with pytest.raises(FileNotFoundError, match="has no files"):
        make(tmp_path)
    with pytest.raises(ValueError, match="empty"):
        make()
    path = write(tmp_path / "twice", "x")
    with pytest.raises(ValueError, match="twice"):
        make(path, path)


def test_wrong_encoding_names_file_and_byte(tmp_path):
    path = write(tmp_path / "latin.txt", b"x" * 1000 + b"caf\xe9 noir")
    with pytest.raises(ValueError, match=r"latin\.txt.*utf-8.*byte 1003 \(e9\)"):
        list(data.text(path).documents())
    with pytest.raises(ValueError, match="utf-99"):
        data.text(path, encoding="utf-99")
    path = write(tmp_path / "cut.txt", "größer"[:3].encode()[:-1])
    with pytest.raises(ValueError, match="byte 2"):
        list(data.text(path).documents())


def test_documents():
    assert list(data.documents(TEXTS).documents()) == TEXTS
    with pytest.raises(ValueError, match="empty"):
        data.documents([])
    with pytest.raises(TypeError):
        data.documents(["a", b"b"])
    with pytest.raises(TypeError, match="one text"):
        data.documents("a text")


@pytest.mark.parametrize("suffix", PACK)
def test_jsonl(suffix, tmp_path):
    path = write(tmp_path / f"a.jsonl{suffix}", PACK[suffix](lines(TEXTS)))
    last = write(tmp_path / f"b.ndjson{suffix}", PACK[suffix](b'{"text": "no line end"}'))
    source = data.jsonl(tmp_path)
    assert list(source.documents()) == [*TEXTS, "no line end"]
    assert source.place(3) == f"{path}, line 4" and source.place(4) == f"{last}, line 1"


def test_zst_of_several_frames_and_of_blocks(tmp_path):
    texts = [f"{i} " * 5000 for i in range(100)]
    raw = lines(texts)
    frames = zstandard.compress(raw[:70_000]) + zstandard.compress(raw[70_000:])
    assert list(data.jsonl(write(tmp_path / "a.jsonl.zst", frames)).documents()) == texts
    stream = io.BytesIO()
    with zstandard.ZstdCompressor(write_checksum=True).stream_writer(stream, closefd=False) as writer:
        writer.write(raw)
    assert list(data.jsonl(write(tmp_path / "b.jsonl.zst", stream.getvalue())).documents()) == texts


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_damaged_archives(suffix, tmp_path):
    # Text that does not shrink to nothing, so that there is something to cut off.
    texts = [hashlib.sha256(bytes([i])).hexdigest() for i in range(200)]
    raw = PACK[suffix](lines(texts))
    for name, damaged in {"cut": raw[:-20], "half": raw[: len(raw) // 2], "other": bz2.compress(b"x")}.items():
        path = write(tmp_path / f"{name}.jsonl{suffix}", damaged)
        with pytest.raises(ValueError, match=rf"{name}\.jsonl.*unpacked after line \d+"):
            list(data.jsonl(path).documents())


@pytest.mark.parametrize(
    "before, line, error, message",
    [
        (70_000, '{"text": "cut', ValueError, "broken JSON"),
        (70_000, b'{"text": "caf\xe9"}', ValueError, "byte 13"),
        (2, '{"text": "a"} x', ValueError, "broken JSON"),
        (2, "", ValueError, "the line is empty"),
        (2, '["a"]', ValueError, "must be a JSON object"),
        (2, '{"body": "a", "id": 3}', ValueError, r"no field 'text'; the fields are \['body', 'id'\]"),
        (2, '{"text": 17}', TypeError, "int: 17"),
        (2, '{"text": null}', TypeError, "NoneType"),
        (2, "[" * 100_000, ValueError, "broken JSON"),
    ],
)
def test_a_broken_line_is_named_however_far_in(before, line, error, message, tmp_path):
    good = b'{"text": "a line"}\n'
    raw = good * before + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good
    path = write(tmp_path / "big.jsonl.gz", gzip.compress(raw, 1))
    with pytest.raises(error, match=rf"big\.jsonl\.gz, line {before + 1}: .*{message}") as found:
        data.tokenize(data.jsonl(path), data.Bytes())
    assert len(str(found.value)) < 1000


def test_half_a_surrogate_pair_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "good"}\n{"text": "bad \\ud800"}\n')
    for use in (lambda s: data.tokenize(s, data.Bytes()), lambda s: data.BPE.train(s, 257)):
        with pytest.raises(ValueError, match=r"a\.jsonl, line 2: character 4.*surrogate"):
            use(data.jsonl(path))


def test_parquet(tmp_path):
    texts = [f"document {i}" for i in range(1000)]
    table = pa.table({"n": range(1000), "body": texts})
    pq.write_table(table.slice(0, 300), tmp_path / "a.parquet", row_group_size=70)
    pq.write_table(table.slice(300), tmp_path / "b.parquet")
    source = data.parquet(tmp_path, column="body")
    assert list(source.documents()) == texts
    assert source.place(299) == f"{tmp_path / 'a.parquet'}, row 299"
    assert source.place(301) == f"{tmp_path / 'b.parquet'}, row 1"
    coded = pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()})
    pq.write_table(coded, tmp_path / "coded.parquet")
    assert list(data.parquet(tmp_path / "coded.parquet").documents()) == ["a", "b", "a"]


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2], "text": ["a", None]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet: there is no column 'body'; the columns are \['n', 'text'\]"):
        list(data.parquet(path, column="body").documents())
    with pytest.raises(TypeError, match=r"a\.parquet, row 1: .*NoneType"):
        list(data.parquet(path).documents())
    with pytest.raises(TypeError, match=r"a\.parquet, row 0: .*int: 1"):
        list(data.parquet(path, column="n").documents())
    for raw in (b"not parquet", path.read_bytes()[:-9]):
        with pytest.raises(ValueError, match=r"b\.parquet: cannot be read as parquet"):
            list(data.parquet(write(tmp_path / "b.parquet", raw)).documents())


def test_huggingface(tmp_path):
    texts = [f"document {i}" for i in range(600)]
    dataset = datasets.Dataset.from_dict({"text": texts, "n": list(range(600))})
    dataset.save_to_disk(tmp_path / "one")
    splits = datasets.DatasetDict({"train": dataset.select(range(500)), "test": dataset.select(range(500, 600))})
    splits.save_to_disk(tmp_path / "two")
    sources = [data.huggingface(dataset), data.huggingface(tmp_path / "one"), data.huggingface(str(tmp_path / "one"))]
    assert all(list(source.documents()) == texts for source in sources)
    assert len({source.fingerprint() for source in sources}) == 1
    assert list(data.huggingface(tmp_path / "two", "test").documents()) == texts[500:]
    assert list(data.huggingface(splits, "train").documents()) == texts[:500]
    assert data.huggingface(tmp_path / "two", "test").place(7).endswith("split test, row 7")


def test_huggingface_by_name(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(TEXTS))
    source = data.huggingface("json", "train", data_files=str(path), cache_dir=str(tmp_path / "cache"))
    assert list(source.documents()) == TEXTS


def test_bad_huggingface(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": ["a", None]})
    splits = datasets.DatasetDict({"train": dataset, "test": dataset})
    with pytest.raises(TypeError, match="row 1: .*NoneType"):
        list(data.huggingface(dataset).documents())
    with pytest.raises(ValueError, match=r"no column 'body'; the columns are \['text'\]"):
        data.huggingface(dataset, column="body")
    for split in (None, "dev"):
        with pytest.raises(ValueError, match=r"one of \['train', 'test'\]"):
            data.huggingface(splits, split)
    with pytest.raises(ValueError, match="no splits"):
        data.huggingface(dataset, "train")
    with pytest.raises(ValueError, match="streaming"):
        data.huggingface("name", "train", streaming=True)
    with pytest.raises(TypeError, match="int"):
        data.huggingface(3)


@given(a=st.lists(st.text(max_size=3), min_size=1, max_size=4), b=st.lists(st.text(max_size=3), min_size=1, max_size=4))
def test_fingerprints_are_of_the_content(a, b):
    prints = [data.documents(texts).fingerprint() for texts in (a, b)]
    assert (prints[0] == prints[1]) == (a == b)


def test_fingerprints_do_not_depend_on_paths(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{name}.txt", "same")
    one, two = data.text(tmp_path / "one"), data.text(tmp_path / "two")
    assert one.fingerprint() == two.fingerprint() != data.text(tmp_path / "one", encoding="latin-1").fingerprint()
    write(tmp_path / "two" / "two.txt", "Same")
    assert one.fingerprint() != two.fingerprint()
    path = write(tmp_path / "a.jsonl", '{"text": "a", "body": "b"}\n')
    assert data.jsonl(path).fingerprint() != data.jsonl(path, field="body").fingerprint()
