"""The arms of the comparisons on images: which tower recurses, at which depths it trains, and how it is trained once."""

import dataclasses
import functools as ft
import hashlib
import json
import pathlib
import time
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from _arms import curve_of, fit

import rinsx as rx


TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a small image of a {}.",
    "this is a {}.",
    "{}.",
)
_ROWS = 128
_FEW = 1000


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to recurse: a signature for each tower, whose exponent `r` is what training sets."""

    name: str
    image: str = "A B"
    text: str = "A B"
    rounds: int | None = None
    stochastic: bool = False


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything that the result of a run depends on, apart from its arm, seed and learning rate."""

    task: Literal["pairs", "classes"]
    size: int
    patch: int
    width: int
    layers: int
    heads: int
    context: int
    vocabulary: int
    batch: int
    images: int
    crop: float
    flip: bool
    law_max: int
    law_skip: str
    rank: int
    depths: tuple[int, ...]
    points: int
    optimizer: Literal["muon", "adamw"]
    dtype: Literal["float32", "bfloat16"]
    shards: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    image: str
    label: str
    names: str

    def depth_law(self) -> rx.depth.AbstractLaw:
        """The law of the stochastic arms."""
        return rx.depth.Binomial(self.law_max, skip=self.law_skip)


def build(arm: Arm, setting: Setting, classes: int, vocabulary: int, key: Any) -> Any:
    """The untrained model: a SigLIP, or a classifier. Arms of one key start from the same weights, layer by layer."""
    keys = jr.split(key, 4)
    shape: Any = {name: getattr(setting, name) for name in ("width", "layers", "heads", "dtype")}
    # Everything is stored: no arm is charged for computing a state twice.
    same: dict[str, Any] = {"gradient": rx.gradient.Full(), "unroll": True}

    def loops(signature: str, key: Any) -> dict[str, Any]:
        if "^r" not in signature or arm.rounds is None:
            return {}
        most = arm.rounds
        options: dict[str, Any] = {}
        if arm.stochastic:
            most = setting.law_max
            adapter = rx.adapters.LowRank(setting.width, rank=setting.rank, rounds=most, past="last", key=key)
            options = {"adapter": adapter}
        return {"r": rx.Loop(arm.rounds, max=most, gradient=rx.gradient.Full(), unroll=True, **options)}

    head = None if setting.task == "pairs" else classes
    config = rx.models.ViTConfig(setting.size, setting.patch, classes=head, **shape)
    image = rx.models.ViT(config, arm.image, key=keys[0], **same, **loops(arm.image, keys[1]))
    if setting.task == "classes":
        return image
    config = rx.models.TextConfig(vocabulary, setting.context, **shape)
    text = rx.models.TextEncoder(config, arm.text, key=keys[2], **same, **loops(arm.text, keys[3]))
    return rx.models.SigLIP(image, text)


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on; held-out images, to choose learning rates and to report; and the captions of all classes."""

    train: rx.data.Pairs
    tune: rx.data.Pairs
    report: rx.data.Pairs
    classes: int
    vocabulary: int
    captions: np.ndarray | None
    fingerprint: str


@ft.cache
def load(setting: Setting) -> Data:
    """The images and their captions: those of the embedded digits, or of the files that are named."""
    if setting.train:
        names = _names(setting)
        whole, report = (
            rx.data.image_parquet(*paths, image=setting.image, label=setting.label, names=names)
            for paths in (setting.train, setting.test)
        )
    else:
        whole, report = rx.data.split(rx.data.digits(), "1/3", seed=0)
    train, tune = rx.data.split(whole, "1/20" if setting.train else "1/5", seed=1)
    names = whole.names
    assert names is not None
    captions = None
    if setting.task == "pairs":
        tokenizer = rx.data.BPE.train(rx.data.captions_of(whole, TEMPLATES), setting.vocabulary)
        captions = rx.data.Captions(tokenizer, setting.context, templates=TEMPLATES)
    crop = None if setting.crop == 1 else (setting.crop, 1)
    plain = rx.data.Pixels(setting.size)
    drawn = rx.data.Pixels(setting.size, crop=crop, flip=setting.flip)
    pairs = rx.data.Pairs(train, drawn, captions)
    held = lambda source: rx.data.Pairs(source, plain, captions)
    tokens, vocabulary = None, 0
    if pairs.captions is not None:
        vocabulary = pairs.captions.vocab_size
        tokens, met = pairs.captions.read_classes()
        if any(kinds for one in met for kinds in one):
            raise SystemExit(f"captions do not fit into --context {setting.context}: give more")
    fingerprint = hashlib.sha256("".join((train.fingerprint(), report.fingerprint())).encode()).hexdigest()
    return Data(pairs, held(tune), held(report), len(names), vocabulary, tokens, fingerprint)


def _names(setting: Setting) -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers, from the two columns that have them: the same in all files."""
    import pyarrow.parquet as pq

    found: dict[Any, tuple[str, str]] = {}
    for path in (*setting.train, *setting.test):
        table = pq.read_table(path, columns=[setting.label, setting.names])
        for label, name in dict.fromkeys(
            zip(*(table[column].to_pylist() for column in (setting.label, setting.names)))
        ):
            known, first = found.setdefault(label, (name, path))
            if name != known:
                raise SystemExit(
                    f"{path}: the label {label} has the name {name!r}, and in {first} the name {known!r}; the classes of --train "
                    "and --test must be the same"
                )
    # A part may lack a class that another has.
    if missing := [number for number in range(len(found)) if number not in found]:
        raise SystemExit(
            f"the column {setting.label!r} must number the classes from 0 on; got {sorted(found, key=str)}, and no {missing[0]}, "
            f"in {', '.join((*setting.train, *setting.test))}"
        )
    return tuple(found[number][0] for number in range(len(found)))


