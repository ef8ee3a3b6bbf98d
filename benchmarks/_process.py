"""A worker process of a benchmark, from the side of who asks."""

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A worker answered by an error, or left."""


class Process:
    """A worker process, asked line by line."""

    def __init__(self, python: Path | str, script: str, threads: int, log: Path):
        self._log = log
        # The same cores for all: XLA has no other limit, and takes as many threads as it has cores.
        cores = sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_setaffinity") else []
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name(script))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            preexec_fn=(lambda: os.sched_setaffinity(0, cores)) if cores else None,
        )

    def ask(self, limit: float | None = None, **request: Any) -> dict[str, Any]:
        """The answer to a request. A worker that takes more than `limit` seconds is ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = None if limit is None else threading.Timer(limit, self._process.kill)
        if timer is not None:
            timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            late = timer is not None and not timer.is_alive()
            if timer is not None:
                timer.cancel()
        if not line:
            if late:
                raise Failed(f"no answer within {limit:g} s; what the worker printed is in {self._log}")
            raise Failed(f"the worker left; what it printed is in {self._log}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def cpu(self) -> float | None:
        """Seconds of processor time that the worker has taken, where the system tells."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        if not stat.exists():
            return None
        # Fields 14 and 15; the second, the name, is in parentheses and may have spaces.
        fields = stat.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
