"""Samplers and speculative acceptance, against loops in numpy and against the distributions that they promise."""

import functools as ft
import math

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given
from scipy import stats

from rinsx.generate._accept import accept
from rinsx.generate._sampler import draw, Sampler


DRAWS = 20_000
# No power of two and no ratio of small integers, so that no set of tied tokens reaches a limit but for rounding.
TOP_PS = (None, 0.0713, 0.3719, 0.6137, 0.9173, 0.9991, 1)


def reference(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty):
    """The probabilities of one row, one token and one filter after the other, in float64."""
    x = {token: float(logit) for token, logit in enumerate(logits)}
    if repetition_penalty is not None:
        for token, logit in x.items():
            if seen[token]:
                x[token] = logit / repetition_penalty if logit > 0 else logit * repetition_penalty
    if temperature == 0:
        best = max(x, key=lambda token: (x[token], -token))
        return np.array([float(token == best) for token in range(len(logits))])
    # All are shifted, since a low temperature would overflow.
    largest = max(x.values())
    x = {token: (logit - largest) / temperature for token, logit in x.items()}

    def probs():
        total = math.fsum(math.exp(logit) for logit in x.values())
        return {token: math.exp(logit) / total for token, logit in x.items()}

    order = sorted(x, key=lambda token: (-x[token], token))
    if top_k is not None:
        for token in order[top_k:]:
            del x[token]
    if top_p is not None:
        mass, of = 0.0, probs()
        for token in order[: len(x)]:
            if mass >= top_p:
                del x[token]
            mass += of[token]
    if min_p is not None:
        of = probs()
        for token, p in of.items():
            # Equal ones differ by rounding at `min_p=1`.
            if p < min_p * max(of.values()) * (1 - 1e-12):
                del x[token]
    of = probs()
    return np.array([of.get(token, 0.0) for token in range(len(logits))])


def some_logits(seed, shape, kind="normal"):
    """Logits of one kind: "normal", "tied" (few values), or "masked" (a third is `-inf`)."""
    rng = np.random.default_rng(seed)
    if kind == "tied":
        return rng.integers(-2, 3, shape).astype(np.float32)
    x = 2 * rng.standard_normal(shape).astype(np.float32)
    if kind == "masked":
        hidden = rng.random(shape) < 1 / 3
        hidden[..., rng.integers(shape[-1])] = False
        x[hidden] = -np.inf
    return x


def chi_square(counts, probs):
    """The p-value of counts under probabilities. What has none must not be counted; what is rare stands together."""
    counts, probs = np.asarray(counts, float).ravel(), np.asarray(probs, float).ravel()
    assert np.all(counts[probs == 0] == 0)
    order = np.argsort(probs)[np.count_nonzero(probs == 0) :]
    expected = counts.sum() * probs[order] / probs.sum()
    # Rare ones are counted with the first that is not: there are no empty groups.
    first = np.argmax(expected >= 10)
    starts = [0, *range(first + 1, order.size)]
    expected, counts = np.add.reduceat(expected, starts), np.add.reduceat(counts[order], starts)
    return stats.chisquare(counts, expected).pvalue if expected.size > 1 else 1.0


samplers = st.builds(
    Sampler,
    temperature=st.sampled_from([0, 0.2, 1, 1.7]),
    top_k=st.sampled_from([None, 1, 4, 100]),
    top_p=st.sampled_from(TOP_PS),
    min_p=st.sampled_from([None, 0.0317, 0.4111, 1]),
    repetition_penalty=st.sampled_from([None, 0.5, 1.3]),
)
seeds = st.integers(0, 2**31 - 1)
kinds = st.sampled_from(["normal", "tied", "masked"])