def logits(model, batch, key):
    return model(batch["images"])


def correct(
    model: Any, setting: Setting, data: Data, pairs: rx.data.Pairs, depths: tuple[int, ...] | None, mesh: Any = None
) -> dict[int | None, np.ndarray]:
    """Whether each image is told right, at each depth (or at none, for a model without a loop)."""
    same: dict[str, Any] = {"rounds": None if depths is None else {"r": depths}, "mesh": mesh}
    batches = rx.data.evaluation(pairs, _ROWS)
    if data.captions is not None:
        found = rx.transfer.evaluate_zero_shot(model, batches, data.captions, batch_size=_ROWS, **same)
    else:
        seen = rx.transfer.embed(model, logits, batches, **same)
        found = {depth: vectors.argmax(1) == seen.labels for depth, vectors in seen.vectors.items()}
    return {depth[0] if depth else None: right for depth, right in found.items()}


def loss_of(setting: Setting) -> Any:
    return rx.models.SigLIP.loss if setting.task == "pairs" else rx.models.ViT.loss


def cost(arm: Arm, setting: Setting, rounds: int | None) -> int:
    """The contractions of one training step at one depth."""
    data = load(setting)
    model = eqx.filter_eval_shape(build, arm, setting, data.classes, data.vocabulary, jr.key(0))
    one = data.train[0]
    batch = {name: jax.ShapeDtypeStruct((setting.batch, *np.shape(x)), x.dtype) for name, x in one.items()}
    depth = {} if rounds is None else {"r": rounds}
    return int(rx.train.cost(loss_of(setting), model, batch, **depth).matmul)


def plan(arms: list[Arm], setting: Setting) -> rx.flops.Plan:
    """How many steps each arm runs, at the training FLOPs of the first. What the plan calls tokens are images."""
    costs: dict[str, Any] = {}
    for arm in arms:
        if arm.stochastic:
            costs[arm.name] = rx.flops.expected(lambda r: cost(arm, setting, r), r=setting.depth_law())
        else:
            costs[arm.name] = cost(arm, setting, arm.rounds)
    images = -(-setting.images // setting.batch) * setting.batch
    return rx.flops.match(costs, reference=arms[0].name, tokens=images, tokens_per_step=setting.batch)


def identity(arm: Arm, setting: Setting, seed: int, rate: float, steps: int, tuning: bool) -> str:
    """The name of a run: equal where everything that decides its result is, wherever the data lies."""
    relevant = {**dataclasses.asdict(setting), "train": None, "test": None}
    # The steps too: they follow from the baseline.
    told = [dataclasses.asdict(arm), relevant, seed, rate, steps, tuning, load(setting).fingerprint, TEMPLATES]
    versions = rx.__version__, jax.__version__
    return hashlib.sha256(json.dumps([told, versions], sort_keys=True, default=str).encode()).hexdigest()[:16]


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
    prefetch: int,
    tuning: bool,
) -> dict[str, Any]:
    """Trains one arm with one seed, and evaluates it; the result is plain JSON."""
    begin = time.perf_counter()
    data, steps = load(setting), row["steps"]
    model = build(arm, setting, data.classes, data.vocabulary, jr.key(seed))
    parameters = rx.flops.parameters(model)
    mesh = rx.train.mesh(setting.shards) if jax.device_count() > 1 else None
    loss = loss_of(setting)
    if mesh is not None:
        model = rx.train.place(model, mesh)
        loss = loss if setting.task == "classes" else ft.partial(loss, mesh=mesh)
    at = None if arm.rounds is None else (arm.rounds,)
    pairs = data.tune if tuning else data.report
    # On a part, evenly spaced, so that the curve costs little.
    part = pairs.subset(np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), _FEW)).astype(int)))
    before = data.train.counts

    def evaluate(model):
        (found,) = correct(model, setting, data, part, at, mesh).values()
        return {"accuracy": float(found.mean())}

    run = fit(
        arm,
        setting,
        model,
        loss,
        rx.data.batches(data.train, setting.batch, seed=seed, prefetch=prefetch),
        evaluate,
        steps=steps,
        seed=seed,
        rate=rate,
        mesh=mesh,
        most_per_call=20,
        logs=logs,
        metrics=metrics,
        checkpoints=checkpoints,
        every=every,
    )
    depths = at if tuning or arm.rounds is None else tuple(sorted({*setting.depths, arm.rounds}))
    found = correct(run.model, setting, data, pairs, depths, mesh)
    counts = {kind: n - before.get(kind, 0) for kind, n in data.train.counts.items()}
    learned = (
        {}
        if setting.task == "classes"
        else {"scale": float(jnp.exp(run.model.log_scale)), "bias": float(run.model.bias)}
    )
    return {
        "arm": arm.name,
        "seed": seed,
        "learning_rate": rate,
        "steps": run.step,
        "images": run.step * setting.batch,
        "epochs": run.step * setting.batch / len(data.train),
        "flops": run.flops,
        "planned": row["total"],
        "parameters": parameters.unique,
        "adapters": parameters.adapters,
        "accuracy": float(found[arm.rounds].mean()),
        "at_depth": {str(r): float(x.mean()) for r, x in found.items()},
        "correct": [int(x) for x in found[arm.rounds]],
        "curve": curve_of(metrics, "accuracy"),
        "counts": counts,
        **learned,
        "seconds": run.seconds,
        # Of a run that went on from a checkpoint the time is that of its last part only.
        "timed": 0 if run.begun else run.timed,
        "wall": time.perf_counter() - begin,
    }
