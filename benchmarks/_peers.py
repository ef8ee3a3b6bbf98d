# pyright: reportMissingImports=false
"""PyTorch peers of `benchmarks/training.py`: each is built and timed in a process of its own.

    python benchmarks/_peers.py --list   # the names of the peers, as JSON
    python benchmarks/_peers.py          # a worker: one JSON object a line on standard input, one answer a line

The worker's Python needs `torch`, `x-transformers`, `transformers` and `numpy`, and neither JAX nor rinsx. A worker builds
one peer, once, so that its memory is that peer's alone. It answers

- `{"cmd": "build", "name": ..., "compile": false, "width": 256, ...}`, with the fields of `Shape`, by the numbers of parameters,
  the layers that a token visits, versions, and the seconds and bytes of importing;
- `{"cmd": "run", "steps": n}` by `seconds`, one float for each step, and by `loss` (of the last step, in nats) and memory;
- `{"cmd": "quit"}`, or the end of its input, by leaving;
- whatever fails by `{"error": ...}`.

A step is the forward and backward pass and the update of AdamW, on the same random tokens each time, in float32, by
PyTorch's CPU kernels with `threads` threads. Memory is resident memory of the process in bytes: `import_rss` once everything is
imported, `peak_rss` the most so far.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """What all peers share: a byte model `A^r B` of pre-norm layers with rotary attention and SwiGLU, without biases."""

    width: int = 256
    """The size of the state."""
    heads: int = 4
    """Heads of attention."""
    hidden: int = 688
    """The size inside SwiGLU."""
    split: tuple[int, int] = (2, 2)
    """The layers in A and in B."""
    rounds: int = 3
    """How often A runs; 1 is `A B`."""
    vocabulary: int = 257
    """How many tokens there are."""
    length: int = 128
    """The tokens of a row."""
    batch: int = 4
    """The rows of a batch."""
    tied: bool = False
    """Whether the head is the embedding."""
    learning_rate: float = 1e-3
    """Of AdamW."""
    threads: int = 2
    """On how many cores everything runs."""
    seed: int = 0
    """Of the tokens."""

    def __post_init__(self):
        object.__setattr__(self, "split", tuple(self.split))
        if self.width % (2 * self.heads):
            raise ValueError(f"rotary heads need an even size, got width {self.width} over {self.heads} heads")
        if len(self.split) != 2 or min(*self.split, self.rounds) < 1:
            raise ValueError(f"split is two positive integers and rounds is one, got {self.split} and {self.rounds}")

    @property
    def order(self) -> tuple[int, ...]:
        """The layers in the order of their visits, such as `0 1 0 1 0 1 2 3`."""
        a, b = self.split
        return tuple(range(a)) * self.rounds + tuple(range(a, a + b))


@dataclasses.dataclass(frozen=True)
class Peer:
    """A model, with the function from tokens `[batch, length]` to logits `[batch, length, vocabulary]`.

    `visits` is how many layers a token passes through, and `gradient_visits` how many of these the gradient flows through.
    """

    model: Any
    logits: Callable[[Any], Any]
    visits: int
    gradient_visits: int


def x_transformers(shape: Shape, attention: str = "flash", **options: Any) -> Peer:
    """x-transformers runs `A^r B` itself, by `layers_execute_order`.

    That order counts sub-layers: layer `i` is attention `2 i` and feed-forward `2 i + 1`. The gradient flows through every
    visit. Its GLU always has a bias, which is taken out. A tied head is scaled by `width ** -0.5`. `options` go to its layers.
    """
    from torch import nn
    from x_transformers import Decoder, TransformerWrapper

    size = shape.width // shape.heads
    layers = Decoder(
        dim=shape.width,
        depth=sum(shape.split),
        heads=shape.heads,
        attn_dim_head=size,
        attn_flash=attention == "flash",
        rotary_pos_emb=True,
        rotary_emb_dim=size,
        use_rmsnorm=True,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
        # The package truncates `width * mult` to an integer.
        ff_mult=(shape.hidden + 0.5) / shape.width,
        layers_execute_order=tuple(2 * i + part for i in shape.order for part in (0, 1)),
        verbose=False,
        **options,
    )
    for module in layers.modules():
        if isinstance(module, nn.Linear):
            module.register_parameter("bias", None)
    model = TransformerWrapper(
        num_tokens=shape.vocabulary, max_seq_len=shape.length, attn_layers=layers, tie_embedding=shape.tied
    )
    return Peer(model, model, len(shape.order), len(shape.order))


def hrm_text(shape: Shape, gradient: str = "full") -> Peer:
    """The nearest of transformers' `hrm_text` to `A^r B`: one high cycle of r low cycles.

    Equal: width, heads, hidden size, vocabulary, unique layers, and the order of visits. Its low stack L is A and its high
    stack H is B, and one high cycle runs L r times, then H once. Not equal:

    - Each round starts from `z + embedding`, with z = 0 at first, and H from `embedding + z`. That is additive input injection.
    - Attention has a sigmoid gate, one more matrix `width x width` in each layer.
    - The norms have no weights, and there is one more after each visit of a stack.
    - Both stacks are equally deep.

    The cycles are set in its config. `gradient="full"` lets the gradient through all r
    low cycles. `gradient="truncated"` is the default of its config: low cycles before the last two run under `no_grad`. It is not
    the one-step gradient of the first HRM: with several high cycles, the high state is never detached, each of the earlier high
    cycles keeps its last low cycle and the last keeps two.
    """
    from transformers import HrmTextConfig, HrmTextForCausalLM

    a, b = shape.split
    if a != b:
        raise ValueError(f"both stacks of hrm_text are equally deep, got a split of {shape.split}")
    kept = shape.rounds if gradient == "full" else min(2, shape.rounds)
    config = HrmTextConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=a,
        num_attention_heads=shape.heads,
        head_dim=shape.width // shape.heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=shape.tied,
        H_cycles=1,
        L_cycles=shape.rounds,
        L_bp_cycles=[kept],
        prefix_lm=False,
        use_cache=False,
    )
    model = HrmTextForCausalLM(config)
    return Peer(model, lambda tokens: model(tokens).logits, len(shape.order), kept * a + b)


def llama(shape: Shape) -> Peer:
    """transformers' Llama with a layer of its own for each visit: `A^r B` untied, without any recursion.

    The same work forward and backward, with more parameters for the optimiser to update.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=len(shape.order),
        num_attention_heads=shape.heads,
        max_position_embeddings=shape.length,
        tie_word_embeddings=shape.tied,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    return Peer(model, lambda tokens: model(tokens).logits, len(shape.order), len(shape.order))