def numbers_of(sampler):
    return {name: getattr(sampler, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}


# Distributions.


@given(samplers, seeds, kinds)
def test_log_probs_are_those_of_a_loop(sampler, seed, kind):
    shape = (4, 11)
    logits = some_logits(seed, shape, kind)
    seen = np.random.default_rng(seed + 1).random(shape) < 0.4
    given_seen = None if sampler.repetition_penalty is None else jnp.asarray(seen)
    log_probs = sampler.log_probs(jnp.asarray(logits), given_seen)
    assert log_probs.shape == shape and log_probs.dtype == jnp.float32
    probs = np.exp(np.asarray(log_probs, np.float64))
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-5)
    for row in np.ndindex(shape[:-1]):
        expected = reference(logits[row], seen[row], **numbers_of(sampler))
        np.testing.assert_array_equal(np.isfinite(log_probs[row]), expected > 0)
        np.testing.assert_allclose(probs[row], expected, rtol=2e-5, atol=1e-7)


@given(seeds, kinds, st.sampled_from([1, 4, 11, 40]))
def test_top_k_keeps_exactly_k_and_none_better_is_left_out(seed, kind, k):
    logits = some_logits(seed, (4, 11), kind)
    kept = np.isfinite(Sampler(top_k=k).log_probs(jnp.asarray(logits)))
    assert np.all(kept.sum(-1) == np.minimum(k, np.isfinite(logits).sum(-1)))
    for row, keeps in zip(logits, kept):
        assert keeps.all() or row[keeps].min() >= row[~keeps].max()


@given(seeds, kinds, st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_that_reach_it(seed, kind, top_p):
    logits = some_logits(seed, (4, 11), kind)
    kept = np.isfinite(Sampler(top_p=top_p).log_probs(jnp.asarray(logits)))
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(-1, keepdims=True)
    for p, keeps in zip(probs, kept):
        assert keeps.any()
        assert p[keeps].sum() >= top_p - 1e-5
        assert p[keeps].sum() - p[keeps].min() < top_p + 1e-5
        assert keeps.all() or p[keeps].min() >= p[~keeps].max()


def test_limits_that_are_met_exactly():
    quarters = jnp.zeros((1, 4))
    kept = lambda **numbers: np.isfinite(Sampler(**numbers).log_probs(quarters))[0].tolist()
    assert kept(top_p=0.5) == [True, True, False, False]
    assert kept(top_p=0.75) == [True, True, True, False]
    assert kept(top_p=0.2) == [True, False, False, False]
    assert kept(min_p=1) == [True] * 4
    assert kept(top_k=4) == kept(top_k=1000) == kept(top_p=1) == [True] * 4
    # Half of what top-k leaves, not of all.
    assert kept(top_k=2, top_p=0.5) == [True, False, False, False]
    # 1/2, 1/4, 1/8, 1/8.
    logits = jnp.log(jnp.array([[0.125, 0.5, 0.125, 0.25]]))
    assert np.isfinite(Sampler(top_p=0.76).log_probs(logits))[0].tolist() == [True, True, False, True]
    assert np.isfinite(Sampler(min_p=0.4).log_probs(logits))[0].tolist() == [False, True, False, True]


def test_top_p_of_1_keeps_what_rounding_would_lose():
    logits = jnp.linspace(0, -60, 5000)
    assert np.isfinite(Sampler(top_p=1).log_probs(logits)).all()


@given(seeds, kinds, st.sampled_from([{"top_k": 4}, {"min_p": 0.2}, {"top_k": 4, "min_p": 0.1}, {"temperature": 0}]))
def test_filters_are_idempotent(seed, kind, numbers):
    """Not so top-p: of what it has kept, fewer reach it."""
    sampler = Sampler(**numbers)
    once = sampler.log_probs(jnp.asarray(some_logits(seed, (4, 11), kind)))
    twice = sampler.log_probs(once)
    np.testing.assert_array_equal(np.isfinite(once), np.isfinite(twice))
    np.testing.assert_allclose(np.exp(once), np.exp(twice), rtol=1e-5)


@given(samplers, seeds, kinds)
def test_the_order_of_the_vocabulary_does_not_matter(sampler, seed, kind):
    logits = some_logits(seed, (4, 11), "normal" if kind == "tied" else kind)
    order = np.random.default_rng(seed).permutation(11)
    seen = None if sampler.repetition_penalty is None else jnp.arange(44).reshape(4, 11) % 3 == 0
    straight = sampler.log_probs(jnp.asarray(logits), seen)
    shuffled = sampler.log_probs(jnp.asarray(logits[:, order]), None if seen is None else seen[:, order])
    np.testing.assert_allclose(np.exp(straight)[:, order], np.exp(shuffled), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_logits_of_other_dtypes_count_in_float32(dtype):
    logits = jnp.asarray(some_logits(0, (4, 11)), dtype)
    sampler = Sampler(0.7, top_k=4, top_p=0.9)
    expected = sampler.log_probs(logits.astype(jnp.float32))
    np.testing.assert_array_equal(sampler.log_probs(logits), expected)


@pytest.mark.parametrize("wrap", [lambda f: f, eqx.filter_jit])
@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-10, 1e-3, 1e10, 1e300])
def test_temperatures_far_from_1_make_no_nan(wrap, temperature):
    logits = jnp.array([[1000.0, 1000.5, -jnp.inf, -1000.0, 0.0]])
    probs = np.exp(wrap(Sampler(temperature).log_probs)(logits))[0]
    expected = [0, 1, 0, 0, 0] if temperature < 1 else [0.25, 0.25, 0, 0.25, 0.25]
    np.testing.assert_allclose(probs, expected, atol=1e-6)


