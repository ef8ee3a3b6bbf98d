"""Where metrics go: JSON lines, the terminal, TensorBoard."""

import abc
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any, final

import jax

from ._json import encode


class AbstractLog(abc.ABC):
    """Takes the metrics of a run, step by step. With many processes, only process 0 has logs.

    Whoever makes a log closes it: it is a context manager.
    """

    @abc.abstractmethod
    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """**Arguments:**

        - `step`: how many steps are done.
        - `metrics`: numbers by name: Python's, or scalar arrays.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Called once, after the last step."""

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@final
class JsonLines(AbstractLog):
    """Appends a line of JSON for each step to a file: `{"step": 10, "loss": 2.5}`.

    Infinities and NaN, which JSON has no numbers for, become `null`. The first `write` of a run that goes on from a checkpoint drops
    lines of its own step and later ones, and a last line that was cut, so that no step stands twice.

    !!! example

        ```python
        import pathlib
        import tempfile

        import rinsx as rx

        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "metrics.jsonl"
            log = rx.train.JsonLines(path)
            log.write(10, {"loss": 2.5})
            log.close()
            path.read_text()  # '{"step": 10, "loss": 2.5}\\n'
        ```
    """

    def __init__(self, path: str | os.PathLike, *, resume: int | None = None):
        """**Arguments:**

        - `path`: the file, made where it is missing.
        - `resume`: the step that the run goes on from: lines of later steps are dropped at once, before anything is written.
        """
        self._path = pathlib.Path(path)
        self._file: Any = None
        if resume is not None:
            self._drop(resume + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._file is None:
            self._drop(step)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")
        self._file.write(json.dumps({"step": int(step), **encode(metrics)}, allow_nan=False) + "\n")
        # To the operating system at once: a killed run has its lines.
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _drop(self, first: int) -> None:
        if not self._path.exists():
            return
        text = self._path.read_text("utf-8")
        lines = text.splitlines(keepends=True)
        kept = []
        for i, line in enumerate(lines):
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                if i + 1 == len(lines):
                    continue
                raise ValueError(
                    f"line {i + 1} of {self._path} is not a line of metrics: {line.strip()[:80]!r}"
                ) from None
            if step < first and line.endswith("\n"):
                kept.append(line)
        if len(kept) < len(lines):
            staged = self._path.with_name(self._path.name + ".new")
            staged.write_text("".join(kept), "utf-8")
            os.replace(staged, self._path)


@final
class Progress(AbstractLog):
    """Shows a run in the terminal: loss, tokens per second, FLOPs per second, model-FLOPs utilisation where the peak is known, and
    the time left. Where there is no terminal, plain lines at intervals.

    Reads the metrics `loss`, and `tokens` and `flops` done since the start of training, where they are given.

    !!! example

        ```python
        import rinsx as rx

        log = rx.train.Progress(100, interval=0.0)
        log.write(50, {"loss": 2.5, "tokens": 51200, "flops": 3 * 10**9})
        log.close()
        ```
    """

    def __init__(
        self,
        total_steps: int,
        *,
        peak: float | None = None,
        interval: float = 30.0,
        console: Any = None,
    ):
        """**Arguments:**

        - `total_steps`: the step at which the run ends, at least 1.
        - `peak`: FLOPs per second of all devices together; by default [`rinsx.train.peak_flops`][] times their number.
        - `interval`: seconds from one plain line to the next, where there is no terminal. The last step always has one.
        - `console`: a `rich.console.Console`; by default the terminal.
        """
        if total_steps < 1:
            raise ValueError(f"`total_steps` must be at least 1; got {total_steps}.")
        from rich.console import Console
        from rich.live import Live

        one = peak_flops()
        self._total, self._interval = total_steps, interval
        self._peak = peak if peak is not None else None if one is None else one * jax.device_count()
        self._console = Console() if console is None else console
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        self._first: tuple[float, int, dict[str, Any]] | None = None
        self._last = -float("inf")
        if self._live is not None:
            self._live.start()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        now, metrics = time.monotonic(), encode(metrics)
        if self._first is None:
            self._first = now, step, metrics
        text = self._text(now, step, metrics)
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(text))
        elif now - self._last >= self._interval or step >= self._total:
            self._last = now
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _text(self, now: float, step: int, metrics: Mapping[str, Any]) -> str:
        assert self._first is not None
        start, first, before = self._first
        seconds = now - start
        parts = [f"step {step}/{self._total}"]
        if "loss" in metrics:
            loss = metrics["loss"]
            parts.append(f"loss {'not finite' if loss is None else format(loss, '.4f')}")

        def rate(name):
            a, b = before.get(name), metrics.get(name)
            return None if a is None or b is None or seconds <= 0 or b <= a else (b - a) / seconds

        if (tokens := rate("tokens")) is not None:
            parts.append(f"{_short(tokens)}tokens/s")
        if (flops := rate("flops")) is not None:
            parts.append(f"{_short(flops)}FLOP/s")
            if self._peak is not None:
                parts.append(f"{flops / self._peak:.1%} of peak")
        if step > first and seconds > 0:
            left = round(seconds / (step - first) * max(self._total - step, 0))
            parts.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return "  ".join(parts)


