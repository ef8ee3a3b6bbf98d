"""Depth distributions: the exact table, and that it is what is sampled."""

import itertools
import math
from fractions import Fraction

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, strategies as st

import rinsx.depth as depth
from rinsx import _law


TABLES = {
    "fixed": lambda: depth.Fixed(3),
    "fixed_deep": lambda: depth.Fixed(100_000),
    "binomial": lambda: depth.Binomial(3, "4/5"),
    "binomial_inexact": lambda: depth.Binomial(12, Fraction(1, 7)),
    "binomial_never": lambda: depth.Binomial(3, 1),
    "uniform": lambda: depth.Uniform(2, 6),
    "categorical": lambda: depth.Categorical({7: 1, 1: "1/2", 3: Fraction(1, 3), 5: 0}),
    "poisson": lambda: depth.Poisson(4, max=8),
    "poisson_inexact": lambda: depth.Poisson("3.3", max=16),
    "lognormal": lambda: depth.LogNormalPoisson(4, max=16),
}
CURRICULA = {
    "stages": lambda: depth.Curriculum([(0, depth.Fixed(1)), (3, depth.Uniform(1, 4)), (5, depth.Binomial(6, 0.5))]),
    "one_stage": lambda: depth.Curriculum([(0, depth.Uniform(1, 2))]),
    "ramp": lambda: depth.Curriculum.ramp(1, 4, 7),
}

tables = pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
laws = pytest.mark.parametrize("make", [*TABLES.values(), *CURRICULA.values()], ids=[*TABLES, *CURRICULA])


def _draws(law, n, seed=0, step=0):
    sample = lambda key: law.sample(key, step)
    return np.asarray(jax.jit(jax.vmap(sample))(jr.split(jr.key(seed), n)))


# Every law


@laws
def test_is_static_and_hashable(make):
    law = make()
    assert jax.tree.leaves(law) == []
    assert hash(law) == hash(make())
    assert law == make()
    assert law != depth.Fixed(2)


@laws
def test_support_is_increasing_and_positive(make):
    law = make()
    assert law.support[0] >= 1
    assert all(a < b for a, b in itertools.pairwise(law.support))
    assert law.max == law.support[-1]


@laws
def test_sample_is_an_int32_scalar_of_the_support(make):
    law = make()
    for step in (0, jnp.int32(4)):
        eager = law.sample(jr.key(0), step)
        jitted = jax.jit(law.sample)(jr.key(0), step)
        assert eager.shape == jitted.shape == ()
        assert eager.dtype == jitted.dtype == jnp.int32
        assert eager == jitted
        assert int(eager) in law.support


@laws
def test_vmap_samples_as_a_loop_does(make):
    law = make()
    keys = jr.split(jr.key(1), 5)
    together = jax.vmap(lambda key: law.sample(key, 4))(keys)
    assert together.tolist() == [int(law.sample(key, 4)) for key in keys]


@laws
def test_samples_in_a_scan_without_retracing(make):
    law = make()

    @jax.jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def run(key):
        body = lambda step, key: (step + 1, law.sample(key, step))
        return jax.lax.scan(body, jnp.int32(0), jr.split(key, 6))[1]

    keys = jr.split(jr.key(2), 6)
    assert run(jr.key(2)).tolist() == [int(law.sample(k, i)) for i, k in enumerate(keys)]
    run(jr.key(3))


@laws
def test_as_a_jit_argument_compiles_once(make):
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def draw(law, key, step):
        return law.sample(key, step)

    draw(make(), jr.key(0), jnp.int32(0))
    draw(make(), jr.key(1), jnp.int32(9))


@laws
def test_accepts_raw_keys(make):
    law = make()
    assert law.sample(jr.PRNGKey(5), 0) == law.sample(jr.key(5), 0)


# Laws that are the same at every step


@tables
def test_pmf_and_mean_are_exact(make):
    law = make()
    pmf = law.pmf()
    assert tuple(pmf) == law.support
    assert sum(pmf.values()) == 1
    assert all(isinstance(p, Fraction) and p > 0 for p in pmf.values())
    assert isinstance(law.mean(), Fraction)
    assert law.mean() == sum(r * p for r, p in pmf.items())
    assert all(isinstance(w, int) for w in law.weights)
    assert sum(law.weights) < 2**31


@tables
def test_every_draw_below_the_total_is_owned_in_proportion(make):
    # The lookup is exact: where the total is small, all of its draws are tried.
    law = make()
    total = sum(law.weights)
    if total > 100_000:
        edges = np.cumsum([0, *law.weights])
        draws = np.concatenate([edges[:-1], edges[1:] - 1]).astype(np.uint32)
        expected = [*law.support, *law.support]
    else:
        draws = np.arange(total, dtype=np.uint32)
        expected = np.repeat(law.support, law.weights).tolist()
    lookup = jax.vmap(lambda u: _law.lookup(law.support, law.weights, u))
    assert lookup(jnp.asarray(draws)).tolist() == expected


