"""Pairs: what a row is, what counts, and batches that are pure functions of their number."""

import gc
import io
import pickle
import threading
from collections import Counter

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

import rinsx as rx
from rinsx import data
from rinsx.data import _pairs


TOKENIZER = data.Bytes()


class Plain(data.AbstractImages):
    """A source of one's own, in memory."""

    def __init__(self, images, texts=None, labels=None, names=None):
        self.images, self.captions, self.labels, self.names = images, texts, labels, names

    def __len__(self):
        return len(self.images)

    def example(self, index):
        of = lambda values: None if values is None else values[index]
        return data.Example(self.images[index], of(self.captions), of(self.labels))

    def fingerprint(self):
        return "0"

    def place(self, index):
        return f"plain {index}"

    def __repr__(self):
        return "plain"


def noise(n, size=6, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8))


def numbered(n, base=0, **options):
    """Images of one grey each: their number above `base`."""
    images = [np.full((4, 4, 3), base + i, np.uint8) for i in range(n)]
    return data.Pairs(Plain(images, labels=list(range(n))), data.Pixels(4, mean=0, std=1 / 255), **options)


def random_pairs(n, seed=0):
    """Rows all of whose draws can be seen: a crop, a flip, and four templates."""
    captions = data.Captions(TOKENIZER, 8, [f"{i}{{}}" for i in range(4)], names=[chr(65 + i) for i in range(n)])
    pixels = data.Pixels(4, crop=(0.2, 0.9), flip=True)
    return data.Pairs(Plain(noise(n, seed=seed), labels=list(range(n))), pixels, captions)


def listed(dataset, n=None):
    iterator = iter(dataset)
    found = [next(iterator) for _ in range(n)] if n is not None else list(iterator)
    iterator.close()
    return found


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def order(dataset, n=None):
    return [batch["labels"].tolist() for batch in listed(dataset, n)]


# Captions.


@given(text=st.text(max_size=12), context=st.integers(2, 20))
def test_captions_against_lists(text, context):
    got = data.Captions(TOKENIZER, context)(text)
    ids = list(text.encode())[: context - 1]
    assert got.dtype == np.int32 and got.tolist() == ids + [256] * (context - len(ids))


def test_captions_are_cut_off_only_where_the_end_would_not_fit():
    captions = data.Captions(TOKENIZER, 4)
    assert [captions.read(text)[1] for text in ("", "abc", "abcd")] == [[], [], ["captions cut off"]]
    assert captions("abcd").tolist() == [97, 98, 99, 256]


def test_halves_of_surrogate_pairs_are_replaced():
    tokens, kinds = data.Captions(TOKENIZER, 16).read("a\ud83db")
    assert TOKENIZER.decode(tokens) == "a\ufffdb" and kinds == ["captions not UTF-8"]
    tokens, kinds = data.Captions(TOKENIZER, 16).read("🙂 日本")
    assert TOKENIZER.decode(tokens) == "🙂 日本" and kinds == []


def test_classes_of_a_tokeniser_of_words():
    bpe = data.BPE.train(data.documents(["a photo of a cat. a cat {x}."]), 262)
    captions = data.Captions(bpe, 24, templates=("a photo of a {}.", "{x} {}"), names=["cat", "{dog}"])
    tokens = captions.classes()
    assert tokens.shape == (2, 2, 24) and tokens.dtype == np.int32 and (tokens[..., -1] == bpe.end).all()
    texts = [[bpe.decode(row) for row in rows] for rows in tokens]
    assert texts == [["a photo of a cat.", "{x} cat"], ["a photo of a {dog}.", "{x} {dog}"]]
    assert bpe.decode(captions.classes(["ant"])[0, 1]) == "{x} ant"


def test_captions_that_cannot_be():
    for error, message, arguments in (
        (ValueError, "`context`.*got 1", {"context": 1}),
        (ValueError, "one {}.*got 'a'", {"context": 9, "templates": ["a"]}),
        (ValueError, "one {}.*got '{} {}'", {"context": 9, "templates": ["{} {}"]}),
        (ValueError, "at least one text", {"context": 9, "templates": []}),
        (TypeError, r"Write \('a {}',\)", {"context": 9, "templates": "a {}"}),
        (ValueError, "`names` stand in `templates`", {"context": 9, "names": ["a"]}),
        (TypeError, "`names`.*'cat'", {"context": 9, "templates": ["{}"], "names": "cat"}),
        (ValueError, "must not be blank; name 1 is ' '", {"context": 9, "templates": ["{}"], "names": ["cat", " "]}),
    ):
        with pytest.raises(error, match=message):
            data.Captions(TOKENIZER, **arguments)
    with pytest.raises(ValueError, match="`templates` are needed"):
        data.Captions(TOKENIZER, 9).classes(["a"])
    with pytest.raises(ValueError, match="`names` are needed"):
        data.Captions(TOKENIZER, 9, ["{}"]).classes()
    with pytest.raises(ValueError, match="must not be blank; name 0 is ''"):
        data.Captions(TOKENIZER, 9, ["{}"]).classes([""])


