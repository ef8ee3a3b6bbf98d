"""Optimisers out of optax's parts, driven by the fraction of training FLOPs that is spent."""

import math
from collections.abc import Callable, Collection
from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import PyTree

from ._roles import axes, ROLES, roles as default_roles
from ._schedules import Schedule


Decay = Callable[[str], bool] | Collection[str]
_DECAYED = frozenset({"matrix", "embedding"})


def adamw(
    schedule: Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay: Decay = _DECAYED,
    clip: float | None = 1.0,
    roles: Callable[[PyTree], PyTree] = default_roles,
) -> optax.GradientTransformationExtraArgs:
    """AdamW: clip by the global norm, Adam with bias correction, decoupled weight decay, times `-schedule(fraction)`.

    As in PyTorch and optax, the decay is multiplied by the learning rate: a step takes `schedule(fraction) * weight_decay`
    of each decayed parameter.

    !!! example

        ```python
        import equinox as eqx
        import jax.random as jr
        import optax
        import rinsx as rx

        params = eqx.filter(eqx.nn.MLP(4, 4, 8, depth=1, key=jr.key(0)), eqx.is_inexact_array)
        optimizer = rx.train.adamw(rx.train.cosine(3e-3))
        state = optimizer.init(params)
        gradients = params
        updates, state = optimizer.update(gradients, state, params, fraction=0.5)
        params = optax.apply_updates(params, updates)
        ```

    ??? cite "Reference"

        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101.

    **Arguments:**

    - `schedule`: from the fraction of training FLOPs spent to a learning rate, such as [`rinsx.train.cosine`][].
    - `b1`, `b2`: decay rates of the first and the second moment, in [0, 1).
    - `eps`: added to the root of the second moment.
    - `weight_decay`: the strength of the decay, at least 0.
    - `decay`: which roles are decayed: a set of roles or a function from role to bool, see [`rinsx.train.roles`][]. By default
        matrices and embeddings; biases, norms and adapters are left alone.
    - `clip`: the largest global norm of the gradients; `None` to not clip.
    - `roles`: from parameters to a pytree of roles; your own for a model whose arrays [`rinsx.train.roles`][] misreads.

    **Returns:**

    An `optax.GradientTransformationExtraArgs`. Its `update(grads, state, params, *, fraction)` takes the fraction of training FLOPs
    spent. Parameters are the floating arrays of a model in their modules, `eqx.filter(model, eqx.is_inexact_array)`.
    """
    decays = _decays(weight_decay, decay, roles)
    _unit(b1=b1, b2=b2)
    return optax.chain(*_clips(clip), optax.scale_by_adam(b1, b2, eps), decays, _scale_by(schedule))


def adafactor(
    schedule: Schedule,
    *,
    momentum: float | None = 0.9,
    decay_rate: float = 0.8,
    max_b2: float = 0.999,
    eps: float = 1e-30,
    factored: int = 32,
    weight_decay: float = 0.1,
    decay: Decay = _DECAYED,
    clip: float | None = 1.0,
    roles: Callable[[PyTree], PyTree] = default_roles,
) -> optax.GradientTransformationExtraArgs:
    """Adafactor in the form of "Scaling Vision Transformers": second moments of matrices stored as rows and columns, momentum, no
    scaling by the norm of the parameters, decoupled weight decay, times `-schedule(fraction)`.

    Arrays are factored over their two longest axes. In a [`rinsx.nn.Stack`][] that has more layers than a matrix has rows or columns,
    one of them is the axis of the layers.

    !!! example

        ```python
        import equinox as eqx
        import jax.random as jr
        import rinsx as rx

        params = eqx.filter(eqx.nn.MLP(4, 4, 64, depth=2, key=jr.key(0)), eqx.is_inexact_array)
        optimizer = rx.train.adafactor(rx.train.reverse_square_root(1e-3))
        state = optimizer.init(params)
        updates, state = optimizer.update(params, state, params, fraction=0.5)
        ```

    ??? cite "Reference"

        Shazeer and Stern, "Adafactor", arXiv 1804.04235. Zhai et al., "Scaling Vision Transformers", arXiv 2106.04560, Section 3.4:
        momentum, `max_b2`, and no relative step.

    **Arguments:**

    - `schedule`: from the fraction of training FLOPs spent to a learning rate.
    - `momentum`: the decay rate of the average of the updates, in [0, 1); `None` for none, which stores no copy of the parameters.
    - `decay_rate`: the second moment decays by `1 - t ** -decay_rate` at step `t`, counted from 1, in (0, 1].
    - `max_b2`: the upper bound of that decay, in [0, 1).
    - `eps`: added to squared gradients.
    - `factored`: the least size of both axes of what is factored.
    - `weight_decay`, `decay`, `clip`, `roles`: as for [`rinsx.train.adamw`][].

    **Returns:**

    An `optax.GradientTransformationExtraArgs`, as for [`rinsx.train.adamw`][].
    """
    if not 0 < decay_rate <= 1:
        raise ValueError(f"`decay_rate` must be in (0, 1]; got {decay_rate}.")
    if factored < 1:
        raise ValueError(f"`factored` is the size of an axis, at least 1; got {factored}.")
    _unit(max_b2=max_b2)

    def rate(step, power):
        return jnp.minimum(1 - (step + 1.0) ** -power, max_b2)

    parts = [*_clips(clip)]
    parts.append(
        optax.scale_by_factored_rms(
            decay_rate=decay_rate, min_dim_size_to_factor=factored, epsilon=eps, decay_rate_fn=rate
        )
    )
    if momentum is not None:
        _unit(momentum=momentum)
        parts.append(optax.ema(momentum, debias=False))
    return optax.chain(*parts, _decays(weight_decay, decay, roles), _scale_by(schedule))


