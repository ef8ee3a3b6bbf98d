"""Configures hypothesis and JAX once for the whole suite."""

import os


# Eight host devices, so that the sharding tests run on any machine. Must precede the first use of JAX.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest


# Without shrinking: an example compiles, so making a failure smaller can take hours.
phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
hypothesis.settings.register_profile("rinsx", deadline=None, max_examples=25, phases=phases, derandomize=True)
hypothesis.settings.load_profile("rinsx")


@pytest.fixture(autouse=True, scope="module")
def _fresh_caches():
    """Compiled programs pile up over a long suite; each module starts without those of the last."""
    yield
    jax.clear_caches()
