"""The training loop against loops written by hand with optax."""

import functools as ft
import json
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from hypothesis import given, strategies as st

import rinsx as rx
from rinsx.train import _fit as training, _step as stepping
from rinsx.train._step import gradient


CONFIG = rx.models.DecoderConfig(31, 16, 2, 2, hidden=24, context=8, dtype="float32")
LOSS = rx.models.DecoderLM.loss
KEY = jr.key(7)


@ft.cache
def looped(max=None):
    return rx.models.DecoderLM(CONFIG, "A^r B", r=rx.Loop(2, max=max), key=jr.key(0))


def data(steps, rows=2, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(31, size=(steps, rows, 9)).astype(np.int32)
    weights = rng.integers(4, size=(steps, rows, 8)).astype(np.float32)
    return [{"tokens": t[:, :-1], "targets": t[:, 1:], "weights": w} for t, w in zip(tokens, weights)]


class Layer(eqx.Module):
    weight: jax.Array

    def __init__(self, key):
        self.weight = jr.normal(key, (3, 3)) / 2

    def __call__(self, x):
        return x + jnp.tanh(x @ self.weight)


@ft.cache
def toy(max=None):
    """What compiles faster than a decoder."""
    keys = jr.split(jr.key(0))
    return rx.compose("A^r B", {"A": Layer(keys[0]), "B": Layer(keys[1])}, r=rx.Loop(2, max=max))


def toy_loss(model, batch, key):
    """Shows which key it was given."""
    x, y, weight = batch
    rows = jnp.sum((model(x)[:, :2] - y) ** 2, axis=1)
    return jnp.sum(weight * rows) * (1 + 0.1 * jr.normal(key)), jnp.sum(weight)


class Recorded(rx.train.AbstractLog):
    def __init__(self):
        self.lines, self.closed = [], False

    def write(self, step, metrics):
        self.lines.append((step, dict(metrics)))

    def close(self):
        self.closed = True

    def column(self, name):
        return [metrics[name] for _, metrics in self.lines if name in metrics]


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(eqx.filter(tree, eqx.is_array))]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(arrays(a), arrays(b), strict=True))


def close(a, b, atol=1e-5):
    return all(np.allclose(x, y, atol=atol) for x, y in zip(arrays(a), arrays(b), strict=True))


# A regression: the loss is no language model's, the batch a pair, NumPy's float64.
MLP = eqx.nn.MLP(3, 2, 8, depth=1, key=jr.key(1))


def squares(model, batch, key):
    del key
    x, y, weight = batch
    return jnp.sum(weight * jnp.sum((jax.vmap(model)(x) - y) ** 2, axis=1)), jnp.sum(weight)


def points(steps, rows=4, seed=0):
    rng = np.random.default_rng(seed)
    pick = lambda *shape: rng.normal(size=shape)
    return [(pick(rows, 3), pick(rows, 2), rng.random(rows) + 0.5) for _ in range(steps)]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_step_is_compiled_once(sharded, monkeypatch, caplog):
    mesh = rx.train.mesh() if sharded else None
    released, compiled = [], []
    monkeypatch.setattr(stepping, "release", lambda: released.append(len(compiled)))
    first = stepping.run

    def run(*args):
        caplog.clear()
        with jax.log_compiles():
            out = first(*args)
        compiled.extend(line for line in caplog.messages if "XLA compilation" in line and "lambda" in line)
        return out

    monkeypatch.setattr(training, "run", run)
    rx.train.fit(MLP, squares, points(3, rows=8), optax.sgd(0.1), steps=3, key=KEY, mesh=mesh)
    assert released == [0, 0] and compiled == []


@given(
    st.sampled_from([1, 2, 4]),
    st.lists(st.floats(0, 100, width=32), min_size=4, max_size=4),
)
def test_accumulation_is_the_whole_batch(parts, weights):
    x, y, _ = points(1)[0]
    batch = tuple(jnp.asarray(a, jnp.float32) for a in (x, y, weights))

    def mean(model):
        total, weight = squares(model, batch, None)
        return total / jnp.where(weight == 0, 1, weight)

    want_loss, want = eqx.filter_value_and_grad(mean)(MLP)
    found, value, weight = _gradient(parts)(MLP, batch)
    assert np.isclose(weight, np.sum(np.float32(weights)), rtol=1e-5)
    assert np.isclose(value, want_loss, rtol=1e-5)
    assert close(found, want)