@tables
def test_samples_follow_the_pmf(make):
    law, n = make(), 4000
    values, counts = np.unique(_draws(law, n), return_counts=True)
    seen = dict(zip(values.tolist(), counts.tolist()))
    expected = {r: float(n * p) for r, p in law.pmf().items()}
    assert set(seen) <= set(expected)
    # Bins of less than 5 expected draws are pooled, as the chi-square test asks.
    rare = [r for r, e in expected.items() if e < 5]
    bins = [[r] for r in expected if r not in rare] + ([rare] if rare else [])
    observed = np.array([sum(seen.get(r, 0) for r in b) for b in bins])
    wanted = np.array([sum(expected[r] for r in b) for b in bins])
    chi_square = np.sum((observed - wanted) ** 2 / np.maximum(wanted, 1))
    freedom = len(bins) - 1
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom) + 1e-9


@tables
def test_at_is_the_law_itself(make):
    law = make()
    assert law.at(0) is law
    assert law.at(10**9) is law


@tables
@pytest.mark.parametrize("n", [0, 1, 7, 100])
def test_quota_counts_are_the_nearest_integers(make, n):
    law = make()
    drawn = law.quota(n, jr.key(0))
    assert drawn.shape == (n,) and drawn.dtype == jnp.int32
    counts = {r: drawn.tolist().count(r) for r in law.support}
    assert sum(counts.values()) == n
    for r, p in law.pmf().items():
        assert abs(counts[r] - n * p) < 1


@tables
def test_quota_depends_on_the_key_in_order_only(make):
    law = make()
    one, two = law.quota(50, jr.key(0)), law.quota(50, jr.key(1))
    assert sorted(one.tolist()) == sorted(two.tolist())
    assert len(law.support) == 1 or one.tolist() != two.tolist()
    jitted = jax.jit(law.quota, static_argnums=0)(50, jr.key(0))
    assert jitted.tolist() == one.tolist()


def test_integral_quota_costs_what_is_expected():
    law = depth.Binomial(3, "4/5")
    drawn = law.quota(50, jr.key(0)).tolist()
    assert Fraction(sum(drawn), 50) == law.mean()
    assert [drawn.count(r) for r in (1, 2, 3)] == [32, 16, 2]


def test_negative_quota_is_refused():
    with pytest.raises(ValueError, match="-1"):
        depth.Fixed(1).quota(-1, jr.key(0))


# The sampler


@pytest.mark.parametrize("total", [1, 2, 3, 5, 64])
def test_below_is_uniform(total):
    keys = jr.split(jr.key(0), 3000)
    draws = jax.vmap(lambda key: _law.below(total, key))(keys)
    counts = np.bincount(np.asarray(draws), minlength=total)
    assert len(counts) == total
    expected = 3000 / total
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert chi_square <= (total - 1) + 5 * math.sqrt(2 * total)


def test_below_has_no_modulo_bias():
    # 32 bits modulo this total give the lower two thirds with probability 3/4.
    keys = jr.split(jr.key(0), 4000)
    draws = jax.vmap(lambda key: _law.below(3 * 2**29, key))(keys)
    assert abs(np.mean(np.asarray(draws) < 2**30) - 2 / 3) < 0.03


@given(
    st.lists(st.integers(0, 10**30), min_size=1, max_size=8).filter(any),
    st.integers(0, 10**6),
)
def test_apportion_is_by_largest_remainder(weights, total):
    shares = _law.apportion(weights, total)
    assert sum(shares) == total
    exact = [Fraction(w * total, sum(weights)) for w in weights]
    assert all(math.floor(e) <= s <= math.ceil(e) for s, e in zip(shares, exact))
    up = [e - math.floor(e) for s, e in zip(shares, exact) if s > math.floor(e)]
    down = [e - math.floor(e) for s, e in zip(shares, exact) if s == math.floor(e)]
    assert not up or not down or min(up) >= max(down)


@given(
    st.dictionaries(st.integers(1, 50), st.fractions(0, 10, max_denominator=20), min_size=1).filter(
        lambda w: any(w.values())
    )
)
def test_categorical_is_proportional_or_apportioned(weights):
    law = depth.Categorical(weights)
    total = sum(weights.values())
    exact = {r: w / total for r, w in weights.items() if w > 0}
    if sum(law.weights) == 2**30:
        assert set(law.support) <= set(exact)
        error = [abs(law.pmf().get(r, 0) - p) for r, p in exact.items()]
        assert max(error) < Fraction(1, 2**30)
    else:
        assert law.pmf() == {r: exact[r] for r in sorted(exact)}


