"""The arms of a comparison: which recursion, at which depths it trains, and how it is trained once."""

import dataclasses
import functools as ft
import hashlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from _text import bits_per_byte, Evaluator, load

import rinsx as rx


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to recurse: a signature whose exponent `r` is what training sets, and how to set it."""

    name: str
    signature: str
    rounds: int | None = None
    options: Literal["plain", "latent", "adapter"] = "plain"
    stochastic: bool = False
    cache: str = "per visit"
    """Which keys and values the rounds share, as `policy` reads it."""


ARMS = {
    arm.name: arm
    for arm in (
        Arm("A B", "A B"),
        Arm("A^2 B", "A^r B", 2),
        Arm("A^3 B", "A^r B", 3),
        Arm("(A B)^2", "(A B)^r", 2),
        Arm("A B^2", "A B^r", 2),
        Arm("A B^2 C latent", "A B^r C", 2, "latent"),
        Arm("A^r B stochastic", "A^r B", 3, "adapter", True),
    )
}
MEANINGS = {
    "A B": "plain",
    "A^2 B": "RINS",
    "A^3 B": "RINS",
    "(A B)^2": "repeat all over",
    "A B^2": "late",
    "A B^2 C latent": "latent recurrent thinking",
    "A^r B stochastic": "stochastic RINS with adapters",
}


def policy(text: str) -> rx.cache.AbstractPolicy:
    """The policy of a name: "per visit", "first", "every 2", "last 1", with any number."""
    kind, _, number = text.partition(" ")
    numbered = {"every": rx.cache.Every, "last": rx.cache.Last}
    if kind in numbered and number.isdecimal():
        return numbered[kind](int(number))
    plain = {"per visit": rx.cache.PerVisit, "first": rx.cache.First}
    if text not in plain:
        raise ValueError(f'a policy is "per visit", "first", "every K" or "last K"; got {text!r}')
    return plain[text]()


def arm(text: str) -> Arm:
    """The arm of that name, or that of any signature: without names for exponents it is trained as it stands; else as `r=2`.

    What follows a comma is the policy of its cache: "A^3 B, first".
    """
    text, comma, shared = text.partition(", ")
    if comma:
        base = arm(text)
        if base.rounds is None:
            raise ValueError(f"{text!r} has no loop whose number of rounds is named, so no policy; got {shared!r}")
        if not policy(shared).parallel:
            raise ValueError(
                f"{shared!r} is a sequential policy: it is defined token by token, and cannot be trained under"
            )
        return dataclasses.replace(base, name=f"{text}, {shared}", cache=shared)
    if text in ARMS:
        return ARMS[text]
    signature = rx.Signature(text)
    names = signature.exponents
    if names not in ((), ("r",)):
        raise ValueError(f"signature {text!r}: an arm has one named exponent, r, or none; got {', '.join(names)}")
    return Arm(text, text, 2 if names else None)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything that the result of a run depends on, apart from its arm, seed and learning rate."""

    width: int
    layers: int
    heads: int
    length: int
    batch: int
    tokens: int
    optimizer: Literal["muon", "adamw"]
    law: str
    law_max: int
    law_skip: str
    law_mean: float
    rank: int
    depths: tuple[int, ...]
    windows: int
    points: int
    dtype: Literal["float32", "bfloat16"]
    corpus: tuple[str, ...]
    field: str
    held_out: str
    chunk: int | None
    elsewhere: tuple[str, ...]
    cache: str
    shards: int

    @property
    def config(self) -> rx.models.DecoderConfig:
        """The shape of every arm's decoder, over bytes."""
        return rx.models.DecoderConfig(257, self.width, self.layers, self.heads, context=self.length, dtype=self.dtype)

    def depth_law(self) -> rx.depth.AbstractLaw:
        """The law of the stochastic arm."""
        laws: dict[str, Callable[[], rx.depth.AbstractLaw]] = {
            "binomial": lambda: rx.depth.Binomial(self.law_max, skip=self.law_skip),
            "uniform": lambda: rx.depth.Uniform(1, self.law_max),
            "poisson": lambda: rx.depth.Poisson(self.law_mean, max=self.law_max),
            "lognormal-poisson": lambda: rx.depth.LogNormalPoisson(self.law_mean, max=self.law_max),
        }
        return laws[self.law]()


def judged(arm: Arm, setting: Setting) -> Arm:
    """The arm at the rounds that it is judged at: those of a stochastic one are the most that its law has."""
    return dataclasses.replace(arm, rounds=setting.depth_law().max) if arm.stochastic else arm