@ft.cache
def _gradient(parts):
    return eqx.filter_jit(lambda model, batch: gradient(squares, model, batch, KEY, parts))


def test_accumulation_adds_up_in_float32():
    """512 gradients of one thousandth each: bfloat16 stops growing at about a quarter."""
    loss = lambda w, batch, key: (jnp.sum(w * batch), 1)
    grads, _, weight = gradient(loss, jnp.bfloat16(0), jnp.full(512, 1e-3, jnp.bfloat16), KEY, 512)
    assert weight == 512
    assert grads.dtype == jnp.bfloat16
    assert np.isclose(float(grads), float(jnp.bfloat16(1e-3)), rtol=1e-2)


def test_parts_have_keys_of_their_own():
    loss = lambda w, batch, key: (w * jnp.sum(batch) * jr.normal(key), batch.size)
    grads, _, _ = gradient(loss, jnp.float32(0), jnp.ones(6), KEY, 3)
    assert np.isclose(grads, np.mean([jr.normal(jr.fold_in(KEY, i)) for i in range(3)]))


def by_hand(model, loss, batches, optimizer, key, rounds=None, fractions=None):
    """The plainest loop: one step at a time, whole batches, static depths."""

    @eqx.filter_jit
    def grad(model, batch, key, rounds):
        def mean(model):
            total, weight = loss(model if rounds is None else rx.with_rounds(model, r=rounds), batch, key)
            return total / weight

        return eqx.filter_value_and_grad(mean)(model)

    update = eqx.filter_jit(optimizer.update)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    losses = []
    for step, batch in enumerate(batches):
        batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32 if x.dtype == float else None), batch)
        value, grads = grad(model, batch, jr.fold_in(key, step), None if rounds is None else rounds[step])
        extra = {} if fractions is None else {"fraction": jnp.float32(fractions[step])}
        updates, state = update(grads, state, eqx.filter(model, eqx.is_inexact_array), **extra)
        model = eqx.apply_updates(model, updates)
        losses.append(float(value))
    return model, losses


def noisy(model, batch, key):
    """A loss that shows which key it was given."""
    total, weight = LOSS(model, batch, key)
    return total * (1 + 0.1 * jr.normal(key)), weight


def test_equals_a_loop_by_hand():
    model, log = looped(), Recorded()
    batches = data(3, rows=2)
    optimizer = rx.train.adamw(rx.train.cosine(1e-2, warmup=0.5), clip=0.1)
    depth = [1, 2, 2]
    run = rx.train.fit(model, noisy, batches, optimizer, steps=3, key=KEY, depth={"r": depth}, logs=[log])
    cost = lambda r: rx.train.cost(noisy, model, batches[0], r=r).matmul
    spent = np.cumsum([0, *(cost(r) for r in depth)])
    want, losses = by_hand(model, noisy, batches, optimizer, KEY, depth, spent / spent[-1])
    assert np.allclose(log.column("loss"), losses, rtol=1e-5)
    assert close(run.model, want)
    assert not close(run.model, model, 1e-4)
    assert run.flops == spent[-1] == rx.flops.spent(cost, r=depth)
    assert log.column("flops") == spent[1:].tolist()
    assert log.column("fraction") == (spent[1:] / spent[-1]).tolist()
    assert log.column("rounds_r") == depth
    assert np.allclose(log.column("tokens"), np.cumsum([b["weights"].sum() for b in batches]))
    assert run.step == 3 and run.stopped is None
    assert not log.closed


def test_any_loss_and_any_optax():
    batches, log = points(5), Recorded()
    optimizer = optax.adam(1e-2)
    run = rx.train.fit(MLP, squares, batches, optimizer, steps=5, key=KEY, logs=[log], accumulate=2, steps_per_call=2)
    want, losses = by_hand(MLP, squares, batches, optimizer, KEY)
    assert close(run.model, want)
    sizes = [np.sum(batch[2]) for batch in batches]
    pairs = [np.average(losses[i : i + 2], weights=sizes[i : i + 2]) for i in (0, 2, 4)]
    assert np.allclose(log.column("loss"), pairs, rtol=1e-5)
    assert [step for step, _ in log.lines] == [2, 4, 5]