# Rows.


def test_a_row():
    source = Plain(noise(3), ["a", "bc", "def"], [2, 0, 1], ("x", "y", "z"))
    pixels = data.Pixels(5)
    pairs = data.Pairs(source, pixels, data.Captions(TOKENIZER, 3))
    batch = pairs.take([2, 0])
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "images": ((2, 5, 5, 3), np.float32),
        "tokens": ((2, 3), np.int32),
        "labels": ((2,), np.int32),
        "weights": ((2,), np.float32),
    }
    assert batch["tokens"].tolist() == [[100, 101, 256], [97, 256, 256]] and batch["labels"].tolist() == [1, 2]
    assert np.array_equal(batch["images"], [pixels(source.images[2]), pixels(source.images[0])])
    assert pairs.counts == {"rows": 2, "captions cut off": 1}
    assert all(np.array_equal(pairs[2][key], batch[key][0]) for key in batch)
    assert len(pairs) == 3 and pairs.take([])["images"].shape == (0, 5, 5, 3)
    assert data.Pairs(source, pixels)[0].keys() == {"images", "labels", "weights"}
    assert data.Pairs(source, pixels, labels=False)[0].keys() == {"images", "weights"}
    for wrong in (3, -1):
        with pytest.raises(IndexError, match=f"row {wrong} of 3"):
            pairs[wrong]


