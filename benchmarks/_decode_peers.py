# pyright: reportMissingImports=false
"""PyTorch peers of `benchmarks/decoding.py`: the models of `_peers.py`, decoding greedily with their caches.

    python benchmarks/_decode_peers.py           # a worker: one JSON object a line on standard input, one answer a line

The worker's Python needs what that of `_peers.py` does. A worker builds one peer, once. It answers

- `{"cmd": "build", "name": ..., "compile": false, "width": 256, ...}`, with the fields of `Shape`, by what each token must read;
- `{"cmd": "prepare", "batch": 1, "prompt": 96, "capacity": 128, "steps": 32}` by which cache is fastest there, once it has
    compiled and tried all;
- `{"cmd": "run", ..., "seconds": s}`, with the fields of `prepare`, by the seconds of the first token and of each one after it,
    as often as fits into `s` seconds, and by the bytes of the cache when all is decoded;
- `{"cmd": "check", "prompt": p, "steps": n, "capacity": c}` by how far decoding is from the forward pass over the whole sequence;
- `{"cmd": "quit"}`, or the end of its input, by leaving;
- whatever fails by `{"error": ...}`.

Peers run in float32 by PyTorch's CPU kernels. Each token is one call of the model and an `argmax`, without the loop of
`generate`, which takes longer. Under `torch.compile` the prompt is still run eagerly, as transformers advises: only steps of one
token are compiled.
"""

import dataclasses
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from _peers import hrm_text, llama, Peer, serve, Shape, x_transformers


@dataclasses.dataclass(frozen=True)
class Cached:
    """One way to decode: `step` maps tokens `[batch, n]` and a cache to the logits behind the last of them and the cache."""

    new: Callable[[int, int], Any]
    """Makes the cache of a batch and a capacity."""
    step: Callable[[Any, Any], tuple[Any, Any]]
    size: Callable[[Any], int]
    """Bytes of keys and values."""
    dynamic: bool
    """Whether the cache grows, so that each step has new shapes."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A peer with its caches by name."""

    peer: Peer
    caches: dict[str, Cached]
    unique: int
    """How many layers have weights of their own."""
    slots: int
    """How many keys and values a token leaves behind."""
    largest_batch: int | None = None


def from_transformers(peer: Peer, unique: int) -> Decoder:
    """Dynamic and static caches of transformers, which has a slot for each visit."""
    from transformers import DynamicCache, StaticCache

    model = peer.model
    statics: dict[tuple[int, int], Any] = {}

    def static(batch: int, capacity: int) -> Any:
        # One is kept and emptied: a compiled step holds on to its addresses.
        if (batch, capacity) in statics:
            statics[batch, capacity].reset()
        else:
            statics[batch, capacity] = StaticCache(config=model.config, max_cache_len=capacity)
        return statics[batch, capacity]

    def step(tokens, cache):
        out = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1], out.past_key_values

    size = lambda cache: sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    caches = {
        "dynamic": Cached(lambda batch, capacity: DynamicCache(config=model.config), step, size, True),
        "static": Cached(static, step, size, False),
    }
    return Decoder(peer, caches, unique, peer.visits)


def from_x_transformers(peer: Peer, unique: int) -> Decoder:
    """The cache of x-transformers: keys before their rotation, one entry for each visit, concatenated at each step."""
    model = peer.model

    def step(tokens, cache):
        logits, cache = model(tokens, cache=cache, input_not_include_cache=True, return_intermediates=True)
        return logits[:, -1], cache

    size = lambda cache: sum(x.nbytes for inter in cache.attn_intermediates for x in inter.cached_kv)
    return Decoder(peer, {"dynamic": Cached(lambda *_: None, step, size, True)}, unique, peer.visits)