PEERS: dict[str, tuple[str, Callable[[Shape], Peer]]] = {
    "x-transformers": ("x-transformers", x_transformers),
    "x-transformers plain attention": ("x-transformers", lambda shape: x_transformers(shape, "plain")),
    "hrm_text": ("transformers", hrm_text),
    "hrm_text truncated": ("transformers", lambda shape: hrm_text(shape, "truncated")),
    "llama": ("transformers", llama),
}
"""The package of each peer, and what builds it."""


def make_tokens(shape: Shape) -> tuple[Any, Any]:
    """Inputs and targets `[batch, length]`, int64, as NumPy arrays; the same in every process."""
    import numpy as np

    row = np.random.default_rng(shape.seed).integers(0, shape.vocabulary, (shape.batch, shape.length + 1))
    return row[:, :-1], row[:, 1:]


def make_step(peer: Peer, shape: Shape, compiled: bool) -> Callable[[], float]:
    """A training step that returns its loss in nats. The first call compiles, where `compiled`."""
    import torch
    from torch.nn.functional import cross_entropy

    inputs, targets = (torch.from_numpy(x.copy()) for x in make_tokens(shape))
    optimiser = torch.optim.AdamW(peer.model.parameters(), lr=shape.learning_rate, fused=True)

    def loss(inputs, targets):
        return cross_entropy(peer.logits(inputs).flatten(0, 1), targets.flatten())

    if compiled:
        loss = torch.compile(loss)

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        value = loss(inputs, targets)
        value.backward()
        optimiser.step()
        return value.item()

    return step


