"""Windows, mixtures and batches: every token once, shards add up, and a state is enough to go on."""

import gc
import sys
from collections import Counter
from fractions import Fraction

import grain
import numpy as np
import pytest
from hypothesis import given, strategies as st

from rinsx import data


TOKENIZER = data.Bytes()
TEXTS = st.lists(st.text("abcdefgh", max_size=9), min_size=1, max_size=8).filter(any)
KEYS = {"tokens": np.int32, "targets": np.int32, "segments": np.int32, "positions": np.int32, "weights": np.float32}


def tokens_of(texts):
    return data.tokenize(data.documents(texts), TOKENIZER)


def numbered(n, length, base=0):
    """`n` windows, each of one token over and over: its number above `base`."""
    return data.Windows(data.Tokens.of([np.full(length, base + i) for i in range(n)], TOKENIZER), length)


def listed(dataset, n=None):
    iterator = iter(dataset)
    found = [next(iterator) for _ in range(n)] if n is not None else list(iterator)
    iterator.close()
    return found


def order(dataset, n=None):
    return [batch["targets"][:, 0].tolist() for batch in listed(dataset, n)]


def naive(spans, length):
    """Windows, one prediction at a time."""
    rows = []
    for number, span in enumerate(spans):
        rows += [(256 if i == 0 else span[i - 1], target, number, i) for i, target in enumerate(span)]
    windows = []
    for begin in range(0, len(rows), length):
        part = rows[begin : begin + length]
        window = {key: [] for key in KEYS}
        seen, start = [], {}
        for place, (token, target, number, _) in enumerate(part):
            if number not in seen:
                seen.append(number)
                start[number] = place
            window["tokens"].append(token)
            window["targets"].append(target)
            window["segments"].append(seen.index(number))
            window["positions"].append(place - start[number])
            window["weights"].append(1)
        for place in range(length - len(part)):
            for key, value in zip(KEYS, (256, 256, len(seen), place, 0)):
                window[key].append(value)
        windows.append(window)
    return windows


@given(texts=TEXTS, length=st.integers(1, 20), by=st.sampled_from([None, 2, 3]), seed=st.integers(0, 99))
def test_windows_against_one_prediction_at_a_time(texts, length, by, seed):
    tokens = tokens_of([*texts, "abc"])
    if by is not None:
        tokens = data.split(tokens, "1/2", by=by, seed=seed)[0]
    windows = data.Windows(tokens, length, drop_last=False)
    want = naive([tokens[i].tolist() for i in range(len(tokens))], length)
    assert len(windows) == len(want)
    for i, expected in enumerate(want):
        assert {key: value.tolist() for key, value in windows[i].items()} == expected
        assert {key: value.dtype for key, value in windows[i].items()} == KEYS
    many = windows.take(np.arange(len(want))[::-1])
    assert all(many[key].tolist() == [window[key] for window in want[::-1]] for key in KEYS)
    if tokens.number_of_tokens >= length:
        full = data.Windows(tokens, length)
        assert len(full) == tokens.number_of_tokens // length
        assert full[len(full) - 1]["targets"].tolist() == want[len(full) - 1]["targets"]


@given(texts=TEXTS, length=st.integers(1, 20), rows=st.integers(1, 5))
def test_every_token_is_predicted_exactly_once(texts, length, rows):
    tokens = tokens_of(texts)
    windows = data.Windows(tokens, length, drop_last=False)
    found = []
    for batch in listed(data.evaluation(windows, rows)):
        assert all(batch[key].shape == (rows, length) for key in KEYS)
        found += batch["targets"][batch["weights"] == 1].tolist()
    assert found == [token for text in texts for token in [*text.encode(), 256]]
    bytes_per_token = tokens.bytes_per_token[np.array(found)]
    assert bytes_per_token.sum() == tokens.number_of_bytes


def test_a_corpus_shorter_than_one_window():
    with pytest.raises(ValueError, match=r"documents\(1 texts\).*3 tokens.*window of 4"):
        data.Windows(tokens_of(["ab"]), 4)
    assert data.Windows(tokens_of(["ab"]), 4, drop_last=False)[0]["weights"].tolist() == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="got 0"):
        data.Windows(tokens_of(["ab"]), 0)
    for wrong in (1, -1):
        with pytest.raises(IndexError, match=f"window {wrong} of 1"):
            data.Windows(tokens_of(["abc"]), 4)[wrong]


