"""rinsx, decoding greedily, as workers of `benchmarks/decoding.py`: the protocol is that of `_decode_peers.py`.

    python benchmarks/_decoders.py           # a worker: one JSON object a line on standard input, one answer a line

`build` takes a `signature` and a `policy` in place of the name of a peer. Beside the commands of `_decode_peers.py` it answers
`{"cmd": "bandwidth", "sizes": [...]}` by the bytes per second at which arrays of so many bytes are read, again and again.

A call of `rx.generate.tokens` is one compiled program, whose tokens are seen when it is over. The time of the first token
is that of a call for one token, and what a call for n tokens takes longer is the time of the other n - 1.
"""

import dataclasses
import re
import statistics
import time
from importlib.metadata import version
from typing import Any

from _decode_peers import make_prompts, Point, timed
from _peers import serve, Shape
from _trainers import config_of


POLICIES = ("per visit", "first", "every 2", "last")


def make_model(shape: Shape, signature: str, policy: str) -> Any:
    import jax.random as jr

    import rinsx as rx

    policies: dict[str, Any] = {
        "per visit": rx.cache.PerVisit,
        "first": rx.cache.First,
        "every 2": lambda: rx.cache.Every(2),
        "last": rx.cache.Last,
    }
    found = re.search(r"\^(\d+)", signature)
    # A loop has its policy by its name.
    loops: dict[str, Any] = {} if found is None else {"r": rx.Loop(int(found[1]), cache=policies[policy]())}
    named = re.sub(r"\^\d+", "^r", signature)
    return rx.models.DecoderLM(config_of(shape), named, split=shape.split, key=jr.key(shape.seed), **loops)


def visits(signature: str, split: tuple[int, int]) -> int:
    """How many layers a token passes through, in the signatures of this benchmark."""
    a, b = split
    if signature == "A B":
        return a + b
    if (found := re.fullmatch(r"A\^(\d+) B", signature)) is not None:
        return a * int(found[1]) + b
    if (found := re.fullmatch(r"\(A B\)\^(\d+)", signature)) is not None:
        return (a + b) * int(found[1])
    raise ValueError(f"signatures are 'A B', 'A^n B' and '(A B)^n', got {signature!r}")