def test_weights_below_one_are_divided_by():
    batches = [(x, y, weight / 1000) for x, y, weight in points(2)]
    log = Recorded()
    rx.train.fit(MLP, squares, batches, optax.sgd(1e-2), steps=2, key=KEY, logs=[log])
    _, losses = by_hand(MLP, squares, batches, optax.sgd(1e-2), KEY)
    assert np.allclose(log.column("loss"), losses, rtol=1e-4)


def test_steps_per_call_change_nothing():
    """Also with steps left over, and with calls cut short by evaluations."""
    model, batches = toy(), points(7)
    law = rx.depth.Uniform(1, 2)
    optimizer = rx.train.muon(rx.train.cosine(1e-2))
    runs = []
    for number, every in ((1, None), (3, None), (3, 2)):
        seen = []
        run = rx.train.fit(
            model,
            toy_loss,
            batches,
            optimizer,
            steps=7,
            key=KEY,
            depth={"r": law},
            steps_per_call=number,
            evaluate=lambda model: seen.append(arrays(model)) or {"n": len(seen)},
            evaluate_every=every,
        )
        assert len(seen) == (1 if every is None else 4)
        assert run.metrics == {"n": len(seen)}
        assert all(np.array_equal(a, b) for a, b in zip(seen[-1], arrays(run.model), strict=True))
        runs.append(run)
    for run in runs[1:]:
        assert same(run.model, runs[0].model)
        assert same(run.state, runs[0].state)
        assert run.flops == runs[0].flops


def test_compiles_once():
    traced = []

    def loss(model, batch, key):
        traced.append(None)
        return squares(model, batch, key)

    def fit(steps):
        traced.clear()
        evaluate = lambda model: {}
        optimizer = optax.sgd(1e-2)
        batches = points(steps)
        given = {"steps": steps, "key": KEY, "steps_per_call": 2, "evaluate": evaluate, "evaluate_every": 3}
        rx.train.fit(MLP, loss, batches, optimizer, **given)
        return len(traced)

    few = fit(2)
    assert fit(11) == few


def test_one_draw_a_step():
    """A function of key and step alone: neither of how many steps there are, nor of how they are grouped."""
    law = rx.depth.Uniform(1, 3)

    def draws(steps, key=KEY, **options):
        log = Recorded()
        batches = points(steps)
        model = toy(3)
        fit = rx.train.fit(model, toy_loss, batches, SGD, steps=steps, key=key, depth={"r": law}, logs=[log], **options)
        return log.column("rounds_r"), fit

    long, run = draws(8)
    assert draws(5)[0] == long[:5]
    assert draws(8, jr.key(1))[0] != long
    assert len(set(long)) > 1
    # One program with traced rounds: the same draws, FLOPs of what it computes twice, the same weights.
    again, traced = draws(8, specialise=1)
    assert again == long
    assert close(traced.model, run.model)
    cost = lambda r: rx.train.cost(toy_loss, toy(3), points(1)[0], r=r).matmul
    assert run.flops == rx.flops.spent(cost, r=[int(r) for r in long])
    assert traced.flops >= run.flops


SGD = optax.sgd(1e-2)


def test_a_curriculum_is_asked_step_by_step():
    law = rx.depth.Curriculum([(0, rx.depth.Fixed(1)), (2, rx.depth.Fixed(2))])
    log = Recorded()
    rx.train.fit(toy(), toy_loss, points(4), SGD, steps=4, key=KEY, depth={"r": law}, logs=[log])
    assert log.column("rounds_r") == [1, 1, 2, 2]


def test_the_cost_of_a_quota_is_known_before():
    law = rx.depth.Binomial(2, skip="1/4")
    quota = np.asarray(law.quota(8, KEY))
    model, batches = toy(), points(8)
    cost = lambda r: rx.train.cost(toy_loss, model, batches[0], r=r).matmul
    run = rx.train.fit(model, toy_loss, batches, SGD, steps=8, key=KEY, depth={"r": quota}, steps_per_call=4)
    assert run.flops == 8 * rx.flops.expected(cost, r=law)