def build(arm: Arm, setting: Setting, key: Any) -> rx.models.DecoderLM:
    """The untrained model. Arms of one key start from the same weights, layer by layer."""
    signature = rx.Signature(arm.signature)
    number, layers = len(signature.blocks), setting.layers
    # The middle block takes what equal halves would give to the loop: 2 + 2, 1 + 2 + 1.
    outer = max(layers // (2 * (number - 1)), 1) if number > 2 else layers // number
    split = [outer] * number
    split[number // 2] += layers - sum(split)
    loops = {}
    if arm.rounds is not None:
        most = setting.depth_law().max if arm.stochastic else arm.rounds
        options: dict[str, Any] = {}
        if arm.options == "latent":
            # Added, so that all arms have the same parameters.
            options = {"inject": rx.injection.Add(), "start": rx.start.Normal()}
        elif arm.options == "adapter":
            adapter = rx.adapters.LowRank(
                setting.width, rank=setting.rank, rounds=most, past="last", key=jr.fold_in(key, 1)
            )
            options = {"adapter": adapter}
        # Everything is stored: no arm is charged for computing a state twice.
        if arm.cache != "per visit":
            options["cache"] = policy(arm.cache)
            # It is evaluated deeper than it is trained, and a cache has slots for so many rounds.
            most = max(most, *setting.depths)
        loops["r"] = rx.Loop(arm.rounds, max=most, gradient=rx.gradient.Full(), unroll=True, **options)
    return rx.models.DecoderLM(
        setting.config, signature, split=split, gradient=rx.gradient.Full(), unroll=True, key=key, **loops
    )


loss = rx.models.DecoderLM.loss


def example(setting: Setting) -> dict[str, Any]:
    """The shapes of a batch."""
    names = ("tokens", "targets", "segments", "positions")
    batch = {name: jax.ShapeDtypeStruct((setting.batch, setting.length), jnp.int32) for name in names}
    return {**batch, "weights": jax.ShapeDtypeStruct((setting.batch, setting.length), jnp.float32)}


def cost(arm: Arm, setting: Setting, rounds: int | None) -> int:
    """The contractions of one training step at one depth."""
    model = eqx.filter_eval_shape(build, arm, setting, jr.key(0))
    depth = {} if rounds is None else {"r": rounds}
    return int(rx.train.cost(loss, model, example(setting), **depth).matmul)


def plan(arms: list[Arm], setting: Setting) -> rx.flops.Plan:
    """How many steps each arm runs, at the training FLOPs of the first."""
    costs: dict[str, Any] = {}
    for arm in arms:
        if arm.stochastic:
            costs[arm.name] = rx.flops.expected(lambda r: cost(arm, setting, r), r=setting.depth_law())
        else:
            costs[arm.name] = cost(arm, setting, arm.rounds)
    per_step = setting.batch * setting.length
    tokens = -(-setting.tokens // per_step) * per_step
    return rx.flops.match(costs, reference=arms[0].name, tokens=tokens, tokens_per_step=per_step)


def identity(arm: Arm, setting: Setting, seed: int, rate: float, fingerprint: str) -> str:
    """The name of a run: equal where everything that decides its result is, wherever the data lies."""
    relevant = {**dataclasses.asdict(setting), "cache": None, "corpus": None, "elsewhere": None}
    what = dataclasses.asdict(arm)
    if arm.cache == "per visit":
        # Runs from before there were policies keep their names.
        del what["cache"]
    told = [what, relevant, seed, rate, fingerprint, rx.__version__, jax.__version__]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]


@ft.cache
def optimizer(setting: Any, rate: float):
    """Muon on matrices and AdamW on the rest, or AdamW on all; the learning rate follows the FLOPs spent. One for
    all seeds of an arm, so that they share a compiled program."""
    schedule = rx.train.cosine(rate, warmup=0.05, floor=0.05)
    return {"muon": rx.train.muon, "adamw": rx.train.adamw}[setting.optimizer](schedule)


def fit(
    arm: Any,
    setting: Any,
    model: Any,
    loss: Any,
    batches: Any,
    evaluate: Any,
    *,
    steps: int,
    seed: int,
    rate: float,
    mesh: Any,
    most_per_call: int,
    logs: list[Any],
    metrics: pathlib.Path,
    checkpoints: pathlib.Path | None,
    every: int,
) -> rx.train.Run:
    """Trains an arm of this comparison, or of that on images, at the depths that it is trained at."""
    depth: dict[str, Any] = {}
    programs = 1
    if arm.stochastic:
        law = setting.depth_law()
        depth = {"r": [int(r) for r in law.quota(steps, jr.key(1000 + seed))]}
        # Arms are unrolled, which a program for all depths cannot be: each depth has its own, however many there are.
        programs = len(law.support)
    elif arm.rounds is not None:
        depth = {"r": arm.rounds}
    every_points = max(steps // setting.points, 1)
    # On disk, so that a run that goes on from a checkpoint has the whole curve.
    lines = rx.train.JsonLines(metrics)
    store = None
    if checkpoints is not None:
        store = rx.train.Checkpoints(checkpoints, keep=1, keep_best=0, every=every)
    run = rx.train.fit(
        model,
        loss,
        batches,
        optimizer(setting, rate),
        steps=steps,
        key=jr.key(2000 + seed),
        depth=depth,
        specialise=programs,
        steps_per_call=max(min(most_per_call, every_points), 1),
        evaluate=evaluate,
        evaluate_every=every_points,
        checkpoints=store,
        logs=[lines, *logs],
        mesh=mesh,
    )
    lines.close()
    if store is not None:
        store.close()
    if run.stopped:
        raise SystemExit(f"stopped by {run.stopped}; start again to continue")
    return run


def train(
    arm: Arm,
    setting: Setting,
    row: dict[str, Any],
    seed: int,
    rate: float,
    *,
    logs: list[Any],
    metrics: pathlib.Path,
    checkpoints: pathlib.Path | None,
    every: int,
    tuning: bool,
    keep: pathlib.Path | None = None,
) -> dict[str, Any]:
    """Trains one arm with one seed, and evaluates it; the result is plain JSON. The trained model goes to `keep`, if given."""
    begin = time.perf_counter()
    data = load(setting)
    steps = row["steps"]
    model = build(arm, setting, jr.key(seed))
    parameters = rx.flops.parameters(model)
    mesh = rx.train.mesh(setting.shards) if jax.device_count() > 1 else None
    if mesh is not None:
        model = rx.train.place(model, mesh)
    at = None if arm.rounds is None else (arm.rounds,)
    evaluator = Evaluator(data.tune if tuning else data.report, setting.windows)

    def evaluate(model):
        ((nats, size),) = evaluator(model, at, few=8).values()
        return {"bits_per_byte": bits_per_byte(nats, size)}

    run = fit(
        arm,
        setting,
        model,
        loss,
        rx.data.batches(data.train, setting.batch, seed=seed),
        evaluate,
        steps=steps,
        seed=seed,
        rate=rate,
        mesh=mesh,
        most_per_call=50,
        logs=logs,
        metrics=metrics,
        checkpoints=checkpoints,
        every=every,
    )
    trained = time.perf_counter() - begin
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        staged = keep.with_suffix(".new")
        with staged.open("wb") as file:
            eqx.tree_serialise_leaves(file, eqx.filter(run.model, eqx.is_array))
        staged.replace(keep)
    depths = None if arm.rounds is None else tuple(sorted({*setting.depths, arm.rounds}))
    found = evaluator(run.model, depths if not tuning else at)
    ((nats, size)) = found[arm.rounds]
    result: dict[str, Any] = {
        "arm": arm.name,
        "seed": seed,
        "learning_rate": rate,
        "steps": run.step,
        "tokens": run.step * setting.batch * setting.length,
        "epochs": run.step * setting.batch / len(data.train),
        "flops": run.flops,
        "planned": row["total"],
        "parameters": parameters.unique,
        "adapters": parameters.adapters,
        "bits_per_byte": bits_per_byte(nats, size),
        "at_depth": {str(r): bits_per_byte(*pair) for r, pair in found.items()},
        "windows": {"nats": [float(x) for x in nats], "bytes": [float(x) for x in size]},
        "curve": curve_of(metrics, "bits_per_byte"),
        "seconds": run.seconds,
        # Of a run that went on from a checkpoint the time is that of its last part only.
        "timed": 0 if run.begun else run.timed,
        "wall": trained,
    }
    if data.elsewhere is not None and not tuning:
        other = Evaluator(data.elsewhere, setting.windows)
        ((nats, size),) = other(run.model, at).values()
        result["elsewhere"] = bits_per_byte(nats, size)
    return result


def curve_of(metrics: pathlib.Path, name: str) -> list[list[float]]:
    """The points at which a run was evaluated: step and a metric."""
    lines = map(json.loads, metrics.read_text("utf-8").splitlines())
    return [[line["step"], line[name]] for line in lines if name in line]
