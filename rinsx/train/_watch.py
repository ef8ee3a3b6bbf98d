"""How long the steps take."""

import contextlib
import time


class Watch:
    """Times the steps, but for the first call, which compiles, and for what is not a step."""

    def __init__(self):
        self.seconds, self.mark = 0.0, None

    def lap(self) -> float | None:
        """The seconds since the last lap, `None` at the first."""
        now, mark = time.perf_counter(), self.mark
        self.mark = now
        if mark is None:
            return None
        self.seconds += now - mark
        return now - mark

    @contextlib.contextmanager
    def paused(self):
        begin = time.perf_counter()
        yield
        if self.mark is not None:
            self.mark += time.perf_counter() - begin