def test_the_optimizer_is_told_the_fraction():
    def update(updates, state, params=None, *, fraction):
        step, seen = state
        return jax.tree.map(jnp.zeros_like, updates), (step + 1, seen.at[step].set(fraction))

    told = optax.GradientTransformationExtraArgs(lambda params: (jnp.int32(0), jnp.zeros(6)), update)
    depth = [1, 2, 1, 1, 2, 2]
    model, batches = toy(), points(6)
    cost = lambda r: rx.train.cost(toy_loss, model, batches[0], r=r).matmul
    want = np.cumsum([0, *(cost(r) for r in depth)])
    for number in (1, 4):
        given = {"steps": 6, "key": KEY, "depth": {"r": depth}, "steps_per_call": number}
        run = rx.train.fit(model, toy_loss, batches, optax.chain(optax.identity(), told), **given)
        assert np.array_equal(run.state[1][1], (want[:-1] / want[-1]).astype(np.float32))


def test_without_contractions_the_fraction_is_of_steps():
    loss = lambda w, batch, key: (jnp.sum(w * batch), 1)
    log = Recorded()
    run = rx.train.fit(jnp.ones(3), loss, [np.ones((1, 3), np.float32)] * 4, SGD, steps=4, key=KEY, logs=[log])
    assert run.flops == 0
    assert log.column("fraction") == [0.25, 0.5, 0.75, 1]


def test_what_is_not_trained_stays():
    class Model(eqx.Module):
        weight: jax.Array
        table: jax.Array
        keys: jax.Array
        name: str

    model = Model(jnp.ones(2), jnp.arange(2), jr.split(KEY), "name")
    loss = lambda m, batch, key: (jnp.sum(m.weight * batch * (1 + m.table)) + 0 * jr.normal(m.keys[0]), batch.size)
    run = rx.train.fit(model, loss, [np.ones((1, 2))] * 2, SGD, steps=2, key=KEY)
    assert run.model.name == "name"
    assert np.array_equal(run.model.table, [0, 1])
    assert (run.model.keys == model.keys).all()
    assert np.allclose(run.model.weight, 1 - 2 * 1e-2 * np.array([1, 2]) / 2)


def test_weights_keep_their_dtype():
    """An update in float32 of a weight in bfloat16."""
    wide = optax.stateless(lambda updates, params: jax.tree.map(lambda g: -0.5 * g.astype(jnp.float32), updates))
    loss = lambda w, batch, key: (jnp.sum(w * batch), batch.size)
    run = rx.train.fit(jnp.ones(2, jnp.bfloat16), loss, [np.ones((2, 2), np.float32)] * 2, wide, steps=2, key=KEY)
    assert run.model.dtype == jnp.bfloat16
    assert np.allclose(run.model.astype(jnp.float32), 0.5)


def test_nothing_of_the_callers_is_written_over():
    """Not the model, also where an optimiser keeps it as its state, nor what an evaluation keeps."""
    keeps = optax.GradientTransformation(lambda params: params, lambda u, s, p=None: (u, jax.tree.map(jnp.add, s, u)))
    before = arrays(MLP)
    before = [x.copy() for x in before]
    kept = []
    rx.train.fit(
        MLP,
        squares,
        points(6),
        optax.chain(optax.sgd(0.1), keeps),
        steps=6,
        key=KEY,
        evaluate=lambda model: kept.append(model) or {},
        evaluate_every=2,
    )
    assert all(np.array_equal(a, b) for a, b in zip(arrays(MLP), before, strict=True))
    assert len(kept) == 3
    assert not same(kept[0], kept[1])
    assert not same(kept[1], kept[2])