def test_greedy_takes_the_first_of_equals_and_minds_the_penalty():
    logits = jnp.array([[0.0, 3.0, 3.0, 1.0], [-1.0, -4.0, -3.0, -2.0]])
    keys = jr.split(jr.key(0), 2)
    greedy = Sampler(temperature=0)
    log_probs = greedy.log_probs(logits)
    np.testing.assert_array_equal(np.exp(log_probs), np.eye(4)[[1, 0]])
    assert greedy.draw(log_probs, keys).tolist() == draw(log_probs, keys).tolist() == [1, 0]
    penalised = Sampler(temperature=0, repetition_penalty=4)
    seen = jnp.array([[False, True, True, False], [True, False, False, False]])
    assert penalised.draw(penalised.log_probs(logits, seen), keys).tolist() == [3, 3]


@ft.cache
def primitives(**numbers):
    """The names of what a sampler computes, wherever in the program."""
    sampler = Sampler(**numbers)
    seen = None if sampler.repetition_penalty is None else jnp.zeros((2, 500), bool)
    found = set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            found.add((eqn.primitive.name, eqn.params.get("k")))
            for sub in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
                if hasattr(sub, "jaxpr") or hasattr(sub, "eqns"):
                    walk(getattr(sub, "jaxpr", sub))

    walk(jax.make_jaxpr(sampler.log_probs)(jnp.zeros((2, 500)), seen).jaxpr)
    return found


def test_nothing_is_computed_for_filters_that_are_absent():
    orders = lambda **numbers: {x for x in primitives(**numbers) if x[0] in ("sort", "top_k", "cumsum")}
    assert orders() == orders(temperature=0.5, min_p=0.1, repetition_penalty=1.1) == orders(top_p=1) == set()
    assert orders(temperature=0, top_k=5, top_p=0.5) == orders(top_k=500) == set()
    assert orders(top_k=5) == {("top_k", 5)}
    assert {x for x in orders(top_k=5, top_p=0.5) if x[0] != "cumsum"} == {("top_k", 5)}
    assert {x for x in orders(top_p=0.5) if x[0] != "cumsum"} == {("top_k", 500)}


@pytest.mark.parametrize("numbers", [{"top_k": 50}, {"top_k": 50, "top_p": 0.9, "min_p": 0.1}], ids=str)
def test_top_k_is_not_compiled_to_a_sort(numbers):
    """The backend may make a sort of what was none."""
    sampler = Sampler(**numbers)
    step = lambda logits, keys: sampler.draw(sampler.log_probs(logits), keys)
    compiled = jax.jit(step).lower(jnp.zeros((1, 5000)), jr.split(jr.key(0), 1)).compile().as_text()
    assert compiled and " sort(" not in compiled


