"""Memory that was freed, given back to the system."""

import ctypes
import gc
import sys


def release() -> None:
    """Gives back what is freed but kept by the C library for later, where that is glibc; elsewhere does nothing.

    Compiling a small model frees over 100 MiB that stay in the heaps of the compiler's threads, where the large buffers of a step
    never go: without this they count in the memory of the process until its end.
    """
    if not sys.platform.startswith("linux"):
        return
    # musl has no such function, and keeps little.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        gc.collect()
        trim(ctypes.c_size_t(0))
