"""rinsx and JAX by hand, as workers of `benchmarks/training.py`: the protocol is that of `_peers.py`.

    python benchmarks/_trainers.py           # a worker: one JSON object a line on standard input, one answer a line

Beside `build`, `run` and `quit` it answers

- `{"cmd": "check", ...}`, with the fields of `Shape`, by the losses of a few steps of each form from the same weights;
- `{"cmd": "input", "batches": n}`, in place of `run`, by the seconds that it takes to make a batch of real text;
- `{"cmd": "utilisation", ...}` by the model-FLOPs utilisation of a preset, on a GPU.

What needs JAX is imported when the first `build` comes, so that threads can be set before.
"""

import ctypes
import dataclasses
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from _peers import make_tokens, memory, serve, Shape


FORMS = ("rinsx", "rinsx stored", "JAX by hand")
"""`rinsx` is what the defaults do; `rinsx stored` unrolls loops and stores all for the backward pass, as the form by hand does."""

STEPS_PER_CALL = 5

Steps = Callable[[], list[float]]
"""Does `STEPS_PER_CALL` steps and returns the losses before each."""


def config_of(shape: Shape) -> Any:
    import rinsx as rx

    return rx.models.DecoderConfig(
        shape.vocabulary,
        width=shape.width,
        layers=sum(shape.split),
        heads=shape.heads,
        hidden=shape.hidden,
        tied=shape.tied,
        context=shape.length,
        dtype="float32",
    )


def make_model(shape: Shape, stored: bool) -> Any:
    import jax.random as jr

    import rinsx as rx

    full = rx.gradient.Full()
    options: dict[str, Any] = {"gradient": full, "unroll": True} if stored else {}
    # One round is no loop: then the signature is `A B`.
    loops: dict[str, Any] = {"r": rx.Loop(shape.rounds, **options)} if shape.rounds > 1 else {}
    signature = "A^r B" if loops else "A B"
    return rx.models.DecoderLM(
        config_of(shape), signature, split=shape.split, key=jr.key(shape.seed), **options, **loops
    )


def by_rinsx(model: Any, learning_rate: float, tokens: Any, targets: Any) -> Steps:
    """The step of `rx.train.fit`: the same compiled program, without its logs, checkpoints and evaluations."""
    import equinox as eqx
    import jax.random as jr
    import numpy as np

    import rinsx as rx
    from rinsx.train._step import prepare, run, Stepper

    optimizer = rx.train.adamw(lambda fraction: learning_rate)
    stepper = Stepper(rx.models.DecoderLM.loss, optimizer, (), ((),), 1, None)
    # Compiled, as `fit` does it: op by op it would take more memory than training.
    state = eqx.filter_jit(optimizer.init)(eqx.filter(model, eqx.is_inexact_array))
    trained, first = (model, state), 0
    batches = {"tokens": tokens, "targets": targets}
    fractions, flags = [0.0] * STEPS_PER_CALL, np.zeros(1, bool)

    def steps() -> list[float]:
        nonlocal trained, first
        given = batches, jr.key(0), first, STEPS_PER_CALL, fractions, (), flags
        if first == 0:
            prepare(stepper, trained, *given)
        trained, (record, _) = run(stepper, trained, *given)
        first += STEPS_PER_CALL
        return np.asarray(record.loss).tolist()

    return steps


def by_hand(shape: Shape, params: Any) -> Steps:
    import _by_hand
    import jax
    import numpy as np

    tokens, targets = _repeated(shape)
    compiled = _by_hand.make_steps(shape)
    trained = params, jax.jit(_by_hand.optimizer(shape).init)(params)

    def steps() -> list[float]:
        nonlocal trained
        *trained, losses = compiled(*trained, tokens, targets)
        return np.asarray(losses).tolist()

    return steps


def same_weights(shape: Shape, model: Any) -> dict[str, Any]:
    """Copies the weights of a `DecoderLM` for the form by hand."""
    import _by_hand
    import jax.numpy as jnp

    layers = []
    for block in model.body.blocks.values():
        for i in range(block.depth):
            layer = block.layers
            of = {**vars(layer.attention), **vars(layer.mlp)}
            arrays = {name: of[name].weight for name in _by_hand.LAYER if not name.endswith("norm")}
            arrays |= {"attention_norm": layer.attention_norm.scale, "mlp_norm": layer.mlp_norm.scale}
            layers.append({name: jnp.array(array[i]) for name, array in arrays.items()})
    params = {"embedding": model.embedding.weight.copy(), "layers": layers, "norm": model.norm.scale.copy()}
    return params if shape.tied else params | {"head": model.head.weight.copy()}


def _repeated(shape: Shape) -> tuple[Any, Any]:
    import numpy as np

    tokens, targets = (np.stack([x.astype(np.int32)] * STEPS_PER_CALL) for x in make_tokens(shape))
    return tokens, targets


def make(name: str, shape: Shape) -> tuple[Steps, int]:
    """The steps of a form, and how many parameters it trains."""
    import jax
    import jax.random as jr

    if name not in FORMS:
        raise ValueError(f"forms are {', '.join(map(repr, FORMS))}, got {name!r}")
    if name == "JAX by hand":
        import _by_hand

        params = jax.jit(_by_hand.init, static_argnums=0)(shape, jr.key(shape.seed))
        return by_hand(shape, params), sum(x.size for x in jax.tree.leaves(params))
    import equinox as eqx

    import rinsx as rx

    model = eqx.filter_jit(make_model)(shape, stored=name == "rinsx stored")
    return by_rinsx(model, shape.learning_rate, *_repeated(shape)), rx.flops.parameters(model).unique


