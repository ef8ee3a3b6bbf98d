"""Configures hypothesis and JAX once for the whole suite."""

import gc
import importlib.metadata
import os
import pathlib
import tempfile


# Eight host devices, so that the sharding tests run on any machine. Must precede the first use of JAX.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Almost all the time goes to compiling small programs that run once. The processes that tests start inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Kernels by the older of its two emitters, which later versions lack, compile in a third of the time.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # What one process compiled is loaded by the others, and by those that tests start; removed at the end.
    compiled = tempfile.TemporaryDirectory(prefix="rinsx-compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import pytest


# Tracing makes many objects and few cycles: collected as often as Python does by default, a tenth of the time goes there.
gc.set_threshold(50_000, 20, 100)

# Without shrinking: an example compiles, so making a failure smaller can take hours.
phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
# The same examples on every run, and fewer of them where the suite runs on a second Python.
count = int(os.environ.get("RINSX_EXAMPLES", 25))
hypothesis.settings.register_profile("rinsx", deadline=None, max_examples=count, phases=phases, derandomize=True)
hypothesis.settings.load_profile("rinsx")


def pytest_xdist_auto_num_workers(config):
    """Files named on the command line run in this process, which starts sooner and can be looked into."""
    return None if all(pathlib.Path(path).is_dir() for path in config.args) else 0


@pytest.fixture(autouse=True, scope="module")
def _fresh_caches():
    """Compiled programs pile up over a long suite; each module starts without those of the last."""
    yield
    jax.clear_caches()
