"""A worker process of a benchmark, from the side of who asks."""

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A worker answered by an error, or left."""


class Process:
    """A worker process, asked line by line."""

    def __init__(
        self, python: Path | str, script: str, threads: int, log: Path, environment: Mapping[str, str] | None = None
    ):
        self._log = log
        # The same cores for all: XLA has no other limit, and takes as many threads as it has cores.
        cores = sorted(os.sched_getaffinity(0))[:threads] if hasattr(os, "sched_setaffinity") else []
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name(script))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=os.environ | dict(environment or {}),
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

    def restart_peak(self) -> None:
        """From now on the worker's peak of resident memory is counted anew, where the system can do so."""
        clear = Path(f"/proc/{self._process.pid}/clear_refs")
        if clear.exists():
            clear.write_text("5")

    @contextlib.contextmanager
    def all_memory(self) -> Iterator[list[int]]:
        """Meanwhile watches the resident memory of the worker and of all that it has started, such as compilers: the list's
        only number is the most of it, in bytes, or it is empty where the system does not tell."""
        found: list[int] = []
        if not Path("/proc/self/statm").exists():
            yield found
            return
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.02):
                found[:] = [max([sum(map(_resident, _family(self._process.pid))), *found])]

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            ended.set()
            thread.join()

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


def _family(pid: int) -> list[int]:
    """A process and all those below it."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            below.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    family = [pid]
    for one in family:
        family += below.get(one, [])
    return family


def _resident(pid: int) -> int:
    """Resident bytes; none of a process that has left."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