def x_transformers_looped(shape: Shape, loops: int = 2) -> Decoder:
    """`looped=True` of x-transformers: all layers in each loop, `(A B)^2`, by a batch of one.

    It insists on norms behind its residual sums and has the last norm in each loop, so it is not quite the same model. A token's
    loops read of the prompt the keys and values of their own loop, and of what was decoded those of the last loop only.
    """
    from x_transformers import Decoder as Layers, TransformerWrapper

    flat = dataclasses.replace(shape, rounds=1)
    plain = x_transformers(flat, pre_and_post_norm=True)
    layers = plain.model.attn_layers
    assert isinstance(layers, Layers)
    model = TransformerWrapper(
        num_tokens=shape.vocabulary,
        max_seq_len=shape.length,
        attn_layers=layers,
        tie_embedding=shape.tied,
        looped=True,
        max_looped_steps=loops,
    )
    visits = loops * len(flat.order)
    full = lambda tokens: model(tokens, looped_steps=loops)

    def step(tokens, cache):
        logits, cache = model(
            tokens,
            cache=cache,
            input_not_include_cache=True,
            return_intermediates=True,
            looped_inference=True,
            looped_steps=loops,
        )
        return logits[:, -1], cache

    def size(cache) -> int:
        held = [x for inter in cache.attn_intermediates for x in inter.cached_kv]
        held += [x for loop in cache.looped_prompt_kv_cache or () for pair in loop for x in pair]
        return sum(x.nbytes for x in held)

    peer = Peer(model, full, visits, visits)
    return Decoder(peer, {"dynamic": Cached(lambda *_: None, step, size, True)}, len(flat.order), visits, 1)


DECODERS: dict[str, tuple[str, Callable[[Shape], Decoder]]] = {
    "llama": ("transformers", lambda shape: from_transformers(llama(shape), len(shape.order))),
    "hrm_text": ("transformers", lambda shape: from_transformers(hrm_text(shape), sum(shape.split))),
    "x-transformers": ("x-transformers", lambda shape: from_x_transformers(x_transformers(shape), sum(shape.split))),
    "x-transformers looped": ("x-transformers", x_transformers_looped),
}
"""The package of each peer, and what builds it."""


def make_prompts(shape: Shape, batch: int, length: int) -> Any:
    """Tokens `[batch, length]`, int64, as a NumPy array; the same in every process."""
    import numpy as np

    return np.random.default_rng(shape.seed).integers(0, shape.vocabulary, (batch, length))


@dataclasses.dataclass(frozen=True)
class Point:
    """What is decoded: `steps` tokens behind each of `batch` prompts, by a cache of `capacity` tokens."""

    prompt: int
    capacity: int
    batch: int = 1
    steps: int = 32

    def __post_init__(self):
        if min(self.prompt, self.batch) < 1 or self.steps < 2 or self.prompt + self.steps > self.capacity:
            raise ValueError(
                f"prompt and batch are at least 1, steps at least 2, and prompt + steps at most capacity, got {self}"
            )

    @property
    def filled(self) -> float:
        """How many tokens a step of one token finds in the cache, on average over the steps."""
        return self.prompt + self.steps / 2 - 1


def timed(decode: Callable[[], dict[str, float]], seconds: float) -> dict[str, list[float]]:
    """What `decode` has measured, as often as fits, at least once."""
    found: dict[str, list[float]] = {}
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        for name, value in decode().items():
            found.setdefault(name, []).append(value)
    return found


