"""Logs, and the peaks of accelerators."""

import io
import json
import types

import numpy as np
import pytest
import rich.console

from rinsx import train


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text("utf-8").splitlines()]


def test_json_lines_hold_every_number(tmp_path):
    log = train.JsonLines(tmp_path / "a" / "log.jsonl")
    log.write(1, {"loss": np.float32(0.1), "n": 2**53 + 1, "bad": float("nan"), "worse": -float("inf")})
    log.close()
    line = (tmp_path / "a" / "log.jsonl").read_text("utf-8")
    refuse = lambda name: pytest.fail(f"{name} is not JSON")
    found = json.loads(line, parse_constant=refuse)
    assert found == {"step": 1, "loss": float(np.float32(0.1)), "n": 2**53 + 1, "bad": None, "worse": None}


def test_json_lines_have_no_step_twice(tmp_path):
    path = tmp_path / "log.jsonl"
    log = train.JsonLines(path)
    for step in range(1, 8):
        log.write(step, {"loss": 1.0})
    log.close()
    # Killed while writing.
    path.write_text(path.read_text("utf-8") + '{"step": 8, "lo', "utf-8")
    log = train.JsonLines(path, resume=5)
    assert steps(path) == [1, 2, 3, 4, 5]
    log.write(6, {})
    log.close()
    log = train.JsonLines(path)
    log.write(4, {})
    log.write(5, {})
    log.close()
    assert steps(path) == [1, 2, 3, 4, 5]
    log = train.JsonLines(path, resume=5)
    log.close()
    assert steps(path) == [1, 2, 3, 4, 5]


def test_a_file_of_something_else_is_not_touched(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n', "utf-8")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 2 of .*hello"):
        train.JsonLines(path, resume=1)
    assert path.read_bytes() == before


def progress(**options):
    text = io.StringIO()
    console = rich.console.Console(file=text, width=40, **options)
    return text, console


def test_progress_without_a_terminal_is_plain_lines_at_intervals():
    text, console = progress(force_terminal=False)
    log = train.Progress(1000, peak=1e15, interval=3600.0, console=console)
    for step in range(1, 1001):
        log.write(step, {"loss": 2.5 if step < 1000 else float("nan"), "tokens": 10 * step, "flops": 10**6 * step})
    log.close()
    lines = text.getvalue().splitlines()
    assert len(lines) == 2 and "\x1b" not in text.getvalue()
    assert lines[0] == "step 1/1000  loss 2.5000"
    for part in ("step 1000/1000", "loss not finite", "tokens/s", "FLOP/s", "% of peak", "0:00:00 left"):
        assert part in lines[1]


def test_progress_on_a_terminal_is_live():
    text, console = progress(force_terminal=True)
    log = train.Progress(10, console=console)
    log.write(5, {"loss": 2.5})
    log.close()
    assert "loss 2.5000" in text.getvalue() and "\x1b" in text.getvalue()
    with pytest.raises(ValueError, match="got 0"):
        train.Progress(0)


def test_tensorboard_writes_events(tmp_path):
    pytest.importorskip("tensorboardX")
    log = train.TensorBoard(tmp_path)
    log.write(3, {"loss": np.float32(2.5)})
    log.close()
    (path,) = tmp_path.glob("events*")
    assert b"loss" in path.read_bytes()


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("cpu", None),
    ],
)
def test_peaks(kind, peak):
    assert train.peak_flops(types.SimpleNamespace(device_kind=kind)) == peak