def test_data_is_fetched_while_a_call_runs(monkeypatch):
    """With devices that take their time, a call is waited for once the next one has its data and has begun."""
    events = []
    run = training.run

    class Late:
        def is_ready(self):
            return False

        def __array__(self, *args, **kwargs):
            events.append("wait")
            return np.array(False)

    def late(*args):
        events.append("begin")
        trained, (record, _) = run(*args)
        return trained, (record, Late())

    def batches():
        for i, batch in enumerate(points(4)):
            events.append(f"batch {i}")
            yield batch

    monkeypatch.setattr(training, "run", late)
    rx.train.fit(MLP, squares, batches(), SGD, steps=4, key=KEY)
    # The first call is not timed, and nothing is begun before it ends.
    want = "batch 0, begin, wait, batch 1, begin, batch 2, begin, wait, batch 3, begin, wait, wait"
    assert ", ".join(events) == want


def test_iterators_are_closed_by_whom_opened_them():
    class Stream:
        def __init__(self):
            self.left, self.closed = points(3), False

        def __iter__(self):
            return self

        def __next__(self):
            return self.left.pop()

        def close(self):
            self.closed = True

    class Source:
        def __iter__(self):
            self.stream = Stream()
            return self.stream

    source, stream = Source(), Stream()
    rx.train.fit(MLP, squares, source, SGD, steps=2, key=KEY)
    rx.train.fit(MLP, squares, stream, SGD, steps=2, key=KEY)
    assert source.stream.closed
    assert not stream.closed


def test_a_loss_that_is_not_finite_stops():
    batches = points(6)
    batches[3] = (batches[3][0] * np.inf, *batches[3][1:])
    log = Recorded()
    with pytest.raises(rx.train.NonFiniteLoss, match="step 3: the loss is (nan|inf).*no checkpoint.*learning rate"):
        rx.train.fit(MLP, squares, batches, SGD, steps=6, key=KEY, logs=[log], steps_per_call=2)
    assert [step for step, _ in log.lines] == [2]
    assert all(math.isfinite(x) for x in log.column("loss"))


def test_weights_that_are_not_finite_stop():
    with pytest.raises(rx.train.NonFiniteLoss, match="step 1: the update made weights that are infinite"):
        rx.train.fit(MLP, squares, points(2), optax.chain(optax.sgd(1.0), LATE), steps=2, key=KEY)


# Infinite in its second step.
LATE = optax.GradientTransformation(
    lambda params: jnp.float32(0),
    lambda updates, state, params=None: (
        jax.tree.map(lambda u: jnp.where(state > 0, jnp.inf, u), updates),
        state + 1,
    ),
)


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (ValueError, "`steps` must be at least 1; got 0", {"steps": 0}),
        (ValueError, "`accumulate` must be at least 1; got 0", {"accumulate": 0}),
        (ValueError, "`evaluate_every` must be at least 1", {"evaluate_every": 0}),
        (ValueError, "`specialise` must be at least 0", {"specialise": -1}),
        (ValueError, "the data ends at step 2", {"steps": 3}),
        (ValueError, "rows.*multiple of accumulate=3", {"accumulate": 3}),
        (ValueError, r"`depth\['r'\]`.*each of 2 steps.*\(3,\)", {"depth": {"r": [1, 2, 1]}}),
        (ValueError, r"`depth\['r'\]`.*float64", {"depth": {"r": np.ones(2)}}),
        (ValueError, "at least 1, got 0", {"depth": {"r": [0, 1]}}),
        (ValueError, "no loop of this model is named q", {"depth": {"q": 1}}),
        (ValueError, "max", {"depth": {"r": rx.depth.Uniform(1, 2)}, "specialise": 0}),
    ],
)
def test_what_is_refused(error, match, options):
    with pytest.raises(error, match=match):
        rx.train.fit(toy(), toy_loss, points(2), SGD, **{"steps": 2, "key": KEY, **options})


def test_refuses_batches_of_other_shapes():
    short = [*points(1), *points(1, rows=3)]
    with pytest.raises(ValueError, match=r"(?s)one shape; got .*\(3, 3\).* at step 1.*\(4, 3\)"):
        rx.train.fit(toy(), toy_loss, short, SGD, steps=2, key=KEY)
    with pytest.raises(ValueError, match="rows as their first axis"):
        rx.train.fit(toy(), toy_loss, [np.int32(3)], SGD, steps=1, key=KEY)