# Draws.


@pytest.mark.parametrize(
    "numbers",
    [{}, {"temperature": 0.6, "top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1, "temperature": 1.4}, {"top_k": 50}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["normal", "masked"])
def test_draws_follow_the_distribution(numbers, kind):
    logits = some_logits(5, (8,), kind) / 2
    sampler = Sampler(**numbers)
    rows = jnp.broadcast_to(sampler.log_probs(jnp.asarray(logits)), (DRAWS, 8))
    expected = reference(logits, None, **numbers_of(sampler))
    for seed, drawn in enumerate((sampler.draw, draw) if sampler.top_k else (sampler.draw,)):
        tokens = jax.jit(drawn)(rows, jr.split(jr.key(seed), DRAWS))
        assert tokens.shape == (DRAWS,) and tokens.dtype == jnp.int32
        assert chi_square(np.bincount(tokens, minlength=8), expected) > 1e-4


@given(samplers, seeds, kinds)
def test_what_is_filtered_out_is_never_drawn(sampler, seed, kind):
    logits = jnp.asarray(some_logits(seed, (4, 11), kind))
    seen = None if sampler.repetition_penalty is None else jnp.zeros((4, 11), bool)
    log_probs = sampler.log_probs(logits, seen)
    tokens = sampler.draw(log_probs, jr.split(jr.key(seed), 4))
    assert np.isfinite(jnp.take_along_axis(log_probs, tokens[:, None], axis=-1)).all()


@given(samplers, seeds, kinds)
def test_a_row_draws_what_it_draws_alone(sampler, seed, kind):
    logits = jnp.asarray(some_logits(seed, (4, 11), kind))
    seen = None if sampler.repetition_penalty is None else jnp.arange(44).reshape(4, 11) % 3 == 0
    keys = jr.split(jr.key(seed), 4)

    def tokens(rows):
        return sampler.draw(sampler.log_probs(logits[rows], None if seen is None else seen[rows]), keys[rows])

    together = tokens(np.arange(4))
    order = np.random.default_rng(seed).permutation(4)
    np.testing.assert_array_equal(tokens(order), together[order])
    for i in range(4):
        assert tokens(np.array([i]))[0] == together[i]


def test_batches_have_any_number_of_axes():
    logits, keys = jnp.asarray(some_logits(1, (4, 11))), jr.split(jr.key(0), 4)
    sampler = Sampler(top_k=4, top_p=0.9)
    log_probs = sampler.log_probs(logits)
    tokens = sampler.draw(log_probs, keys)
    deep = sampler.log_probs(logits.reshape(2, 2, 11))
    np.testing.assert_allclose(np.exp(deep).reshape(4, 11), np.exp(log_probs), rtol=1e-5)
    np.testing.assert_array_equal(sampler.draw(deep, keys.reshape(2, 2)).reshape(4), tokens)
    assert sampler.draw(log_probs[0], keys[0]) == tokens[0]


def test_jit_and_scan_draw_the_same():
    numbers = {"top_k": 4, "top_p": 0.8, "min_p": 0.05}
    sampler = Sampler(**numbers)
    logits, keys = jnp.asarray(some_logits(2, (7, 4, 11))), jr.split(jr.key(1), (7, 4))
    step = lambda sampler, logits, keys: sampler.draw(sampler.log_probs(logits), keys)
    expected = jnp.stack([step(sampler, *x) for x in zip(logits, keys)])
    # A sampler is static as a whole: it passes through `jax.jit` as a pytree without leaves.
    assert (
        jax.tree.leaves(sampler) == [] and hash(sampler) == hash(Sampler(**numbers)) and sampler == Sampler(**numbers)
    )
    jitted = jnp.stack([jax.jit(step)(sampler, *x) for x in zip(logits, keys)])
    scanned = jax.jit(
        lambda logits, keys: jax.lax.scan(lambda _, x: (None, step(sampler, *x)), None, (logits, keys))[1]
    )
    np.testing.assert_array_equal(jitted, expected)
    np.testing.assert_array_equal(scanned(logits, keys), expected)


# Acceptance.


accept_in_jit = jax.jit(accept)


def chains(seed, vocab, kind):
    """A draft and a target whose next token depends on the last one: `[last, next]`, the last row being the start."""
    q, p = (some_logits(seed + i, (vocab + 1, vocab)) / 2 for i in range(2))
    draft, target = {
        "near": (Sampler(), Sampler()),
        "far": (Sampler(), Sampler()),
        "filtered": (Sampler(top_k=2), Sampler(top_k=3)),
        "greedy draft": (Sampler(0), Sampler()),
        "greedy target": (Sampler(), Sampler(0)),
        "equal": (Sampler(), Sampler()),
    }[kind]
    p = {"near": q + 0.3 * p, "equal": q}.get(kind, p)
    return draft.log_probs(jnp.asarray(q)), target.log_probs(jnp.asarray(p))


KINDS = ("near", "far", "filtered", "greedy draft", "greedy target", "equal")


@ft.partial(jax.jit, static_argnames="k")
def speculate(q, p, last, key, k):
    """One round for each element of `last`, as a loop over tokens would do it."""
    draft_key, accept_key = jr.split(key)
    drafted = []
    before = last
    for i in range(k):
        keys = jr.split(jr.fold_in(draft_key, i), last.size)
        drafted.append(jax.vmap(jr.categorical)(keys, q[before]))
        before = drafted[-1]
    drafted = jnp.stack(drafted, axis=1).astype(jnp.int32)
    state = jnp.concatenate([last[:, None], drafted], axis=1)
    return drafted, *accept(drafted, q[state[:, :k]], p[state], jr.split(accept_key, last.size))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_accepted_has_the_distribution_of_the_target(kind):
    """The first token, and the first two together: the second comes from the next round if the first is alone."""
    vocab = 4
    q, p = chains(11, vocab, kind)
    start = jnp.full(DRAWS, vocab)
    drafted, accepted, tokens = speculate(q, p, start, jr.key(3), 2)
    assert accepted.dtype == tokens.dtype == jnp.int32 and tokens.shape == (DRAWS, 3)
    first = np.asarray(tokens[:, 0])
    probs = np.exp(np.asarray(p, np.float64))
    assert chi_square(np.bincount(first, minlength=vocab), probs[vocab]) > 1e-4

    _, _, following = speculate(q, p, tokens[:, 0], jr.key(4), 2)
    second = np.where(accepted >= 1, tokens[:, 1], following[:, 0])
    counts = np.bincount(first * vocab + second, minlength=vocab * vocab)
    assert chi_square(counts, probs[vocab][:, None] * probs[:vocab]) > 1e-4


@pytest.mark.parametrize("kind", ["near", "filtered"])
def test_three_tokens_in_a_row_have_the_distribution_of_the_target(kind):
    """Where both drafts stand, the third token is the one that is drawn besides."""
    vocab = 4
    q, p = chains(23, vocab, kind)
    last = jnp.full(DRAWS, vocab)
    out, lengths = np.zeros((DRAWS, 9), int), np.zeros(DRAWS, int)
    for i in range(3):
        _, accepted, tokens = speculate(q, p, last, jr.key(40 + i), 2)
        for j in range(3):
            out[np.arange(DRAWS), lengths + j] = tokens[:, j]
        lengths += np.asarray(accepted) + 1
        last = tokens[jnp.arange(DRAWS), accepted]
    probs = np.exp(np.asarray(p, np.float64))
    joint = np.einsum("a,ab,bc->abc", probs[vocab], probs[:vocab], probs[:vocab])
    counts = np.zeros((vocab,) * 3)
    np.add.at(counts, tuple(out[:, :3].T), 1)
    assert chi_square(counts, joint) > 1e-4


@pytest.mark.parametrize("kind", ["near", "far", "filtered", "greedy draft"])
def test_as_many_are_accepted_as_the_overlap_says(kind):
    """`P(first stands) = sum min(p, q)`, and so on down the tree of drafts."""
    vocab, k = 4, 2
    q, p = chains(11, vocab, kind)
    _, accepted, _ = speculate(q, p, jnp.full(DRAWS, vocab), jr.key(5), k)
    overlap = np.minimum(np.exp(np.asarray(q, np.float64)), np.exp(np.asarray(p, np.float64)))
    one = overlap[vocab].sum()
    two = (overlap[vocab] * overlap[:vocab].sum(axis=1)).sum()
    assert chi_square(np.bincount(accepted, minlength=3), [1 - one, one - two, two]) > 1e-4


def test_the_statistical_tests_would_notice():
    """Drafts taken as they are, or a refusal answered by a draw from the target, are found out."""
    q, p = (np.exp(np.asarray(x, np.float64)) for x in chains(11, 4, "near"))
    overlap = np.minimum(p[4], q[4])
    wrong = overlap + (1 - overlap.sum()) * p[4]
    rng = np.random.default_rng(0)
    for law in (q[4], wrong):
        assert chi_square(rng.multinomial(DRAWS, law / law.sum()), p[4]) < 1e-4


@given(seeds)
def test_greedy_acceptance_is_agreement_of_the_likeliest(seed):
    rows, k, vocab = 6, 3, 7
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((rows, k + 1, vocab)).astype(np.float32)
    draft = np.where(rng.random((rows, k, 1)) < 0.7, target[:, :k], rng.standard_normal((rows, k, vocab)))
    greedy = Sampler(0)
    p, q = greedy.log_probs(jnp.asarray(target)), greedy.log_probs(jnp.asarray(draft, jnp.float32))
    drafted = jnp.argmax(q, axis=-1)
    accepted, tokens = accept_in_jit(drafted, q, p, jr.split(jr.key(seed), rows))
    for row in range(rows):
        best, guess = target[row].argmax(-1), draft[row].argmax(-1)
        n = 0
        while n < k and guess[n] == best[n]:
            n += 1
        assert accepted[row] == n
        assert tokens[row].tolist() == [*best[: n + 1], *[best[n]] * (k - n)]


@given(seeds, kinds)
def test_a_row_accepts_what_it_accepts_alone(seed, kind):
    rows, k, vocab = 6, 3, 7
    q = Sampler().log_probs(jnp.asarray(some_logits(seed, (rows, k, vocab), kind)))
    p = Sampler(top_k=3).log_probs(jnp.asarray(some_logits(seed + 1, (rows, k + 1, vocab), kind)))
    keys, draft_keys = jr.split(jr.key(seed), rows), jr.split(jr.key(seed + 1), (rows, k))
    drafted = draw(q, draft_keys)
    accepted, tokens = accept_in_jit(drafted, q, p, keys)
    for i in range(rows):
        one = slice(i, i + 1)
        alone = accept_in_jit(drafted[one], q[one], p[one], keys[one])
        assert alone[0][0] == accepted[i] and alone[1][0].tolist() == tokens[i].tolist()
        n = int(accepted[i])
        assert 0 <= n <= k and tokens[i, :n].tolist() == drafted[i, :n].tolist()
        assert set(tokens[i, n:].tolist()) == {int(tokens[i, n])}
        assert np.isfinite(p[i, jnp.arange(n + 1), tokens[i, : n + 1]]).all()


def test_a_target_without_what_was_drafted_refuses_it():
    apart = jnp.log(jnp.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.25, 0.75]]))
    rows = 2000
    q, p = jnp.broadcast_to(apart[0], (rows, 1, 4)), jnp.broadcast_to(apart[1], (rows, 2, 4))
    drafted = draw(q, jr.split(jr.key(0), (rows, 1)))
    accepted, tokens = accept_in_jit(drafted, q, p, jr.split(jr.key(1), rows))
    assert not accepted.any()
    assert chi_square(np.bincount(tokens[:, 0], minlength=4), [0, 0, 0.25, 0.75]) > 1e-4