def muon(
    schedule: Schedule,
    *,
    adamw: Schedule | None = None,
    momentum: float = 0.95,
    rms: float = 0.2,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    decay: Decay = _DECAYED,
    clip: float | None = 1.0,
    roles: Callable[[PyTree], PyTree] = default_roles,
) -> optax.GradientTransformationExtraArgs:
    """Muon on matrices, AdamW on all else: embeddings, the output head, norms, biases and adapters.

    Muon replaces the momentum (Nesterov's) of a matrix by the orthogonal matrix nearest to it, roughly: five steps of Newton and
    Schulz leave singular values between about 0.7 and 1.2. It is then scaled by `rms * sqrt(max(rows, columns))`, which gives its
    entries a root mean square of about `rms` whatever the shape. Each layer of a [`rinsx.nn.Stack`][] is a matrix of its own. An
    array of more than two axes is read as a matrix with its first axis as rows and the others, flattened, as columns.

    !!! example

        ```python
        import equinox as eqx
        import jax.random as jr
        import rinsx as rx

        params = eqx.filter(eqx.nn.MLP(4, 4, 8, depth=1, key=jr.key(0)), eqx.is_inexact_array)
        optimizer = rx.train.muon(rx.train.warmup_stable_decay(3e-3))
        state = optimizer.init(params)
        updates, state = optimizer.update(params, state, params, fraction=0.5)
        ```

    ??? cite "Reference"

        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. The scale is that of Liu et al., "Muon is
        Scalable for LLM Training", arXiv 2502.16982, Section 2.2: with `rms=0.2` updates are about as large as those of AdamW, so
        both can share a learning rate.

    **Arguments:**

    - `schedule`: the learning rate of the matrices, from the fraction of training FLOPs spent.
    - `adamw`: that of the rest. By default `schedule` too.
    - `momentum`: the decay rate of the momentum, in [0, 1).
    - `rms`: the root mean square of the entries of a matrix's update at learning rate 1.
    - `b1`, `b2`, `eps`: of AdamW.
    - `weight_decay`, `decay`, `clip`, `roles`: as for [`rinsx.train.adamw`][], for both.

    **Returns:**

    An `optax.GradientTransformationExtraArgs`, as for [`rinsx.train.adamw`][].
    """
    _unit(momentum=momentum, b1=b1, b2=b2)
    if not rms > 0:
        raise ValueError(f"`rms` must be positive; got {rms}.")
    decays = _decays(weight_decay, decay, roles)

    def dims(params):
        def one(x, stacked):
            return optax.contrib.MuonDimensionNumbers(stacked, tuple(range(stacked + 1, x.ndim)))

        return jtu.tree_map(one, params, axes(params))

    def scaled(x, stacked):
        rows, columns = x.shape[stacked], math.prod(x.shape[stacked + 1 :])
        return x * (rms * math.sqrt(max(rows, columns)))

    matrices = optax.chain(
        optax.contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=dims),
        optax.stateless(lambda updates, params: jtu.tree_map(scaled, updates, axes(updates))),
        decays,
        _scale_by(schedule),
    )
    rest = optax.chain(optax.scale_by_adam(b1, b2, eps), decays, _scale_by(schedule if adamw is None else adamw))
    labels = lambda params: jtu.tree_map(lambda role: "muon" if role == "matrix" else "adamw", _named(roles, params))
    return optax.chain(*_clips(clip), optax.partition({"muon": matrices, "adamw": rest}, labels))


def _scale_by(schedule: Schedule) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, fraction, **extra: Any):
        del params, extra
        rate = -schedule(fraction)
        return jtu.tree_map(lambda g: (rate * g).astype(g.dtype), updates), state

    # optax's own type for `update` has no place for required extra arguments.
    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), cast(Any, update))


def _decays(weight_decay: float, decay: Decay, roles: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    if not weight_decay >= 0:
        raise ValueError(f"`weight_decay` must be at least 0; got {weight_decay}.")
    if isinstance(decay, str):
        raise TypeError(f"`decay` is a set of roles or a function from role to bool; got the string {decay!r}.")
    if not callable(decay):
        if unknown := sorted(set(decay) - set(ROLES)):
            raise ValueError(f"`decay` names roles, which are {', '.join(ROLES)}; got {', '.join(unknown)}.")
    chosen = decay if callable(decay) else frozenset(decay).__contains__
    return optax.add_decayed_weights(
        weight_decay, mask=lambda params: jtu.tree_map(lambda role: bool(chosen(role)), _named(roles, params))
    )


def _named(roles: Callable[[PyTree], PyTree], params: PyTree) -> PyTree[str]:
    named = roles(params)
    for path, role in jtu.tree_leaves_with_path(named):
        if role not in ROLES:
            raise ValueError(f"{jtu.keystr(path)} has the role {role!r}; roles are {', '.join(ROLES)}.")
    if jtu.tree_structure(named) != jtu.tree_structure(params):
        raise ValueError(
            "optimisers take the floating arrays of a model, `eqx.filter(model, eqx.is_inexact_array)`; got other leaves, as in"
            f" {eqx.tree_pformat(params, short_arrays=True)}"
        )
    return named


def _clips(clip: float | None) -> list[optax.GradientTransformation]:
    if clip is None:
        return []
    if not clip > 0:
        raise ValueError(f"`clip` is a norm and must be positive, or None; got {clip}.")
    return [optax.clip_by_global_norm(clip)]


def _unit(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` must be in [0, 1); got {value}.")