@pytest.mark.parametrize("ids", [300, -1, 2**40])
def test_a_token_beyond_the_vocabulary_names_document_and_place(ids):
    tokens = data.Tokens.of([np.arange(10), [5, 6, 7, ids, 8]], TOKENIZER, "ids.npy")
    windows = data.Windows(tokens, 4, drop_last=False)
    windows[2]
    with pytest.raises(ValueError, match=f"ids.npy: token 3 of document 1 is {ids}, beyond.*257"):
        windows[3]
    # Also where it is an input alone, and where the document is in pieces.
    shifted = data.Windows(data.Tokens.of([[1, 2, 3, ids, 8, 9]], TOKENIZER), 4, drop_last=False)
    with pytest.raises(ValueError, match="token 3 of document 0"):
        shifted[1]
    for part in data.split(tokens, "1/2", by=1):
        place = [span for span in range(len(part)) if ids in part[span]]
        if place:
            with pytest.raises(ValueError, match="token 3 of document 1"):
                data.Windows(part.subset(place), 1).take(range(part.subset(place).number_of_tokens))


def test_a_window_reads_only_its_own_part():
    class Watched(np.ndarray):
        reads = []

        def __getitem__(self, index):
            Watched.reads.append(np.size(index))
            return super().__getitem__(index)

    tokens = data.Tokens.of([np.arange(200)] * 500, TOKENIZER)
    object.__setattr__(tokens, "tokens", tokens.tokens.view(Watched))
    windows = data.Windows(tokens, 16)
    Watched.reads.clear()
    windows[4000]
    assert sum(Watched.reads) <= 2 * 17


