"""The study of sharing keys and values: what it measures, what it counts, and the whole job."""

import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import rinsx as rx

from .helpers import environment


BENCHMARKS = pathlib.Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _arms
import _text
import compute_matched
import kv_sharing


def setting():
    options = compute_matched.Options(width=16, layers=2, heads=2, length=8, tokens=1600, windows=8, points=1)
    return compute_matched.setting_of(options)


def batch(starts):
    """Random windows of 8 tokens, in which documents start at the given places besides the first."""
    rng = np.random.default_rng(0)
    at = np.arange(8)
    segments = np.array([[sum(s <= i for s in row) for i in at] for row in starts], np.int32)
    positions = np.array([[i - max((s for s in row if s <= i), default=0) for i in at] for row in starts], np.int32)
    tokens, targets = rng.integers(0, 257, (2, len(starts), 8), np.int32)
    weights = np.ones(tokens.shape, np.float32)
    if len(starts) > 1:
        weights[-1, 5:] = 0
    ones = np.ones(tokens.shape, np.int32)
    return {
        "tokens": tokens,
        "targets": targets,
        "segments": segments,
        "positions": positions,
        "weights": weights,
        "bytes": ones,
    }


def test_token_by_token_is_the_forward_pass_across_documents_where_nothing_is_shared():
    model = _arms.build(_arms.arm("A^3 B"), setting(), jr.key(0))
    windows = batch([[], [3], [1, 6], []])
    found = kv_sharing.measure(model, windows)
    nats, sizes = _text.nats_and_bytes(model, jax.tree.map(jnp.asarray, windows), None)
    assert np.allclose(found["nats"], nats, rtol=1e-5) and np.array_equal(found["bytes"], sizes)
    # Of one document, and without padding.
    assert found["single"].tolist() == [True, False, False, False]
    assert found["prompt"]["max"][0] < 1e-4 and found["behind"]["max"][0] < 1e-4
    assert np.isclose(found["behind"]["nats"][0], found["behind"]["nats_by_token"][0], rtol=1e-5)


def test_a_prompt_at_once_is_what_nothing_shared_gives_and_not_the_sequential_policy():
    s, arm = setting(), _arms.arm("A^3 B")
    model, last = (_arms.build(dataclasses.replace(arm, cache=x), s, jr.key(0)) for x in ("per visit", "last 1"))
    windows = batch([[]])
    found = kv_sharing.measure(last, windows)
    log_probs = jax.nn.log_softmax(model(jnp.asarray(windows["tokens"])))

    # The reference: one call a token, without a scan.
    decode = eqx.filter_jit(lambda model, token, cache: model.decode(token, cache))
    cache, steps = last.cache(1, 8), []
    for token in windows["tokens"][0]:
        hidden, cache = decode(last, jnp.array([[token]]), cache)
        steps.append(jax.nn.log_softmax(last.logits(hidden[0, 0])))
    steps = jnp.stack(steps)
    apart = jnp.abs(log_probs[0] - steps)
    assert apart.max() > 1e-3
    assert np.isclose(found["prompt"]["max"][0], apart.max(), rtol=1e-3)
    assert np.isclose(found["prompt"]["mean"][0], apart.mean(), rtol=1e-3)
    assert np.isclose(found["nats"][0], -steps[np.arange(8), windows["targets"][0]].sum(), rtol=1e-5)


def test_bytes_and_contractions_are_what_is_written():
    s = setting()
    arm = _arms.arm("A^3 B")
    found = {
        x: kv_sharing.costs(dataclasses.replace(arm, cache=x), s) for x in ("per visit", "first", "every 2", "last 1")
    }
    plain = kv_sharing.costs(_arms.arm("A B"), s)
    # A slot has keys and values of the width, in float32: of one visit to A and one to B, or of three to A.
    slot = 2 * 16 * 4
    assert plain[0] == found["first"][0] == found["last 1"][0] == 2 * slot
    assert (found["every 2"][0], found["per visit"][0]) == (3 * slot, 4 * slot)
    # Slots are for the rounds that are counted, whatever depths it is evaluated at.
    deep = dataclasses.replace(s, depths=(1, 2, 3, 4, 8))
    assert kv_sharing.costs(_arms.arm("A^2 B, every 2"), deep)[0] == 2 * slot
    assert kv_sharing.costs(_arms.arm("A^3 B, every 2"), deep) == found["every 2"]
    # Each round that does not write saves its two maps.
    saved = 2 * 2 * 16 * 16
    assert found["per visit"][1] - found["first"][1] == 2 * saved
    assert found["per visit"][1] - found["every 2"][1] == saved
    assert found["last 1"][1] == found["per visit"][1]


