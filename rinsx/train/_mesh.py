"""Where arrays live: batches shared out over all devices, parameters whole or in shards."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from jaxtyping import PyTree

from ._roles import axes


_BATCH = ("replica", "shard")


def mesh(shards: int = 1) -> Mesh:
    """A mesh over all devices of all processes, with the axes `replica` and `shard`.

    A batch is shared out over both axes. Parameters and the optimiser's state are cut into `shards` parts along
    `shard`, and stand once for each `replica`: `mesh(1)` is plain data parallelism, `mesh(jax.device_count())` fully
    sharded parameters, and what lies between is sharded within a host and replicated over hosts.

    !!! example

        ```python
        import rinsx as rx

        rx.train.mesh().shape  # {'replica': number of devices, 'shard': 1}
        ```

    **Arguments:**

    - `shards`: the number of parts, a divisor of the number of devices.

    **Returns:**

    A `jax.sharding.Mesh` whose axes are of the type Auto.
    """
    devices = jax.device_count()
    if shards < 1 or devices % shards != 0:
        raise ValueError(f"`shards` must divide the number of devices, {devices}; got {shards}.")
    return jax.make_mesh((devices // shards, shards), _BATCH, axis_types=(AxisType.Auto, AxisType.Auto))


def place(model: PyTree | Callable[[], PyTree], mesh: Mesh) -> PyTree:
    """Puts the arrays of a model on the devices of a mesh, each cut along its longest axis that the number of shards divides.

    The axis that numbers the layers of a [`rinsx.nn.Stack`][] is not cut. An array without such an axis stands whole on
    every device, as do keys and integers.

    !!! example

        ```python
        import jax.random as jr
        import rinsx as rx

        make = lambda: rx.models.DecoderLM(rx.models.presets["nano"], key=jr.key(0))
        model = rx.train.place(make, rx.train.mesh())
        ```

    **Arguments:**

    - `model`: any pytree, or a function that makes one: then no array ever stands whole on a single device.
    - `mesh`: of [`rinsx.train.mesh`][].

    **Returns:**

    The model, its arrays on the mesh. [`rinsx.train.fit`][] takes it from there.
    """
    if not isinstance(model, eqx.Module) and callable(model):
        return eqx.filter_jit(lambda: constrain(model(), mesh))()
    move = lambda x, sharding: _put(x, sharding) if eqx.is_array(x) else x
    return jtu.tree_map(move, model, shardings(model, mesh))


def constrain(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """`tree` with its arrays kept where [`rinsx.train.place`][] puts them, inside jit."""
    if mesh is None:
        return tree
    keep = lambda x, sharding: jax.lax.with_sharding_constraint(x, sharding) if eqx.is_array(x) else x
    return jtu.tree_map(keep, tree, shardings(tree, mesh))


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The sharding of each array, `None` for what is none."""
    one = lambda x, stacked: NamedSharding(mesh, _spec(x, mesh, stacked)) if eqx.is_array(x) else None
    return jtu.tree_map(one, tree, axes(tree))


def share_out(batch: PyTree, mesh: Mesh | None, lead: int = 0) -> PyTree:
    """Makes global arrays of the rows that this process has: axis `lead` is that of the rows, and shared out over all devices."""
    if mesh is None:
        if jax.process_count() > 1:
            raise ValueError(f"{jax.process_count()} processes share out a batch by a mesh: give mesh=rx.train.mesh().")
        return batch
    sharding = NamedSharding(mesh, P(*[None] * lead, _BATCH))

    def make(x):
        rows = np.shape(x)[lead] * jax.process_count()
        if rows % mesh.size != 0:
            raise ValueError(
                f"the rows of a batch must be a multiple of the {mesh.size} devices of the mesh; got {rows}."
            )
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jtu.tree_map(make, batch)


def _spec(x: Any, mesh: Mesh, stacked: int | None) -> P:
    # Only floating arrays are cut: what is none has no count of stacked axes.
    shards = mesh.shape["shard"]
    if shards == 1 or stacked is None:
        return P()
    free = [axis for axis in range(stacked, x.ndim) if x.shape[axis] % shards == 0]
    if not free:
        return P()
    longest = max(free, key=lambda axis: x.shape[axis])
    return P(*[None] * longest, "shard")


def _put(x: Any, sharding: NamedSharding) -> Any:
    if isinstance(x, jax.Array):
        if x.sharding.is_equivalent_to(sharding, x.ndim):
            return x
        if not x.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=sharding)(x)
    if jax.process_count() == 1 or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.device_put(x, sharding)
    # Every process holds the same array, and gives its part.
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