def encoded(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def broken_source():
    whole = encoded(Image.fromarray(noise(1, 64)[0]), "JPEG")
    images = [
        whole,
        whole[:900],
        b"",
        encoded(Image.new("LA", (8, 8))),
        whole,
        whole,
        b"x",
        np.zeros((8, 8), np.uint16),
    ]
    return Plain(images, ["a", "b", "c", "d", None, " \n\t", "", "a long caption"])


COUNTS = {
    "rows": 8,
    "broken images": 3,
    "empty captions": 3,
    "mode LA": 1,
    "mode L 16-bit": 1,
    "captions cut off": 1,
}


def test_what_does_not_count_is_counted():
    pairs = data.Pairs(broken_source(), data.Pixels(8), data.Captions(TOKENIZER, 6))
    batch = pairs.take(np.arange(8))
    assert batch["weights"].tolist() == [1, 0, 0, 1, 0, 0, 0, 1]
    assert (batch["images"][[1, 2, 6]] == 0).all() and (batch["tokens"][[4, 5, 6]] == 256).all()
    assert batch["images"][4].any() and batch["tokens"][1].tolist() == [98, *[256] * 5]
    assert pairs.counts == COUNTS
    pairs.take([1, 1])
    assert pairs.counts == {**COUNTS, "rows": 10, "broken images": 5}
    # Without captions their texts do not matter.
    images = data.Pairs(broken_source(), data.Pixels(8))
    assert images.take(np.arange(8))["weights"].tolist() == [1, 0, 0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_survey_counts_everything_once(threads):
    pairs = data.Pairs(broken_source(), data.Pixels(8), data.Captions(TOKENIZER, 6))
    assert pairs.survey(threads=threads) == COUNTS and pairs.counts == {}
    many = data.Pairs(Plain(broken_source().images * 100, broken_source().captions * 100), data.Pixels(8))
    assert many.survey(threads=threads)["broken images"] == 300
    with pytest.raises(ValueError, match="`threads`.*0"):
        pairs.survey(threads=0)


def test_broken_rows_are_named(caplog):
    with caplog.at_level("DEBUG", "rinsx.data"):
        data.Pairs(broken_source(), data.Pixels(8), data.Captions(TOKENIZER, 6)).survey()
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "plain 2: the image is broken: there are no bytes" in text and "plain 5: the caption is empty" in text


def test_counts_of_threads_add_up():
    pairs = data.Pairs(broken_source(), data.Pixels(8), data.Captions(TOKENIZER, 6))
    for batch in listed(data.evaluation(pairs, 2, prefetch=4, threads=4)):
        assert batch["images"].shape == (2, 8, 8, 3)
    assert pairs.counts == COUNTS


def test_captions_from_templates():
    source = Plain(noise(3), labels=[1, 0, 1], names=("cat", "dog"))
    pairs = data.Pairs(source, data.Pixels(4), data.Captions(TOKENIZER, 8, ("a {}", "{}!", "long long {}")))
    assert [TOKENIZER.decode(row) for row in pairs.take([0, 1, 2])["tokens"]] == ["a dog", "a cat", "a dog"]
    assert pairs.captions.classes().shape == (2, 3, 8) and pairs.captions.names == ("cat", "dog")
    drawn = Counter(TOKENIZER.decode(pairs.take([1], [(seed,)])["tokens"][0]) for seed in range(600))
    assert drawn.keys() == {"a cat", "cat!", "long lo"} and all(abs(n - 200) < 55 for n in drawn.values())
    assert pairs.counts["captions cut off"] == drawn["long lo"]
    other = data.Pairs(source, data.Pixels(4), data.Captions(TOKENIZER, 8, ("{}",), names=("Katze", "Hund")))
    assert TOKENIZER.decode(other[0]["tokens"]) == "Hund"


def test_the_template_does_not_depend_on_the_image():
    good, broken = random_pairs(5), random_pairs(5)
    broken.source.images[:] = [b""] * 5
    draws = [(7, i) for i in range(5)]
    assert np.array_equal(good.take(range(5), draws)["tokens"], broken.take(range(5), draws)["tokens"])


def test_layouts_that_are_wrong():
    captions, templates = data.Captions(TOKENIZER, 8), data.Captions(TOKENIZER, 8, ["{}"])
    images, pixels = noise(3), data.Pixels(4)
    for message, source, how in (
        ("none of 3 rows has a text", Plain(images), {"captions": captions}),
        ("must not be blank; name 1", Plain(images, labels=[0] * 3, names=("a", "\n")), {"captions": templates}),
        ("no labels, from which captions", Plain(images, ["a"] * 3), {"captions": templates}),
        ("no names of classes", Plain(images, labels=[0] * 3), {"captions": templates}),
        ("no labels; got labels=True", Plain(images), {"labels": True}),
        ("no rows", Plain([]), {}),
        (
            "2 names of classes, and plain has 1",
            Plain(images, labels=[0] * 3, names=("a",)),
            {"captions": data.Captions(TOKENIZER, 8, ["{}"], names=("a", "b"))},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            data.Pairs(source, pixels, **how)
    # Found when the row is read, with its place.
    for error, message, source in (
        (ValueError, r"plain 1: the label 2 is out of range.*\['a', 'b'\]", Plain(images, None, [0, 2, 1], ("a", "b"))),
        (ValueError, "plain 1: the label -1", Plain(images, None, [0, -1, 1])),
        (ValueError, "plain 1: the label is None, and the first row has a label", Plain(images, None, [0, None, 1])),
        (ValueError, "plain 1: the label is 1, and the first row has none", Plain(images, None, [None, 1, 1])),
        (TypeError, "plain 1: .*int64", Plain([images[0], images[1].astype(np.int64)])),
        (ValueError, "plain 1: .*0.0 to 255.0", Plain([images[0], np.array([[0.0, 255.0]])])),
    ):
        pairs = data.Pairs(source, pixels)
        pairs[0]
        with pytest.raises(error, match=message):
            pairs[1]
    with pytest.raises(ValueError, match="plain 0: the label 1 is out of range. There are 1 names"):
        data.Pairs(Plain(images, labels=[1] * 3), pixels, data.Captions(TOKENIZER, 8, ["{}"], names=("a",)))[0]
    with pytest.raises(ValueError, match="an entry for each row; got 1 for 2"):
        data.Pairs(Plain(images), pixels).take([0, 1], [(1,)])
    with pytest.raises(ValueError, match="`threads`.*0"):
        data.Pairs(Plain(images), pixels).take([0, 1], threads=0)


def test_a_part_without_texts_is_legal():
    texts = [None] * 40 + ["a"] + [None] * 400
    pairs = data.Pairs(Plain(noise(1) * 441, texts), data.Pixels(4), data.Captions(TOKENIZER, 4))
    part = pairs.subset([1, 3])
    pairs.take([40, 1])
    assert part.take([0, 1])["weights"].tolist() == [0, 0] and part.counts == {"rows": 2, "empty captions": 2}
    assert pairs.counts == {"rows": 2, "empty captions": 1} and pairs.subset([40])[0]["weights"] == 1
    assert part.subset([0]).survey() == {"rows": 1, "empty captions": 1}
    train, held_out = data.split(pairs, "1/2")
    assert sum(part.survey()["empty captions"] for part in (train, held_out)) == 440
    # What was asked for stays so.
    assert data.Pairs(Plain(noise(2), labels=[0, 1]), data.Pixels(4), labels=False).subset([1])[0].keys() == {
        "images",
        "weights",
    }


def test_texts_that_are_no_texts():
    pairs = data.Pairs(Plain(noise(2), ["a", (1,)]), data.Pixels(4), data.Captions(TOKENIZER, 4))
    assert pairs[0]["weights"] == 1
    with pytest.raises(TypeError, match="plain 1: |parameter 'text'"):
        pairs[1]


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 9))
def test_pixels_do_not_depend_on_captions(seed, epoch):
    pixels, images, labels = data.Pixels(4, crop=(0.2, 0.9), flip=True), noise(5, 9), [4, 3, 2, 1, 0]
    texts = ["a", None, ("b", "c"), ("", "d"), ("e", "f", "g", "h")]
    source = Plain(images, texts, labels, tuple("abcde"))
    some = [None, data.Captions(TOKENIZER, 8)]
    some += [data.Captions(TOKENIZER, 8, ["{}!", "a {}", "the {}"][:n]) for n in (1, 2, 3)]
    draws = [(seed, epoch)] * 5
    got = [data.Pairs(source, pixels, captions).take(range(5), draws)["images"] for captions in some]
    want = [pixels(image, np.random.default_rng([seed, epoch, i])) for i, image in enumerate(images)]
    assert all(np.array_equal(one, want) for one in got)


def test_one_of_several_captions_is_drawn():
    texts = [("a", " ", "b", "c"), ("d",), ("", None or "")]
    pairs = data.Pairs(Plain(noise(3, 12), texts), data.Pixels(4, flip=True), data.Captions(TOKENIZER, 3))
    whole = pairs.take(range(3))
    assert [TOKENIZER.decode(row) for row in whole["tokens"]] == ["a", "d", ""]
    assert whole["weights"].tolist() == [1, 1, 0] and pairs.counts == {"rows": 3, "empty captions": 1}
    batch = pairs.take([0] * 600, [(5, i) for i in range(600)])
    words = [TOKENIZER.decode(row) for row in batch["tokens"]]
    mirrored = [not np.array_equal(image, whole["images"][0]) for image in batch["images"]]
    drawn = Counter(words)
    assert drawn.keys() == {"a", "b", "c"} and all(abs(n - 200) < 55 for n in drawn.values())
    # The draws of text and image have nothing to do with each other.
    both = Counter(zip(words, mirrored))
    assert len(both) == 6 and all(abs(n - 100) < 40 for n in both.values())
    assert [TOKENIZER.decode(pairs.take([1], [(i,)])["tokens"][0]) for i in range(5)] == ["d"] * 5


def test_pairs_can_be_sent_to_a_process():
    pairs = random_pairs(4)
    pairs.take([1])
    again = pickle.loads(pickle.dumps(pairs))
    assert same(again.take([0, 3], [(1, 2), (1, 2)]), pairs.take([0, 3], [(1, 2), (1, 2)]))
    assert again.counts == pairs.counts == {"rows": 3}


# Batches.


@given(n=st.integers(1, 9), rows=st.integers(1, 5), seed=st.integers(0, 2**40), step=st.integers(0, 12))
def test_a_batch_is_a_function_of_its_number(n, rows, seed, step):
    first, second = (iter(data.batches(random_pairs(n), rows, seed=seed)) for _ in range(2))
    for _ in range(step):
        next(first)
    second.set_state({"next_index": step})
    want = next(first)
    assert same(next(second), want)
    # What is random in row `i` of epoch `e` comes from the seed, `e` and `i`.
    for row, label in enumerate(want["labels"].tolist()):
        epoch = (step * rows + row) // n
        alone = random_pairs(n).take([label], [(seed, epoch)])
        assert all(np.array_equal(alone[key][0], want[key][row]) for key in want)
    first.close()
    second.close()


def test_epochs_seeds_and_rows_draw_anew():
    pairs = data.Pairs(Plain([noise(1, 32)[0]] * 6), data.Pixels(8, crop=(0.1, 0.9), flip=True))
    found = set()
    for seed in range(3):
        for batch in listed(data.batches(pairs, 6, seed=seed, shuffle=False), 4):
            found |= {image.tobytes() for image in batch["images"]}
    assert len(found) == 3 * 4 * 6


@given(count=st.sampled_from([1, 2, 3]), each=st.integers(1, 3), seed=st.integers(0, 99), mixed=st.booleans())
def test_shards_together_are_the_global_batch(count, each, seed, mixed):
    pairs = random_pairs(7)
    if mixed:
        pairs = data.mix([pairs, random_pairs(7, seed=1)], [2, 1])
    whole = listed(data.batches(pairs, count * each, seed=seed, shard=(0, 1)), 4)
    parts = [listed(data.batches(pairs, count * each, seed=seed, shard=(i, count)), 4) for i in range(count)]
    for step, batch in enumerate(whole):
        assert same({key: np.concatenate([part[step][key] for part in parts]) for key in batch}, batch)


@given(n=st.integers(1, 11), rows=st.integers(1, 6), epochs=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_epoch_has_every_pair_once(n, rows, epochs, seed):
    pairs = numbered(n)
    if n * epochs < rows:
        with pytest.raises(ValueError, match=f"{n} pairs.*batch of {rows}"):
            data.batches(pairs, rows, epochs=epochs)
        return
    flat = sum(order(data.batches(pairs, rows, seed=seed), -(-n * epochs // rows)), [])
    assert all(sorted(flat[e * n : (e + 1) * n]) == list(range(n)) for e in range(epochs))
    assert sum(order(data.batches(pairs, rows, seed=seed, epochs=epochs)), []) == flat[: n * epochs // rows * rows]


@given(n=st.integers(1, 11), count=st.sampled_from([1, 2, 3]), each=st.integers(1, 4))
def test_an_evaluation_has_every_pair_once_in_order(n, count, each):
    pairs = random_pairs(n)
    rows = count * each
    whole = listed(data.evaluation(pairs, rows))
    assert pairs.counts["rows"] == n
    assert len(whole) == -(-n // rows) and all(len(batch["images"]) == rows for batch in whole)
    joined = {key: np.concatenate([batch[key] for batch in whole]) for key in whole[0]}
    kept = joined["weights"] == 1
    assert kept.sum() == n and kept[:n].all()
    assert same({key: value[kept] for key, value in joined.items()}, random_pairs(n).take(np.arange(n)))
    # What fills up the last batch is empty.
    assert not joined["images"][n:].any() and (joined["tokens"][n:] == 256).all() and not joined["labels"][n:].any()
    parts = [listed(data.evaluation(pairs, rows, shard=(i, count))) for i in range(count)]
    for step, batch in enumerate(whole):
        assert same({key: np.concatenate([part[step][key] for part in parts]) for key in batch}, batch)


@pytest.mark.parametrize("prefetch, threads", [(0, 2), (1, 1), (1, 4), (3, 2)])
@pytest.mark.parametrize("mixed", [False, True])
def test_threads_do_not_change_batches(prefetch, threads, mixed):
    pairs = random_pairs(40)
    if mixed:
        pairs = data.mix([pairs, random_pairs(40, seed=1)], [1, 1])
    want = listed(data.batches(pairs, 19, seed=2), 6)
    got = listed(data.batches(pairs, 19, seed=2, prefetch=prefetch, threads=threads), 6)
    assert all(same(a, b) for a, b in zip(want, got))
    if not mixed:
        want, got = (
            listed(data.evaluation(pairs, 19, **how)) for how in ({}, {"prefetch": prefetch, "threads": threads})
        )
        assert all(same(a, b) for a, b in zip(want, got))


def test_threads_decode_one_batch_at_a_time():
    """Two threads are at work on the rows of one batch, and none on those of the next before all of these are read."""
    meet, done = threading.Barrier(2, timeout=30), []

    class Waiting(Plain):
        def example(self, index):
            # Rows 0 and 8 begin the two pieces of the first batch: neither goes on without the other.
            if armed and index in (0, 8):
                meet.wait()
            done.append(index)
            return super().example(index)

    armed = False
    pairs = data.Pairs(Waiting(noise(1) * 32), data.Pixels(4))
    armed = True
    done.clear()
    iterator = iter(data.batches(pairs, 16, shuffle=False, epochs=1, prefetch=2, threads=2))
    next(iterator), next(iterator)
    iterator.close()
    assert set(done[:16]) == set(range(16)) and set(done[16:]) == set(range(16, 32))


@given(
    n=st.integers(1, 40),
    threads=st.integers(1, 5),
    broken=st.lists(st.integers(0, 39), max_size=3),
    random=st.booleans(),
)
def test_threads_change_no_row(n, threads, broken, random):
    images = [b"" if i in broken else image for i, image in enumerate(noise(n))]
    make = lambda: data.Pairs(Plain(images, labels=[0] * n), data.Pixels(4, crop=(0.2, 0.9), flip=True))
    index = np.random.default_rng(n).integers(0, n, n)
    draws = [(1, i) for i in range(n)] if random else None
    one, several = make(), make()
    assert same(one.take(index, draws), several.take(index, draws, threads=threads)) and one.counts == several.counts
    # Nor what is an error: the first row of the source that is wrong.
    wrong = data.Pairs(
        Plain(images, labels=[0 if i < n // 2 or not i else 9 for i in range(n)], names=("a",)), data.Pixels(4)
    )
    if n > 1:
        with pytest.raises(ValueError, match=f"plain {max(n // 2, 1)}: the label 9"):
            wrong.take(np.arange(n)[::-1], threads=threads)


def test_threads_go_through_a_long_source(monkeypatch):
    monkeypatch.setattr(_pairs, "_PIECE", 1)
    pairs = data.Pairs(Plain(noise(1, 2) * 300), data.Pixels(2))
    assert list(pairs.each(lambda row: row.kinds[0], 2)) == ["rows"] * 300 and pairs.survey(threads=2) == {"rows": 300}


@pytest.mark.parametrize("prefetch, threads", [(0, 1), (2, 3)])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_state_is_enough_to_go_on(prefetch, threads, mixed):
    pairs = random_pairs(7)
    if mixed:
        pairs = data.mix([pairs, random_pairs(7, seed=1)], ["2/3", "1/3"])
    dataset = data.batches(pairs, 2, seed=3, epochs=2, prefetch=prefetch, threads=threads)
    grain.experimental.assert_equal_output_after_checkpoint(dataset)
    gc.collect()  # it leaves its iterators open, and a prefetching one has threads
    iterator = iter(dataset)
    for _ in range(3):
        next(iterator)
    (state,) = iterator.get_state().values()
    assert state == 3
    iterator.close()


def test_mixtures():
    parts = [numbered(6), numbered(4, 100)]
    mixture = data.mix(parts, [0.7, "3/10"])
    assert len(mixture) == 9
    for batch in listed(data.batches(mixture, 10, seed=2), 6):
        grey = batch["images"][:, 0, 0, 0].round()
        assert (grey >= 100).sum() == 3
        # Rows stay together: the label belongs to its image.
        assert np.array_equal(grey % 100, batch["labels"])
    assert mixture[0]["images"].shape == (4, 4, 3)
    nested = data.mix([mixture, numbered(3, 200)], [1, 1])
    grey = np.concatenate([b["images"][:, 0, 0, 0].round() for b in listed(data.batches(nested, 20), 3)])
    assert [int(((grey >= low) & (grey < low + 100)).sum()) for low in (0, 100, 200)] == [21, 9, 30]


def test_a_pair_twice_in_a_mixture_draws_twice():
    pairs = data.Pairs(Plain([noise(1, 32)[0]]), data.Pixels(8, crop=(0.1, 0.9)))
    batch = next(iter(data.batches(data.mix([pairs, pairs], [1, 1]), 2)))
    assert not np.array_equal(*batch["images"])


def test_what_cannot_be_mixed_or_batched():
    plain = numbered(4)
    windows = data.Windows(data.tokenize(data.documents(["abcdef"]), TOKENIZER), 2)
    named = data.Pairs(Plain(noise(2), labels=[0, 1], names=("a", "b")), data.Pixels(4))
    texts = lambda n: data.Pairs(Plain(noise(2), ["a", "b"]), data.Pixels(4), data.Captions(TOKENIZER, n))
    for error, message, call in (
        (ValueError, "windows and pairs cannot", lambda: data.mix([plain, windows], [1, 1])),
        (ValueError, "windows and pairs cannot", lambda: data.mix([data.mix([windows], [1]), plain], [1, 1])),
        (
            ValueError,
            r"images of one size; got \(4, 4\) and \(5, 5\)",
            lambda: data.mix([plain, data.Pairs(plain.source, data.Pixels(5))], [1, 1]),
        ),
        (ValueError, "all labels or none", lambda: data.mix([plain, numbered(3, labels=False)], [1, 1])),
        (ValueError, "the same classes", lambda: data.mix([plain, named], [1, 1])),
        (ValueError, "captions of one length; got 4 and 5", lambda: data.mix([texts(4), texts(5)], [1, 1])),
        (
            ValueError,
            "captions of one length; got None",
            lambda: data.mix([numbered(2, labels=False), texts(5)], [1, 1]),
        ),
        (ValueError, "windows of tokens have none; got threads=2", lambda: data.batches(windows, 1, threads=2)),
        (ValueError, "windows of tokens have none; got threads=2", lambda: data.evaluation(windows, 1, threads=2)),
        (ValueError, "`threads`.*got 0", lambda: data.batches(plain, 2, threads=0)),
        (
            TypeError,
            "a mixture is evaluated part by part|parameter 'windows'",
            lambda: data.evaluation(data.mix([plain], [1]), 2),
        ),
        (TypeError, "rx.data.Pairs|parameter 'windows'", lambda: data.batches(plain.source, 2)),
    ):
        with pytest.raises(error, match=message):
            call()


def test_errors_pass_through_threads():
    pairs = data.Pairs(Plain(noise(4), labels=[0, 0, 5, 0], names=("a",)), data.Pixels(4))
    iterator = iter(data.evaluation(pairs, 1, prefetch=4, threads=2))
    with pytest.raises(ValueError, match="plain 2: the label 5"):
        list(iterator)
    iterator.close()


# Captions on their own.


TEXTS = ["a photo", None, ("one", " ", "two"), "", ("three",), "a\ud83d", (), ("", "four", "five", "six")]
KEPT = [(0, "a photo"), (2, "one"), (2, "two"), (4, "three"), (5, "a\ufffd"), (7, "four"), (7, "five"), (7, "six")]


def test_captions_of():
    source = data.captions_of(Plain(noise(8), TEXTS))
    assert list(source.documents()) == [text for _, text in KEPT] == list(source.documents())
    assert [source.place(i) for i in range(len(KEPT))] == [f"plain {row}" for row, _ in KEPT]
    same_texts = data.captions_of(
        Plain(noise(8, seed=1), [(text,) if isinstance(text, str) else text for text in TEXTS])
    )
    assert source.fingerprint() == same_texts.fingerprint()
    assert source.fingerprint() != data.captions_of(Plain(noise(8), TEXTS[::-1])).fingerprint()
    part = data.captions_of(Plain(noise(8), TEXTS).subset([4, 2]))
    assert list(part.documents()) == ["three", "one", "two"] and part.place(2) == "plain 2"
    # A tokeniser learns merges from them, and `tokenize` takes them.
    tokenizer = data.BPE.train(data.captions_of(Plain(noise(2), ["low lower", ("lowest", "slow")])), 260)
    assert len(tokenizer.encode("low")) == 1
    with pytest.raises(TypeError, match="captions_of|parameter 'source'"):
        data.BPE.train(Plain(noise(2), ["low lower", "lowest"]), 260)
    assert data.tokenize(source, TOKENIZER).number_of_tokens >= sum(len(text.encode()) for _, text in KEPT)


def test_captions_of_templates():
    source = Plain(noise(3), labels=[0, 1, 1], names=("cat", "dog"))
    templates = ("a {}", "{}!")
    assert list(data.captions_of(source, templates).documents()) == ["a cat", "cat!", "a dog", "dog!"]
    assert list(data.captions_of(source, ["{}"], names=["x\udc00"]).documents()) == ["x\ufffd"]
    tokens = data.Captions(TOKENIZER, 8, templates, source.names).classes().reshape(-1, 8)
    assert list(data.captions_of(source, templates).documents()) == [TOKENIZER.decode(row) for row in tokens]
    for message, arguments in (
        ("none of 3 rows has a text", (source,)),
        ("no names of classes", (Plain(noise(1)), ["{}"])),
        ("must not be blank", (source, ["{}"], [""])),
        ("one {}", (source, ["a"])),
        ("`names` stand in `templates`", (source, None, ["a"])),
    ):
        with pytest.raises(ValueError, match=message):
            data.captions_of(*arguments)


@given(batch_size=st.sampled_from([1, 2, 3, 6, 12]), threads=st.sampled_from([1, 3]), count=st.sampled_from([1, 2, 3]))
def test_all_captions(batch_size, threads, count):
    images = noise(8)
    images[4] = b"broken"
    pairs = data.Pairs(Plain(images, TEXTS, [0] * 8, ("x",)), data.Pixels(4), data.Captions(TOKENIZER, 6))
    if batch_size % count:
        with pytest.raises(ValueError, match="`batch_size`"):
            data.all_captions(pairs, batch_size, shard=(0, count))
        return
    parts = [data.all_captions(pairs, batch_size, shard=(i, count), threads=threads) for i in range(count)]
    whole = [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)
    ]
    assert all(same(a, b) for a, b in zip(whole, data.all_captions(pairs, batch_size), strict=True))
    assert all(
        {key: value.dtype for key, value in batch.items()}
        == {"tokens": np.int32, "labels": np.int32, "weights": np.float32}
        for batch in whole
    )
    joined = {key: np.concatenate([batch[key] for batch in whole]) for key in whole[0]}
    keep = joined["weights"] == 1
    kept = [(row, text) for row, text in KEPT if row != 4]
    assert (
        len(keep) == -(-len(kept) // batch_size) * batch_size
        and keep[: len(kept)].all()
        and not keep[len(kept) :].any()
    )
    assert [TOKENIZER.decode(row) for row in joined["tokens"][keep]] == [text[:5] for _, text in kept]
    assert (joined["tokens"][~keep] == 256).all() and pairs.counts == {}
    # Owners count the rows of an evaluation that count.
    counted = np.flatnonzero(np.concatenate([batch["weights"] for batch in listed(data.evaluation(pairs, 3))]))
    assert counted[joined["labels"][keep]].tolist() == [row for row, _ in kept]


def test_all_captions_that_cannot_be():
    source = Plain(noise(2), labels=[0, 1], names=("a", "b"))
    for message, captions in (("has none", None), ("by templates", data.Captions(TOKENIZER, 8, ["{}"]))):
        with pytest.raises(ValueError, match=f"must be texts of the source.*{message}"):
            data.all_captions(data.Pairs(source, data.Pixels(4), captions), 2)


def test_retrieval_of_all_captions():
    """An embedding that knows which image a caption is of finds everything, and one that is wrong finds what it should."""
    images = [np.full((4, 4, 3), 10 * i, np.uint8) for i in range(6)]
    images[2] = b"broken"
    texts = [(f"{i}a", f"{i}b") for i in range(6)]
    texts[4] = ()
    pairs = data.Pairs(Plain(images, texts), data.Pixels(4, mean=0, std=1 / 25.5), data.Captions(TOKENIZER, 4))
    level = lambda x: jax.nn.one_hot(jnp.round(x).astype(int), 10)
    shown = rx.transfer.embed(None, lambda _, batch, key: level(batch["images"][:, 0, 0, 0]), data.evaluation(pairs, 4))
    told = rx.transfer.embed(None, lambda _, batch, key: level(batch["tokens"][:, 0] - 48), data.all_captions(pairs, 3))
    assert told.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and len(shown.vectors[()]) == 4
    found = rx.transfer.retrieval(shown.vectors[()], told.vectors[()], owners=told.labels, at=(1,))
    assert tuple(found) == ({1: 1.0}, {1: 1.0})
    shifted = rx.transfer.retrieval(shown.vectors[()], np.roll(told.vectors[()], 1, 0), owners=told.labels, at=(1,))
    # Every second text is now beside its image; the others are beside the image before, which still finds one of its own.
    assert shifted[1] == {1: 0.5}


# Splits.


@given(n=st.integers(2, 40), seed=st.integers(0, 99), share=st.sampled_from(["1/10", 0.5, "2/3"]), pairs=st.booleans())
def test_a_split_has_every_row_in_one_part(n, seed, share, pairs):
    whole = numbered(n)
    if not pairs:
        parts = data.split(whole.source, share, seed=seed)
        labels = [[part.example(i).label for i in range(len(part))] for part in parts]
    else:
        parts = data.split(whole, share, seed=seed)
        labels = [part.take(range(len(part)))["labels"].tolist() for part in parts]
    assert sorted(sum(labels, [])) == list(range(n)) and labels[0] == sorted(labels[0])
    assert len(parts[1]) == max(1, round(n * float(eval(share) if isinstance(share, str) else share)))
    again = data.split(whole.source, share, seed=seed)[1]
    assert [again.example(i).label for i in range(len(again))] == labels[1]


def test_splits_that_cannot_be():
    source = numbered(2).source
    for message, call in {
        "plain: 2 row.*cannot be split": lambda: data.split(source, "9/10"),
        "by row; got by=3": lambda: data.split(source, "1/2", by=3),
        "`fraction`": lambda: data.split(source, 2),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_digits_end_to_end():
    train, test = data.split(data.digits(), "1/10")
    assert (len(train), len(test)) == (1617, 180)
    captions = data.Captions(TOKENIZER, 24, ("the digit {}.", "a handwritten {}."))
    pairs = data.Pairs(train, data.Pixels(8, crop=(0.6, 1.0)), captions)
    batch = next(iter(data.batches(pairs, 32)))
    for tokens, label in zip(batch["tokens"], batch["labels"]):
        name = train.names[label]
        assert TOKENIZER.decode(tokens) in (f"the digit {name}.", f"a handwritten {name}.")
    assert batch["images"].min() >= -1 and batch["images"].max() <= 1 and batch["weights"].all()
    assert data.Pairs(test, data.Pixels(8), captions).survey() == {"rows": 180, "mode L": 180}