def memory() -> tuple[int, int]:
    """Resident memory in bytes: now, and the most so far."""
    status = Path("/proc/self/status")
    if status.exists():
        # `ru_maxrss` outlives `exec`, so that of a child starts at the peak of the process that started it.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


class Worker:
    """Answers requests about one peer."""

    def __init__(self):
        self.step: Callable[[], float] | None = None
        self.import_rss = 0

    def build(self, name: str, compile: bool = False, **fields: Any) -> dict[str, Any]:
        if name not in PEERS:
            raise ValueError(f"peers are {', '.join(map(repr, PEERS))}, got {name!r}")
        if self.step is not None:
            raise ValueError("a worker builds one peer; start another worker for the next")
        shape = Shape(**fields)
        package, builder = PEERS[name]
        start = time.perf_counter()
        _warm_imports(shape, builder, compile)
        import_s = time.perf_counter() - start
        self.import_rss, _ = memory()
        import torch

        start = time.perf_counter()
        torch.manual_seed(shape.seed)
        peer = builder(shape)
        peer.model.train()
        step = make_step(peer, shape, compile)
        step()
        self.step = step
        trained = [p for p in peer.model.parameters() if p.requires_grad]
        return {
            "name": name,
            "compile": compile,
            "shape": dataclasses.asdict(shape),
            "parameters": sum(p.numel() for p in trained),
            "visits": peer.visits,
            "gradient_visits": peer.gradient_visits,
            "tokens_per_step": shape.batch * shape.length,
            "import_s": import_s,
            "build_s": time.perf_counter() - start,
            "import_rss": self.import_rss,
            "versions": {name: version(name) for name in ("torch", package)},
        }

    def run(self, steps: int) -> dict[str, Any]:
        if self.step is None:
            raise ValueError("nothing to run: send a build first")
        if steps < 1:
            raise ValueError(f"steps is at least 1, got {steps}")
        seconds, loss = [], 0.0
        for _ in range(steps):
            start = time.perf_counter()
            loss = self.step()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "loss": loss, "import_rss": self.import_rss, "peak_rss": memory()[1]}


def _warm_imports(shape: Shape, builder: Callable[[Shape], Peer], compiled: bool) -> None:
    """Imports all that a step needs, what PyTorch imports lazily too, by a step of a tiny model."""
    import torch

    torch.set_num_threads(shape.threads)
    tiny = Shape(width=8, heads=1, hidden=8, split=(1, 1), rounds=1, vocabulary=8, length=4, batch=1)
    make_step(builder(tiny), tiny, False)()
    if compiled:
        import torch._inductor.compile_fx


def serve(commands: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers requests, a line of JSON each, until `quit` or the end of the input."""
    # Whatever a library or a compiler prints must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise TypeError(f"a request is a JSON object, got {line.strip()[:80]!r}")
            command = request.pop("cmd", None)
            if command == "quit":
                return
            if command not in commands:
                raise ValueError(f"commands are {', '.join(commands)} and quit, got {command!r}")
            answer = commands[command](**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")


def main() -> None:
    if sys.argv[1:] == ["--list"]:
        print(json.dumps(list(PEERS)))
        return
    if sys.argv[1:]:
        raise SystemExit(f"the only option is --list, got {' '.join(sys.argv[1:])!r}")
    worker = Worker()
    serve({"build": worker.build, "run": worker.run})


if __name__ == "__main__":
    main()