def test_equal_distributions_accept_everything():
    q, p = chains(11, 4, "equal")
    drafted, accepted, tokens = speculate(q, p, jnp.full(DRAWS, 4), jr.key(9), 2)
    assert (accepted == 2).all()
    np.testing.assert_array_equal(tokens[:, :2], drafted)


def test_distributions_equal_but_for_rounding_leave_a_token_of_the_target():
    """A refusal for which nothing of `p - q` is positive."""
    rows = 2000
    q, p = (
        jnp.log(jnp.array([[0.5, 0.5, 0.0, 0.0]])),
        jnp.log(jnp.array([[0.25, 0.25, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]])),
    )
    repeat = lambda x: jnp.broadcast_to(x, (rows, *x.shape))
    drafted = jnp.zeros((rows, 1), jnp.int32)
    accepted, tokens = accept_in_jit(drafted, repeat(q), repeat(p), jr.split(jr.key(0), rows))
    assert chi_square(np.bincount(accepted), [0.5, 0.5]) > 1e-4
    assert set(tokens[accepted == 0, 0].tolist()) == {0, 1}
    assert {tuple(row) for row in tokens[accepted == 1].tolist()} == {(0, 1)}


def test_acceptance_is_the_same_in_jit_and_without():
    q, p = chains(2, 4, "near")
    drafted, keys = jnp.array([[0, 1], [2, 3], [3, 3]], jnp.int32), jr.split(jr.key(0), 3)
    arguments = drafted, jnp.stack([q[:2]] * 3), jnp.stack([p[:3]] * 3), keys
    for plain, jitted in zip(accept(*arguments), accept_in_jit(*arguments)):
        np.testing.assert_array_equal(plain, jitted)