class Worker:
    """Answers requests about one peer."""

    def __init__(self):
        self.decoder: Decoder | None = None
        self.shape = Shape()
        self.steps: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {}
        self.fastest: dict[Point, str] = {}

    def build(self, name: str, compile: bool = False, **fields: Any) -> dict[str, Any]:
        if name not in DECODERS:
            raise ValueError(f"peers are {', '.join(map(repr, DECODERS))}, got {name!r}")
        if self.decoder is not None:
            raise ValueError("a worker builds one peer; start another worker for the next")
        import torch

        self.shape = shape = Shape(**fields)
        package, builder = DECODERS[name]
        torch.set_num_threads(shape.threads)
        torch.manual_seed(shape.seed)
        self.decoder = decoder = builder(shape)
        peer = decoder.peer
        peer.model.eval()
        caches = decoder.caches
        if compile and any(not cache.dynamic for cache in caches.values()):
            # A cache that grows would be compiled again and again.
            caches = {kind: cache for kind, cache in caches.items() if not cache.dynamic}
        self.steps = {
            kind: torch.compile(cache.step, dynamic=cache.dynamic) if compile else cache.step
            for kind, cache in caches.items()
        }
        sizes = {name: p.nbytes for name, p in peer.model.named_parameters()}
        layers = sum(size for name, size in sizes.items() if ".layers." in name)
        rest = sum(size for name, size in sizes.items() if ".layers." not in name and not _embedding(name, shape.tied))
        return {
            "name": name,
            "compile": compile,
            "shape": dataclasses.asdict(shape),
            "parameters": sum(p.numel() for p in peer.model.parameters()),
            "visits": peer.visits,
            "slots": decoder.slots,
            "largest_batch": decoder.largest_batch,
            "weights_once": layers + rest,
            "weights_per_visit": layers * peer.visits // decoder.unique + rest,
            "versions": {name: version(name) for name in ("torch", package)},
        }

    def prepare(self, **fields: Any) -> dict[str, Any]:
        point = Point(**fields)
        start = time.perf_counter()
        token_s = {}
        for kind in self.steps:
            # The first run compiles, and finds memory for the cache.
            self._decode(kind, point)
            token_s[kind] = min(self._decode(kind, point)[1] for _ in range(3 if len(self.steps) > 1 else 1))
        self.fastest[point] = min(token_s, key=token_s.__getitem__)
        return {"cache": self.fastest[point], "token_s": token_s, "prepare_s": time.perf_counter() - start}

    def run(self, seconds: float, **fields: Any) -> dict[str, Any]:
        point = Point(**fields)
        if point not in self.fastest:
            raise ValueError(f"send a prepare for {point} first")
        kind, size = self.fastest[point], 0

        def decode() -> dict[str, float]:
            nonlocal size
            first, token, size = self._decode(kind, point)
            return {"first_s": first, "token_s": token}

        return {**timed(decode, seconds), "cache": kind, "cache_bytes": size}

    def check(self, prompt: int, steps: int, capacity: int) -> dict[str, Any]:
        """Greedy tokens, and the logits that they were chosen by, beside those of the forward pass over all tokens so far."""
        import torch

        assert self.decoder is not None
        worst: dict[str, Any] = {}
        for kind in self.steps:
            with torch.inference_mode():
                tokens = torch.from_numpy(make_prompts(self.shape, 1, prompt))
                cached = self._greedy(kind, tokens, Point(prompt, capacity, 1, steps))
                full = tokens
                for _ in range(steps):
                    full = torch.cat([full, self.decoder.peer.logits(full)[:, -1].argmax(-1, keepdim=True)], -1)
                # The same tokens for both, so that one other token does not make all after it differ.
                chosen = torch.cat([tokens, *(token for token, _ in cached)], -1)
                expected = self.decoder.peer.logits(chosen)[0, prompt - 1 : -1]
                difference = torch.stack([logits[0] for _, logits in cached]) - expected
                found = {
                    "equal": bool((full == chosen).all()),
                    "logit_difference": float(difference.abs().max()),
                    "logit_deviation": float(expected.std()),
                }
            if not worst or found["logit_difference"] > worst["logit_difference"]:
                worst = found
        return worst

    def _greedy(self, kind: str, tokens: Any, point: Point) -> list[tuple[Any, Any]]:
        """Tokens, and the logits that each was chosen by."""
        assert self.decoder is not None
        cached = self.decoder.caches[kind]
        logits, cache = cached.step(tokens, cached.new(point.batch, point.capacity))
        out = [(logits.argmax(-1, keepdim=True), logits)]
        for _ in range(point.steps - 1):
            logits, cache = self.steps[kind](out[-1][0], cache)
            out.append((logits.argmax(-1, keepdim=True), logits))
        return out

    def _decode(self, kind: str, point: Point) -> tuple[float, float, int]:
        """Seconds of the first token and of each one after it, and the bytes of the cache."""
        import torch

        assert self.decoder is not None
        cached, step = self.decoder.caches[kind], self.steps[kind]
        prompts = torch.from_numpy(make_prompts(self.shape, point.batch, point.prompt))
        with torch.inference_mode():
            start = time.perf_counter()
            logits, cache = cached.step(prompts, cached.new(point.batch, point.capacity))
            token = logits.argmax(-1, keepdim=True)
            first = time.perf_counter()
            for _ in range(point.steps - 1):
                logits, cache = step(token, cache)
                token = logits.argmax(-1, keepdim=True)
            end = time.perf_counter()
        return first - start, (end - first) / (point.steps - 1), cached.size(cache)


def _embedding(name: str, tied: bool) -> bool:
    """Whether a parameter is a table of which a token reads one row."""
    return not tied and ("embed_tokens" in name or "token_emb" in name)


if __name__ == "__main__":
    worker = Worker()
    serve({name: getattr(worker, name) for name in ("build", "prepare", "run", "check")})