def test_policies_are_named_behind_a_comma():
    shared = _arms.arm("A^3 B, every 2")
    assert shared == dataclasses.replace(_arms.ARMS["A^3 B"], name="A^3 B, every 2", cache="every 2")
    assert _arms.build(shared, setting(), jr.key(0)).body.loops["r"].cache == rx.cache.Every(2)
    assert _arms.policy("last 3") == rx.cache.Last(3)
    for text, message in (
        ("A^3 B, last 1", "'last 1' is a sequential policy"),
        ("A B, first", "no loop whose number of rounds is named"),
        ("A^3 B, second", "a policy is .* got 'second'"),
    ):
        with pytest.raises(ValueError, match=message):
            _arms.arm(text)


def test_runs_from_before_there_were_policies_keep_their_names():
    s, arm = setting(), _arms.ARMS["A^3 B"]
    fields = {"name": "A^3 B", "signature": "A^r B", "rounds": 3, "options": "plain", "stochastic": False}
    relevant = {**dataclasses.asdict(s), "cache": None, "corpus": None, "elsewhere": None}
    told = json.dumps([fields, relevant, 0, 0.1, "x", rx.__version__, jax.__version__], sort_keys=True, default=str)
    name = _arms.identity(arm, s, 0, 0.1, "x")
    assert name == hashlib.sha256(told.encode()).hexdigest()[:16]
    assert name != _arms.identity(dataclasses.replace(arm, cache="first"), s, 0, 0.1, "x")


def test_an_arm_with_a_policy_learns_at_the_rate_of_the_arm_without():
    found = compute_matched.SWEEPS.rates(compute_matched.Options(), setting(), ["A^3 B", "A^3 B, first"])
    assert found["A^3 B, first"] == found["A^3 B"]


def command(output):
    small = "--width 16 --layers 2 --heads 2 --length 16 --tokens 1600 --windows 16 --points 1 --seeds 2 --depths 3"
    arms = ["--arms", "A B", "A^3 B", "A^3 B, first"]
    words = [*small.split(), "--learning-rate", "0.02", "--workers", "1", "--output", str(output), *arms]
    script = str(BENCHMARKS / "kv_sharing.py")
    return subprocess.run([sys.executable, script, *words], env=environment(), capture_output=True, text=True)


def test_the_job_runs_resumes_and_reports(tmp_path):
    first = command(tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "The smallest difference that this run could have seen" in first.stdout
    record = json.loads((tmp_path / "results.json").read_text("utf-8"))
    rows = {(row["policy"], row["trained"]): row for row in record["rows"]}
    sequential = [("last 1", False), ("last 2", False)]
    assert set(rows) == {
        *(("A B (plain)", True), ("per visit", True), ("first", True), ("first", False), ("every 2", False)),
        *sequential,
    }
    assert all(len(row["bits_per_byte"]) == 2 and row["less_per_visit"]["half"] >= 0 for row in rows.values())
    # Another policy at inference is another loss; and token by token nothing is approximated.
    for name in rows:
        assert name == ("per visit", True) or rows[name]["less_per_visit"]["mean"] != 0
    for control, loss in zip(record["control"], rows["per visit", True]["bits_per_byte"]):
        assert np.isclose(control["bits_per_byte"], loss, rtol=1e-5)
    for name in sequential:
        assert [x["prompt"]["max"] > 1e-4 for x in rows[name]["at_once"]] == [True, True]
    assert (tmp_path / "loss.png").stat().st_size > 10_000

    # What is lost is computed again to the same numbers; what is there is not touched.
    lost = [next((tmp_path / "models").iterdir()), *(tmp_path / "at_inference").glob("*-last-1.json")]
    for path in lost:
        path.unlink()
    kept = {
        path: path.stat().st_mtime_ns for folder in ("runs", "at_inference") for path in (tmp_path / folder).iterdir()
    }
    again = command(tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert all(path.exists() for path in lost)
    changed = [path.stem for path, when in kept.items() if path.stat().st_mtime_ns != when]
    assert changed == [lost[0].stem]
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["rows"] == record["rows"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--arms", "A B", "A^3 B", "(A B)^2, first"], r"under policies, .*got 'A B', 'A\^3 B', '\(A B\)\^2, first'"),
        (["--arms", "A B", "A^3 B, first"], "whose rounds share nothing"),
        (["--tune"], "--tune and --elsewhere are for compute_matched.py"),
    ],
)
def test_what_the_job_cannot_do_is_refused(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["kv_sharing.py", *words])
    with pytest.raises(SystemExit, match=message):
        kv_sharing.main()