# Errors.


@pytest.mark.parametrize(
    "numbers, error, message",
    [
        ({"temperature": -0.5}, ValueError, "`temperature` must be at least 0.*got -0.5"),
        ({"temperature": math.inf}, ValueError, "finite; got inf"),
        ({"temperature": math.nan}, ValueError, "finite; got nan"),
        ({"top_k": 0}, ValueError, "`top_k` must be at least 1; got 0"),
        ({"top_p": 0}, ValueError, r"`top_p` .* in \(0, 1\]; got 0"),
        ({"top_p": 1.5}, ValueError, r"`top_p` .* in \(0, 1\]; got 1.5"),
        ({"top_p": math.nan}, ValueError, "`top_p` .* got nan"),
        ({"min_p": -0.1}, ValueError, r"`min_p` .* in \(0, 1\]; got -0.1"),
        ({"min_p": 2}, ValueError, r"`min_p` .* in \(0, 1\]; got 2"),
        ({"repetition_penalty": 0}, ValueError, "`repetition_penalty` must be above 0, and finite; got 0"),
        ({"repetition_penalty": math.inf}, ValueError, "`repetition_penalty` .* got inf"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, error, message):
    with pytest.raises(error, match=message):
        Sampler(**numbers)


def test_what_was_seen_is_given_exactly_with_a_penalty():
    logits = jnp.zeros((1, 3))
    with pytest.raises(ValueError, match="none was given, with repetition_penalty=1.2"):
        Sampler(repetition_penalty=1.2).log_probs(logits)
    with pytest.raises(ValueError, match="one was given, with repetition_penalty=None"):
        Sampler().log_probs(logits, jnp.zeros((1, 3), bool))


def test_samplers_do_not_change():
    with pytest.raises(AttributeError):
        Sampler().temperature = 0.5  # pyright: ignore[reportAttributeAccessIssue]
