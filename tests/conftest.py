"""Configures hypothesis and JAX once for the whole suite."""

import os
import pathlib


# Eight host devices, so that the sharding tests run on any machine. Must precede the first use of JAX.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Almost all the time goes to compiling small programs that run once. The processes that tests start inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jax
import pytest


# Without shrinking: an example compiles, so making a failure smaller can take hours.
phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
hypothesis.settings.register_profile("rinsx", deadline=None, max_examples=25, phases=phases, derandomize=True)
hypothesis.settings.load_profile("rinsx")


def pytest_xdist_auto_num_workers(config):
    """Files named on the command line run in this process, which starts sooner and can be looked into."""
    return None if all(pathlib.Path(path).is_dir() for path in config.args) else 0


@pytest.fixture(autouse=True, scope="module")
def _fresh_caches():
    """Compiled programs pile up over a long suite; each module starts without those of the last."""
    yield
    jax.clear_caches()