def test_refuses_a_loss_of_rows():
    rows = lambda model, batch, key: (jnp.sum((jax.vmap(model)(batch[0]) - batch[1]) ** 2, axis=1), batch[2])
    with pytest.raises(ValueError, match=r"two scalars, `\(total, weight\)`"):
        rx.train.fit(MLP, rows, points(1), SGD, steps=1, key=KEY)


def rows_of(model, batch, key):
    """A number a row."""
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    single = lambda row: LOSS(model, {name: x[None] for name, x in row.items()}, key)
    return jax.vmap(single)(batch)


@pytest.mark.parametrize(
    ("gradient", "unroll"), [(None, None), (rx.gradient.Full(), True), (rx.gradient.Last(1), None)]
)
def test_evaluates_at_any_depth(gradient, unroll):
    """As static rounds do, also past what was trained, in one program."""
    loop = rx.Loop(2, max=2, gradient=gradient, unroll=unroll)
    model = rx.models.DecoderLM(CONFIG, "A^r B", r=loop, key=jr.key(0))
    batches = data(3)
    traced = []

    def loss(model, batch, key):
        traced.append(None)
        return rows_of(model, batch, key)

    found = rx.train.evaluate(model, loss, batches, rounds={"r": [1, 2, 5, 2]})
    assert len(traced) == 1
    assert list(found) == [(1,), (2,), (5,)]
    for (r,), totals in found.items():
        deep = rx.with_rounds(model, r=r)
        each = [eqx.filter_jit(rows_of)(deep, batch, KEY) for batch in batches]
        total, weight = np.swapaxes(np.asarray(each), 0, 1)
        assert totals.total.shape == (3, 2)
        assert np.allclose(totals.total, total, rtol=1e-5)
        assert np.isclose(totals.mean, total.sum() / weight.sum())


def test_evaluates_a_model_as_it_is():
    batches = points(2)
    found = rx.train.evaluate(toy(), toy_loss, batches, key=KEY)
    want = [toy_loss(toy(), batch, jr.fold_in(KEY, i)) for i, batch in enumerate(batches)]
    assert list(found) == [()]
    assert np.allclose(found[()].total, [float(total) for total, _ in want], rtol=1e-5)
    assert np.array_equal(found[()].weight, [float(weight) for _, weight in want])


def test_evaluates_every_combination():
    model = rx.compose("(A^r B)^s", {"A": rx.lift(lambda x: x + 1), "B": rx.lift(lambda x: 2 * x)}, r=1, s=1)
    loss = lambda model, batch, key: (jnp.sum(model(batch)), batch.size)
    found = rx.train.evaluate(model, loss, [np.zeros(1, np.float32)], rounds={"s": [1, 2], "r": (3,)})
    assert {depth: totals.mean for depth, totals in found.items()} == {(1, 3): 6, (2, 3): 18}


def test_what_an_evaluation_refuses():
    with pytest.raises(ValueError, match="no batches"):
        rx.train.evaluate(MLP, squares, [])
    with pytest.raises(ValueError, match=r"`rounds\['r'\]`.*got \[\]"):
        rx.train.evaluate(toy(), toy_loss, points(1), rounds={"r": []})
    with pytest.raises(ValueError, match="no loop of this model is named q"):
        rx.train.evaluate(toy(), toy_loss, points(1), rounds={"q": [1]})
    with pytest.raises(ValueError, match="at least 1, got 0"):
        rx.train.evaluate(toy(), toy_loss, points(1), rounds={"r": [0]})
    with pytest.raises(ValueError, match="add up to 0"):
        _ = rx.train.Totals(np.zeros(2, np.float32), np.zeros(2, np.float32)).mean


def test_the_lines_of_a_run(tmp_path):
    log = rx.train.JsonLines(tmp_path / "metrics.jsonl")
    rx.train.fit(MLP, squares, points(3), SGD, steps=3, key=KEY, logs=[log], evaluate=lambda model: {"score": 2})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 3]
    assert lines[-1] == {"step": 3, "score": 2}
    assert "tokens_per_second" not in lines[0]
    assert lines[1]["tokens_per_second"] > 0