class Worker:
    """Answers requests about one form."""

    def __init__(self):
        self.steps: Steps | None = None
        self.shape = Shape()
        self.import_rss = 0

    def build(self, name: str, **fields: Any) -> dict[str, Any]:
        if self.steps is not None:
            raise ValueError("a worker builds one form; start another worker for the next")
        self.shape = shape = Shape(**fields)
        start = time.perf_counter()
        # All that is imported and started with the first compiled step.
        make(name, Shape(width=8, heads=1, hidden=8, split=(1, 1), rounds=1, vocabulary=8, length=4, batch=1))[0]()
        import_s = time.perf_counter() - start
        # What compiling the tiny model has freed is not held: left in, it would be taken off the memory of the model. PyTorch, which
        # compiles nothing here, keeps under 2 MiB that way.
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            trim(0)
        self.import_rss, _ = memory()
        start = time.perf_counter()
        self.steps, parameters = make(name, shape)
        self.steps()
        return {
            "name": name,
            "shape": dataclasses.asdict(shape),
            "parameters": parameters,
            "visits": len(shape.order),
            "gradient_visits": len(shape.order),
            "tokens_per_step": shape.batch * shape.length,
            "import_s": import_s,
            "build_s": time.perf_counter() - start,
            "import_rss": self.import_rss,
            "built_rss": memory()[1],
            "versions": {name: version(name) for name in ("jax", "jaxlib", "equinox", "optax", "rinsx")},
        }

    def run(self, steps: int) -> dict[str, Any]:
        if self.steps is None:
            raise ValueError("nothing to run: send a build first")
        if steps < 1 or steps % STEPS_PER_CALL:
            raise ValueError(f"steps is a positive multiple of {STEPS_PER_CALL}, got {steps}")
        seconds, losses = [], [0.0]
        for _ in range(steps // STEPS_PER_CALL):
            start = time.perf_counter()
            losses = self.steps()
            seconds += [(time.perf_counter() - start) / STEPS_PER_CALL] * STEPS_PER_CALL
        return {"seconds": seconds, "loss": losses[-1], "import_rss": self.import_rss, "peak_rss": memory()[1]}

    def check(self, **fields: Any) -> dict[str, Any]:
        """The losses of the first steps of every form from the same weights, and the FLOPs of a step's contractions."""
        import equinox as eqx
        import jax
        import jax.numpy as jnp

        import rinsx as rx

        shape = Shape(**fields)
        models = {"rinsx": make_model(shape, False), "rinsx stored": make_model(shape, True)}
        params = same_weights(shape, models["rinsx"])
        tokens = jax.ShapeDtypeStruct((shape.batch, shape.length), jnp.int32)
        batch = {"tokens": tokens, "targets": tokens}
        model = eqx.filter_eval_shape(lambda: models["rinsx stored"])
        flops = int(rx.train.cost(rx.models.DecoderLM.loss, model, batch).matmul)
        losses = {name: by_rinsx(model, shape.learning_rate, *_repeated(shape))() for name, model in models.items()}
        losses["JAX by hand"] = by_hand(shape, params)()
        return {"losses": losses, "flops": flops}

    def input(self, batches: int, **fields: Any) -> dict[str, Any]:
        """Seconds of `next` for each batch of `rx.data.batches` over real text, stacked as `rx.train.fit` does."""
        import numpy as np

        import rinsx as rx

        shape = Shape(**fields)
        tokens = rx.data.tokenize(rx.data.stdlib(), rx.data.Bytes())
        iterator = iter(rx.data.batches(rx.data.Windows(tokens, shape.length), shape.batch))
        seconds = []
        for _ in range(batches // STEPS_PER_CALL):
            start = time.perf_counter()
            taken = [next(iterator) for _ in range(STEPS_PER_CALL)]
            for name in taken[0]:
                np.stack([batch[name] for batch in taken])
            seconds.append((time.perf_counter() - start) / STEPS_PER_CALL)
        return {"seconds": seconds}

    def utilisation(self, preset: str, batch: int, calls: int) -> dict[str, Any]:
        """FLOPs of contractions per second of `A B` and `A^3 B` of a preset in bfloat16, and their share of the device's peak."""
        import equinox as eqx
        import jax
        import jax.numpy as jnp
        import jax.random as jr
        import numpy as np

        import rinsx as rx

        if jax.default_backend() != "gpu":
            raise ValueError(f"utilisation is measured on a GPU, but the backend is {jax.default_backend()!r}")
        config = rx.models.presets[preset]
        tokens = jax.ShapeDtypeStruct((batch, config.context), jnp.int32)
        found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "peak": rx.train.peak_flops()}
        for signature in ("A B", "A^3 B"):
            make = lambda **options: rx.models.DecoderLM(config, signature, key=jr.key(0), **options)
            # What is computed twice to save memory does not count as the model's FLOPs.
            stored = eqx.filter_eval_shape(lambda: make(gradient=rx.gradient.Full(), unroll=True))
            flops = int(rx.train.cost(rx.models.DecoderLM.loss, stored, {"tokens": tokens, "targets": tokens}).matmul)
            drawn = np.random.default_rng(0).integers(0, config.vocab_size, (STEPS_PER_CALL, *tokens.shape), np.int32)
            steps = by_rinsx(make(), 1e-4, drawn, drawn)
            seconds = []
            for _ in range(calls + 1):
                start = time.perf_counter()
                steps()
                seconds.append((time.perf_counter() - start) / STEPS_PER_CALL)
            rate = flops / float(np.median(seconds[1:]))
            found[signature] = {"flops": flops, "seconds": seconds[1:], "flops_per_s": rate}
            if found["peak"] is not None:
                found[signature]["utilisation"] = rate / found["peak"]
        return found


if __name__ == "__main__":
    worker = Worker()
    serve({name: getattr(worker, name) for name in ("build", "run", "check", "input", "utilisation")})