# Each law against its formula


@given(st.integers(1, 20), st.fractions(0, 1, max_denominator=10))
def test_binomial(largest, skip):
    law = depth.Binomial(largest, skip)
    n = largest - 1
    exact = {1 + k: math.comb(n, k) * (1 - skip) ** k * skip ** (n - k) for k in range(n + 1)}
    error = [abs(law.pmf().get(r, 0) - p) for r, p in exact.items()]
    if skip.denominator**n < 2**31:
        assert max(error) == 0
        assert law.mean() == 1 + n * (1 - skip)
    else:
        assert sum(law.weights) == 2**30
        assert max(error) < Fraction(1, 2**30)


def test_binomial_reads_every_kind_of_number():
    law = depth.Binomial(3, Fraction(4, 5))
    assert law == depth.Binomial(3, "4/5")
    assert law == depth.Binomial(3, "0.8")
    assert law == depth.Binomial(3, 0.8)
    assert law.pmf() == {1: Fraction(16, 25), 2: Fraction(8, 25), 3: Fraction(1, 25)}
    assert depth.Binomial(3, 0).pmf() == {3: 1}
    assert depth.Binomial(3, 1).pmf() == {1: 1}


def test_uniform():
    law = depth.Uniform(2, 5)
    assert law.pmf() == {r: Fraction(1, 4) for r in (2, 3, 4, 5)}
    assert depth.Uniform(3, 3).pmf() == {3: 1}


def test_categorical_sorts_and_drops_zeros():
    law = depth.Categorical({4: 0.1, 2: 0, 1: "1/5"})
    assert law.pmf() == {1: Fraction(2, 3), 4: Fraction(1, 3)}


@pytest.mark.parametrize("mean, largest", [(1, 5), (2, 3), (4, 16), (2.5, 40)])
def test_poisson(mean, largest):
    law = depth.Poisson(mean, largest)
    rate = mean - 1
    density = [math.exp(-rate) * rate**k / math.factorial(k) for k in range(largest)]  # k = r - 1
    exact = np.array(density) / sum(density)
    ours = [float(law.pmf().get(1 + k, 0)) for k in range(largest)]
    np.testing.assert_allclose(ours, exact, rtol=1e-6, atol=2**-30)


def test_poisson_loses_little_mean_where_max_is_far():
    assert abs(float(depth.Poisson(4, max=40).mean()) - 4) < 1e-6


def test_poisson_of_small_weights_is_exact():
    # Rate 2 at k = 0, ..., 3: 1, 2, 2, 4/3.
    weights = {1: Fraction(1), 2: Fraction(2), 3: Fraction(2), 4: Fraction(4, 3)}
    total = sum(weights.values())
    pmf = depth.Poisson(3, max=4).pmf()
    assert pmf == {r: w / total for r, w in weights.items()}


@pytest.mark.parametrize("mean, sigma, largest", [(4, 0.5, 20), (32, 0.5, 64), (2, 2, 30), (0.5, 4, 5)])
def test_lognormal_poisson_by_simpson_over_tau(mean, sigma, largest):
    # Another rule over another variable (u = log tau), normalised by itself.
    u = np.linspace(-60, 60, 240_001)
    mu = math.log(mean) - sigma**2 / 2
    simpson = np.ones_like(u)
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    gauss = simpson * np.exp(-(((u - mu) / sigma) ** 2) / 2)
    density = [np.sum(gauss * np.exp(k * u - np.exp(u) - math.lgamma(k + 1))) for k in range(largest)]
    law = depth.LogNormalPoisson(mean, sigma, max=largest)
    ours = [float(law.pmf().get(1 + k, 0)) for k in range(largest)]
    np.testing.assert_allclose(ours, density / np.sum(density), atol=2**-29, rtol=1e-6)


def test_lognormal_poisson_by_monte_carlo():
    rng, n = np.random.default_rng(0), 200_000
    tau = np.exp(rng.normal(math.log(8) - 0.125, 0.5, n))
    rounds = 1 + rng.poisson(tau)
    rounds = rounds[rounds <= 24]
    law = depth.LogNormalPoisson(8, max=24)
    seen = np.bincount(rounds, minlength=25)[1:] / len(rounds)
    np.testing.assert_allclose([float(p) for p in law.pmf().values()], seen, atol=5e-3)
    assert abs(float(law.mean()) - rounds.mean()) < 0.05


