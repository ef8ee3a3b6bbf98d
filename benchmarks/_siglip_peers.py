# pyright: reportMissingImports=false
"""transformers' SigLIP on PyTorch, as a worker of `benchmarks/siglip_speed.py`.

    python benchmarks/_siglip_peers.py   # a worker: one JSON object a line on standard input, one answer a line

The worker's Python needs `torch`, `transformers`, `safetensors` and `numpy`, and neither JAX nor rinsx. It answers

- `{"cmd": "build", "folder": ..., "compiled": false, "threads": 2, "batch": {...}, "adamw": {...}}` by nothing: the weights are
    those of the folder, `batch` has the arguments of `make_batch`, and `adamw` those of `torch.optim.AdamW`;
- `{"cmd": "versions"}` by versions of packages;
- `{"cmd": "check", "steps": n}` by the losses of the first steps and the norm of the first gradient;
- `{"cmd": "run", "what": "step" or "embed", "calls": n}` by the seconds of all of them together;
- `{"cmd": "quit"}`, or the end of its input, by leaving;
- whatever fails by `{"error": ...}`.
"""

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from _peers import serve


def make_batch(size: int, context: int, vocabulary: int, batch: int, seed: int = 0) -> tuple[Any, Any]:
    """Images `[batch, size, size, 3]`, float32, and tokens `[batch, context]`, int32; the same in every process."""
    import numpy as np

    rng = np.random.default_rng(seed)
    images = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    return images, rng.integers(0, vocabulary, (batch, context), np.int32)


class Worker:
    """Answers requests about one model, as it is or under `torch.compile`."""

    def __init__(self):
        self.calls: dict[str, Callable[[], float]] = {}
        self.model: Any = None

    def build(
        self, folder: str, compiled: bool, threads: int, batch: dict[str, int], adamw: dict[str, Any]
    ) -> dict[str, Any]:
        import torch
        from transformers import SiglipModel

        torch.set_num_threads(threads)
        self.model = model = SiglipModel.from_pretrained(folder, attn_implementation="sdpa").train()
        images, tokens = make_batch(**batch)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        ids = torch.from_numpy(tokens).long()
        optimiser = torch.optim.AdamW(model.parameters(), fused=True, **adamw)

        def loss():
            return model(input_ids=ids, pixel_values=pixels, return_loss=True).loss

        def embed():
            out = model(input_ids=ids, pixel_values=pixels)
            return out.image_embeds, out.text_embeds

        if compiled:
            loss, embed = torch.compile(loss), torch.compile(embed)

        def step() -> float:
            optimiser.zero_grad(set_to_none=True)
            value = loss()
            value.backward()
            optimiser.step()
            return value.item()

        def embeddings() -> float:
            with torch.inference_mode():
                return embed()[0][0, 0].item()

        self.calls = {"step": step, "embed": embeddings}
        return {}

    def versions(self) -> dict[str, Any]:
        return {name: version(name) for name in ("torch", "transformers")}

    def check(self, steps: int) -> dict[str, Any]:
        import torch

        losses, norm = [], 0.0
        for i in range(steps):
            losses.append(self.calls["step"]())
            if i == 0:
                norm = float(torch.stack([p.grad.norm() for p in self.model.parameters() if p.grad is not None]).norm())
        return {"losses": losses, "norm": norm}

    def run(self, what: str, calls: int) -> dict[str, Any]:
        if what not in self.calls:
            raise ValueError(f"build first, then run one of step and embed; got {what!r}")
        start = time.perf_counter()
        for _ in range(calls):
            self.calls[what]()
        return {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    worker = Worker()
    serve({name: getattr(worker, name) for name in ("build", "versions", "check", "run")})