@given(n=st.integers(1, 12), rows=st.integers(1, 7), seed=st.integers(0, 2**40), epochs=st.integers(1, 4))
def test_every_epoch_has_every_window_once(n, rows, seed, epochs):
    windows = numbered(n, 2)
    if n * epochs < rows:
        with pytest.raises(ValueError, match=f"{n} windows.*{epochs} epoch.*batch of {rows}"):
            data.batches(windows, rows, epochs=epochs)
        return
    got = order(data.batches(windows, rows, seed=seed, epochs=epochs, shard=(0, 1)))
    assert len(got) == n * epochs // rows and all(len(batch) == rows for batch in got)
    # Batches run on over the ends of epochs; only what fills no last batch is dropped.
    flat = sum(order(data.batches(windows, rows, seed=seed, shard=(0, 1)), -(-n * epochs // rows)), [])
    assert flat[: len(got) * rows] == sum(got, [])
    for epoch in range(epochs):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))
    plain = sum(order(data.batches(windows, rows, shuffle=False, epochs=epochs)), [])
    assert plain == (list(range(n)) * epochs)[: len(plain)]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = set()
    for seed in range(5):
        flat = sum(order(data.batches(numbered(64, 1), 64, seed=seed), 5), [])
        orders |= {tuple(flat[i : i + 64]) for i in range(0, 320, 64)}
    assert len(orders) == 25


def test_shuffles_are_even():
    # How often each of 5 windows comes first: binomial with mean 100 and deviation 9.
    windows = numbered(5, 1)
    first = Counter(order(data.batches(windows, 1, seed=seed), 1)[0][0] for seed in range(500))
    assert all(abs(first[i] - 100) < 45 for i in range(5))


@given(count=st.sampled_from([1, 2, 3, 4]), each=st.integers(1, 3), seed=st.integers(0, 99), mixed=st.booleans())
def test_shards_together_are_the_global_batch(count, each, seed, mixed):
    windows = numbered(23, 3)
    if mixed:
        windows = data.mix([windows, numbered(7, 3, 100)], [2, 1])
    whole = listed(data.batches(windows, count * each, seed=seed, shard=(0, 1)), 5)
    parts = [listed(data.batches(windows, count * each, seed=seed, shard=(i, count)), 5) for i in range(count)]
    for step, batch in enumerate(whole):
        for key in KEYS:
            joined = np.concatenate([part[step][key] for part in parts])
            assert np.array_equal(joined, batch[key]) and joined.dtype == batch[key].dtype


def test_shards_of_an_evaluation():
    windows = numbered(10, 2)
    whole = listed(data.evaluation(windows, 4))
    parts = [listed(data.evaluation(windows, 4, shard=(i, 2))) for i in range(2)]
    assert len(whole) == len(parts[0]) == 3
    for batch, a, b in zip(whole, *parts):
        assert all(np.array_equal(np.concatenate([a[key], b[key]]), batch[key]) for key in KEYS)
    assert whole[2]["weights"].sum(axis=1).tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_state_is_enough_to_go_on(prefetch, mixed):
    windows = numbered(7, 2)
    if mixed:
        windows = data.mix([windows, numbered(3, 2, 50)], ["2/3", "1/3"])
    dataset = data.batches(windows, 2, seed=3, epochs=2, prefetch=prefetch)
    grain.experimental.assert_equal_output_after_checkpoint(dataset)
    gc.collect()  # it leaves its iterators open, and a prefetching one has a thread
    assert order(dataset) == order(data.batches(windows, 2, seed=3, epochs=2))


def test_the_state_is_one_integer_of_what_was_handed_out():
    dataset = data.batches(numbered(9, 2), 2, seed=1, prefetch=4)
    want = order(dataset, 101)
    iterator = iter(dataset)
    for _ in range(3):
        next(iterator)
    (value,) = iterator.get_state().values()
    assert value == 3
    fresh = iter(dataset)
    fresh.set_state({key: 100 for key in iterator.get_state()})
    assert next(fresh)["targets"][:, 0].tolist() == want[100]
    iterator.close()
    fresh.close()


@given(weights=st.lists(st.integers(1, 50), min_size=1, max_size=5), n=st.integers(0, 10**6))
def test_mixtures_have_exact_proportions(weights, n):
    parts = [numbered(i + 2, 2, 40 * i) for i in range(len(weights))]
    mixture = data.mix(parts, [Fraction(weight, 7) for weight in weights])
    total = sum(weights)
    # Wherever one looks: among any prefix, by counting over one period from there.
    counts = Counter(mixture.locate(n + i)[0] for i in range(total))
    assert [counts[i] for i in range(len(weights))] == weights
    given_by_then = mixture.given(n)
    assert sum(given_by_then) == n
    assert all(abs(got - Fraction(n * w, total)) < len(weights) for got, w in zip(given_by_then, weights))


@given(
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_mixtures_one_window_at_a_time(weights, sizes):
    parts = [numbered(size, 2, 40 * i) for i, size in enumerate(sizes[: len(weights)])]
    mixture = data.mix(parts, weights)
    seen = [0] * len(parts)
    epoch = None
    for i in range(100):
        part, inner = mixture.locate(i)
        assert inner == seen[part]
        assert mixture[i]["targets"][0] == 40 * part + inner % sizes[part]
        seen[part] += 1
        if epoch is None and seen[part] > sizes[part]:
            epoch = i
    assert epoch == len(mixture)


def test_batches_of_a_mixture():
    parts = [numbered(6, 3), numbered(4, 3, 100)]
    mixture = data.mix(parts, [0.7, "3/10"])
    flat = sum(order(data.batches(mixture, 10, seed=2), 12), [])
    for i in range(0, 120, 10):
        assert sum(x >= 100 for x in flat[i : i + 10]) == 3
    # Each part is gone through whole before it begins again, in another order.
    for part, base in ((parts[0], 0), (parts[1], 100)):
        own = [x - base for x in flat if (x >= 100) == (base == 100)]
        rounds = [tuple(own[i : i + len(part)]) for i in range(0, len(own) - len(part) + 1, len(part))]
        assert all(sorted(one) == list(range(len(part))) for one in rounds) and len(set(rounds)) > 1
    nested = data.mix([mixture, numbered(5, 3, 200)], [1, 1])
    flat = sum(order(data.batches(nested, 20, seed=2), 3), [])
    assert [sum(low <= x < low + 100 for x in flat) for low in (0, 100, 200)] == [21, 9, 30]
    one, twice = data.mix([parts[0], parts[0]], [1, 1]), data.mix([parts[0]], [3])
    assert len(one) == 12 and len(twice) == 6


def test_mixtures_and_batches_that_cannot_be():
    windows = numbered(4, 2)
    bpe = data.Windows(data.tokenize(data.documents(["abab"]), data.BPE.train(data.documents(["abab"]), 258)), 2)
    for message, call in {
        "one length; got 2 and 3": lambda: data.mix([windows, numbered(4, 3)], [1, 1]),
        "one vocabulary; got 257 and 258": lambda: data.mix([windows, bpe], [1, 1]),
        "a weight for each part": lambda: data.mix([windows], [1, 2]),
        "at least one part": lambda: data.mix([], []),
        "positive; got": lambda: data.mix([windows, windows], [1, 0]),
        "must be a number.*'much'": lambda: data.mix([windows], ["much"]),
        "multiple of the 3 processes; got 4": lambda: data.batches(windows, 4, shard=(0, 3)),
        "`batch_size`.*got 0": lambda: data.batches(windows, 0),
        r"`shard`.*got \(2, 2\)": lambda: data.batches(windows, 2, shard=(2, 2)),
        "`epochs`.*got 0": lambda: data.batches(windows, 2, epochs=0),
        "`prefetch`.*got -1": lambda: data.batches(windows, 2, prefetch=-1),
        "`seed`.*got -1": lambda: data.batches(windows, 2, seed=-1),
        "`batch_size` must": lambda: data.evaluation(windows, -2),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError):
        data.evaluation(data.mix([windows], [1]), 2)


def test_errors_pass_through_a_thread():
    windows = data.Windows(data.Tokens.of([[1, 2, 999, 4]], TOKENIZER), 2)
    iterator = iter(data.batches(windows, 2, prefetch=2))
    with pytest.raises(ValueError, match="token 2 of document 0 is 999"):
        next(iterator)
    iterator.close()


def test_a_run_without_end_is_long():
    iterator = iter(data.batches(numbered(3, 1), 3))
    iterator.set_state({"next_index": sys.maxsize // 4})
    assert sorted(next(iterator)["targets"][:, 0].tolist()) == [0, 1, 2]
    iterator.close()