class Worker:
    """Answers requests about one signature and policy."""

    def __init__(self):
        self.model: Any = None
        self.shape = Shape()
        self.options: dict[str, Any] = {}

    def build(self, signature: str, policy: str = "per visit", **fields: Any) -> dict[str, Any]:
        if self.model is not None:
            raise ValueError("a worker builds one model; start another worker for the next")
        if policy not in POLICIES:
            raise ValueError(f"policies are {', '.join(map(repr, POLICIES))}, got {policy!r}")
        import equinox as eqx
        import jax

        import rinsx as rx

        self.shape = shape = Shape(**fields)
        visited = visits(signature, shape.split)
        model = eqx.filter_jit(make_model)(shape, signature, policy)
        sampler = rx.generate.Sampler(temperature=0)
        self.model, self.options = model, {"sampler": sampler}
        if policy == "last":
            # As one would serve it. Token by token, which is what the policy says, a prompt takes a step for each token.
            self.options["prefill"] = "parallel"
        # What follows is per layer and token, so any capacity will do.
        kept = rx.flops.nbytes(eqx.filter_eval_shape(lambda: model.cache(1, 1024))) // 1024
        total = rx.flops.nbytes(eqx.filter(model, eqx.is_array))
        layers = rx.flops.nbytes(eqx.filter(model.body, eqx.is_array))
        # Of the table a token reads one row, unless it is the head too.
        rest = total - layers - (0 if shape.tied else model.embedding.weight.nbytes)
        return {
            "signature": signature,
            "policy": policy,
            "backend": jax.default_backend(),
            "shape": dataclasses.asdict(shape),
            "parameters": rx.flops.parameters(model).unique,
            "visits": visited,
            "slots": kept // (2 * 4 * shape.width),
            "largest_batch": None,
            "weights_once": layers + rest,
            "weights_per_visit": layers * visited // sum(shape.split) + rest,
            "versions": {name: version(name) for name in ("jax", "jaxlib", "equinox", "rinsx")},
        }

    def prepare(self, **fields: Any) -> dict[str, Any]:
        point = Point(**fields)
        start = time.perf_counter()
        self._decode(point)
        compiled = time.perf_counter() - start
        self._decode(point)
        return {"cache": None, "prepare_s": compiled}

    def run(self, seconds: float, **fields: Any) -> dict[str, Any]:
        import equinox as eqx

        import rinsx as rx

        point = Point(**fields)
        cache = eqx.filter_eval_shape(lambda: self.model.cache(point.batch, point.capacity))
        found = timed(lambda: self._decode(point), seconds)
        # Of medians: one slow call for one token would make the others fast.
        rest = statistics.median(found["whole_s"]) - statistics.median(found["first_s"])
        return {
            "first_s": found["first_s"],
            "token_s": [rest / (point.steps - 1)],
            "cache": None,
            "cache_bytes": rx.flops.nbytes(cache),
        }

    def check(self, prompt: int, steps: int, capacity: int) -> dict[str, Any]:
        """Greedy tokens, and the logits of steps of one token, beside those of the forward pass over all tokens so far.

        A sequential policy has no forward pass: it is defined token by token. Beside that stands what is timed, where the
        prompt is run at once.
        """
        import equinox as eqx
        import jax.numpy as jnp
        import numpy as np

        model = self.model
        length = prompt + steps
        prompts = np.asarray(make_prompts(self.shape, 1, prompt), np.int32)
        chosen = np.concatenate([prompts, np.asarray(self._tokens(prompts, steps, capacity).tokens)], -1)

        @eqx.filter_jit
        def decode(model, tokens, cache):
            hidden, cache = model.decode(tokens, cache)
            return model.logits(hidden[:, -1]), cache

        def cached(first: int) -> Any:
            """The logits by which each token behind the prompt is chosen, where the first tokens are run at once."""
            logits, cache = decode(model, jnp.asarray(chosen[:, :first]), model.cache(1, capacity))
            found = [logits]
            for i in range(first, length - 1):
                logits, cache = decode(model, jnp.asarray(chosen[:, i : i + 1]), cache)
                found.append(logits)
            return np.concatenate([np.asarray(x) for x in found[prompt - first :]])

        if "prefill" in self.options:
            full = np.concatenate(
                [prompts, np.asarray(self._tokens(prompts, steps, capacity, prefill=None).tokens)], -1
            )
            expected = cached(1)
        else:
            # Padded behind to one length, for one compilation: attention is causal.
            forward = eqx.filter_jit(lambda model, tokens: model(tokens))
            full = np.zeros((1, length), np.int32)
            full[:, :prompt] = prompts
            for i in range(prompt, length):
                full[:, i] = np.asarray(forward(model, jnp.asarray(full)))[:, i - 1].argmax(-1)
            expected = np.asarray(forward(model, jnp.asarray(chosen)))[0, prompt - 1 : -1]
        return {
            "equal": bool((full == chosen).all()),
            "logit_difference": float(np.abs(cached(prompt) - expected).max()),
            "logit_deviation": float(expected.std()),
        }

    def bandwidth(self, sizes: list[int], seconds: float = 2.0) -> dict[str, Any]:
        """Bytes per second of products of a float32 matrix and a vector, which read each byte once; the fastest of many."""
        import jax
        import jax.numpy as jnp
        from jax import lax

        columns = 256
        # The matrix keeps a vector of ones as it is. Each product needs the one before it, so that none can be left out.
        products = jax.jit(lambda x, n: lax.fori_loop(0, n, lambda _, v: (x @ v)[:columns], jnp.ones(columns)))
        rates = []
        for size in sizes:
            x = jnp.full((max(columns, size // (4 * columns)), columns), 1 / columns, jnp.float32)
            n = max(1, 2**28 // x.nbytes)
            products(x, n).block_until_ready()
            best, end = float("inf"), time.perf_counter() + seconds
            while time.perf_counter() < end:
                start = time.perf_counter()
                products(x, n).block_until_ready()
                best = min(best, (time.perf_counter() - start) / n)
            rates.append(x.nbytes / best)
            del x
        return {"sizes": sizes, "bytes_per_s": rates, "backend": jax.default_backend()}

    def _tokens(self, prompts: Any, steps: int, capacity: int, **options: Any) -> Any:
        import jax
        import jax.numpy as jnp

        import rinsx as rx

        options = {**self.options, **options}
        return jax.block_until_ready(
            rx.generate.tokens(self.model, jnp.asarray(prompts), steps=steps, capacity=capacity, **options)
        )

    def _decode(self, point: Point) -> dict[str, float]:
        """Seconds of a call for the first token and of one for all."""
        import jax.numpy as jnp
        import numpy as np

        prompts = jnp.asarray(np.asarray(make_prompts(self.shape, point.batch, point.prompt), np.int32))
        start = time.perf_counter()
        self._tokens(prompts, 1, point.capacity)
        first = time.perf_counter()
        self._tokens(prompts, point.steps, point.capacity)
        return {"first_s": first - start, "whole_s": time.perf_counter() - first}


if __name__ == "__main__":
    worker = Worker()
    serve({name: getattr(worker, name) for name in ("build", "prepare", "run", "check", "bandwidth")})