@final
class TensorBoard(AbstractLog):
    """Writes scalars for TensorBoard. Needs `pip install 'rinsx[tensorboard]'`.

    !!! example

        ```python
        import tempfile

        import rinsx as rx

        with tempfile.TemporaryDirectory() as folder:
            log = rx.train.TensorBoard(folder)
            log.write(10, {"loss": 2.5})
            log.close()
        ```
    """

    def __init__(self, folder: str | os.PathLike, *, resume: int | None = None):
        """**Arguments:**

        - `folder`: where the event files go.
        - `resume`: the step that the run goes on from; TensorBoard hides what was written after it.
        """
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard needs tensorboardX: pip install 'rinsx[tensorboard]'") from error
        self._writer = SummaryWriter(str(folder), purge_step=None if resume is None else resume + 1)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        self._writer.close()


# Dense bf16 FLOPs per second of one device, as JAX sees it, by the start of `device_kind` in lower case. NVIDIA: data sheets of
# B200, H200, H100, A100, L40S and L4, half of figures given "with sparsity". Google: cloud.google.com/tpu/docs, system
# architecture; a chip of v2 and v3 is two devices. The longer name stands first.
_PEAKS = (
    ("nvidia b200", 2250e12),
    ("nvidia h200", 989e12),
    ("nvidia gh200", 989e12),
    ("nvidia h100 pcie", 756e12),
    ("nvidia h100 nvl", 835e12),
    ("nvidia h100", 989e12),
    ("nvidia a100", 312e12),
    ("nvidia l40s", 362e12),
    ("nvidia l4", 121e12),
    ("tpu v6", 918e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5p", 459e12),
    ("tpu v5", 459e12),
    ("tpu v4", 275e12),
    ("tpu v3", 61.5e12),
    ("tpu v2", 22.5e12),
)


def peak_flops(device: Any = None) -> float | None:
    """The most FLOPs per second that a device can do in bf16 on dense matrices, by its maker's figures.

    !!! example

        ```python
        import rinsx as rx

        rx.train.peak_flops()  # None on a CPU
        ```

    **Arguments:**

    - `device`: by default the first.

    **Returns:**

    FLOPs per second, or `None` where they are not known: always on a CPU.
    """
    kind = (jax.devices()[0] if device is None else device).device_kind.lower()
    for name, peak in _PEAKS:
        rest = kind[len(name) :]
        # "nvidia l40" is not an L4.
        if kind.startswith(name) and not rest[:1].isdigit():
            return peak
    return None


def _short(number: float) -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g} "