def test_lognormal_poisson_mean_is_one_above_where_max_is_far():
    law = depth.LogNormalPoisson(8, max=400)
    assert abs(float(law.mean()) - 9) < 1e-5


def test_lognormal_poisson_without_spread_is_poisson():
    ours, poisson = depth.LogNormalPoisson(3, 0, max=12), depth.Poisson(4, max=12)
    for r, p in poisson.pmf().items():
        assert abs(ours.pmf()[r] - p) < Fraction(1, 2**29)


# Curricula


def test_curriculum_changes_at_its_boundaries():
    one, two, three = depth.Fixed(1), depth.Uniform(1, 4), depth.Fixed(9)
    law = depth.Curriculum([(0, one), (10, two), (20, three)])
    assert [law.at(s) for s in (0, 9, 10, 19, 20, 10**9)] == [
        one,
        one,
        two,
        two,
        three,
        three,
    ]
    assert law.at(np.int64(10)) == two
    assert law.support == (1, 2, 3, 4, 9)
    assert law.max == 9


@pytest.mark.parametrize("make", CURRICULA.values(), ids=CURRICULA)
def test_curriculum_samples_the_law_of_the_step(make):
    law = make()
    sample = jax.jit(law.sample)
    for step in range(9):
        key = jr.key(step)
        expected = law.at(step).sample(key)
        assert law.sample(key, step) == expected
        assert sample(key, step) == expected
        assert law.sample(key, np.int64(step)) == expected


def test_ramp_is_linear():
    law = depth.Curriculum.ramp(2, 6, 10)
    for step in range(25):
        assert law.at(step) == depth.Fixed(2 + (4 * min(step, 10)) // 10)
    assert depth.Curriculum.ramp(3, 3, 0).at(0) == depth.Fixed(3)


def test_curriculum_without_a_step_is_refused():
    law = depth.Curriculum.ramp(1, 3, 10)
    for ask in (
        lambda: law.pmf(),
        lambda: law.mean(),
        lambda: law.weights,
        lambda: law.quota(3, jr.key(0)),
        lambda: law.sample(jr.key(0)),
    ):
        with pytest.raises(ValueError, match=r"\.at\(step\)"):
            ask()


# Errors


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: depth.Fixed(0), "got 0"),
        (lambda: depth.Fixed(2**31), str(2**31)),
        (lambda: depth.Binomial(0, "1/2"), "got 0"),
        (lambda: depth.Binomial(5000, "1/2"), "5000"),
        (lambda: depth.Binomial(3, "3/2"), "3/2"),
        (lambda: depth.Binomial(3, -0.1), "-0.1"),
        (lambda: depth.Binomial(3, "often"), "often"),
        (lambda: depth.Binomial(3, "1/0"), "1/0"),
        (lambda: depth.Binomial(3, math.nan), "nan"),
        (lambda: depth.Uniform(3, 2), "3 and 2"),
        (lambda: depth.Uniform(0, 2), "got 0"),
        (lambda: depth.Categorical({}), "{}"),
        (lambda: depth.Categorical({1: 0}), "{1: 0}"),
        (lambda: depth.Categorical({1: 2, 2: -1}), "-1"),
        (lambda: depth.Categorical({0: 1}), "got 0"),
        (lambda: depth.Poisson("1/2", 4), "1/2"),
        (lambda: depth.Poisson(2, 0), "got 0"),
        (lambda: depth.LogNormalPoisson(0, max=4), "got 0"),
        (lambda: depth.LogNormalPoisson(9, max=4), "got 9"),
        (lambda: depth.LogNormalPoisson(2, -1, max=4), "-1"),
        (lambda: depth.LogNormalPoisson(2, math.inf, max=4), "inf"),
        (lambda: depth.Curriculum([]), r"\[\]"),
        (lambda: depth.Curriculum([(1, depth.Fixed(1))]), r"\[1\]"),
        (
            lambda: depth.Curriculum([(0, depth.Fixed(1)), (0, depth.Fixed(2))]),
            r"\[0, 0\]",
        ),
        (
            lambda: depth.Curriculum([(0, depth.Curriculum.ramp(1, 2, 3))]),
            "list its stages",
        ),
        (lambda: depth.Curriculum.ramp(3, 2, 9), "3 and 2"),
        (lambda: depth.Curriculum.ramp(1, 5, 3), "got 3"),
        (lambda: depth.Curriculum.ramp(1, 5, 9).at(-1), "-1"),
    ],
)
def test_bad_values_are_printed(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_all_is_complete():
    laws = {
        name
        for name, value in vars(depth).items()
        if isinstance(value, type) and issubclass(value, depth.AbstractLaw) and not name.startswith("_")
    }
    assert set(depth.__all__) == laws
