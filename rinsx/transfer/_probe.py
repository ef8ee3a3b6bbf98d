"""Linear probes: what a linear classifier reads off embeddings."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ._rank import check_axes, check_widths


class Probe(NamedTuple):
    """What [`rinsx.transfer.linear_probe`][] returns.

    **Attributes:**

    - `correct`: for each test row, whether it is right: bool `[n]`.
    - `strength`: the strength of regularisation that was chosen.
    - `accuracies`: for each strength that was tried, the accuracy on the rows held out.
    """

    correct: Bool[np.ndarray, " n"]
    strength: float
    accuracies: dict[float, float]


def linear_probe(
    train_vectors: Float[Array | np.ndarray, "..."],
    train_labels: Int[Array | np.ndarray, " labels"],
    test_vectors: Float[Array | np.ndarray, "..."],
    test_labels: Int[Array | np.ndarray, " answers"],
    *,
    strengths: Sequence[float] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
    seed: int = 0,
) -> Probe:
    """Trains a multinomial logistic regression on embeddings and tests it, as in
    [Radford et al.](https://arxiv.org/abs/2103.00020). Needs `pip install 'rinsx[vision]'`.

    Features are standardised by the mean and deviation of the training rows. What is minimised is the mean cross-entropy, in
    nats, plus `strength / 2` times the sum of the squared weights (the intercepts go free), so that a strength means the same
    for any number of rows. Every fifth row of each class, drawn by `seed`, is held out to choose the strength: the largest of
    those that are most often right there. Then the classifier is trained on all training rows.

    It is scikit-learn's `LogisticRegression`, by L-BFGS from the strongest regularisation to the weakest, 1000 steps at most for
    each. One that takes all of them is judged as it is; while training on all rows scikit-learn warns of it.

    !!! example

        ```python
        import numpy as np
        import rinsx as rx

        rng = np.random.default_rng(0)
        labels = np.arange(60) % 3
        vectors = np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3))
        probe = rx.transfer.linear_probe(vectors[:45], labels[:45], vectors[45:], labels[45:])
        probe.correct.mean()  # 1.0
        ```

    **Arguments:**

    - `train_vectors`, `train_labels`: `[rows, d]` and `[rows]`; at least two classes, one of them of five rows or more.
    - `test_vectors`, `test_labels`: the same of other rows; a label that does not occur in training is never right.
    - `strengths`: the grid, positive numbers.
    - `seed`: of the rows held out. The same arguments give the same result.

    **Returns:**

    A [`rinsx.transfer.Probe`][].

    **Raises:**

    `ValueError` where vectors and labels do not fit each other, where a vector is not finite, and where there is nothing to
    choose by. `ImportError` without scikit-learn.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("rx.transfer.linear_probe needs scikit-learn: pip install 'rinsx[vision]'") from error
    train, train_labels = _checked(train_vectors, train_labels, "train")
    test, test_labels = _checked(test_vectors, test_labels, "test")
    check_widths(train_vectors=train, test_vectors=test)
    grid = sorted({float(strength) for strength in strengths}, reverse=True)
    if not grid or not all(0 < strength < np.inf for strength in grid):
        raise ValueError(f"`strengths` must be positive numbers, at least one; got {strengths!r}.")
    held = _held_out(train_labels, seed)
    if not held.any() or len(np.unique(train_labels[~held])) < 2:
        counts = dict(zip(*(x.tolist() for x in np.unique(train_labels, return_counts=True))))
        raise ValueError(
            f"there must be two classes in training, one of them of at least five rows; got {counts}, rows by label."
        )

    def fits(x, y):
        """The classifier at each strength of the grid."""
        scale = StandardScaler().fit(x)
        x = scale.transform(x)
        model = LogisticRegression(max_iter=1000, warm_start=True)
        for strength in grid:
            model.set_params(C=1 / (strength * len(x)))
            yield strength, model.fit(x, y), scale

    right = lambda model, scale, x, y: model.predict(scale.transform(x)) == y
    accuracies = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for strength, model, scale in fits(train[~held], train_labels[~held]):
            accuracies[strength] = float(np.mean(right(model, scale, train[held], train_labels[held])))
    # The first of the best: the grid begins with the strongest.
    chosen = max(grid, key=lambda strength: accuracies[strength])
    for strength, model, scale in fits(train, train_labels):
        if strength == chosen:
            return Probe(right(model, scale, test, test_labels), chosen, accuracies)
    raise AssertionError("the chosen strength is of the grid")


def _checked(vectors, labels, name: str):
    vectors, labels = np.asarray(vectors, np.float64), np.asarray(labels)
    check_axes(f"{name}_vectors", vectors, "[rows, d]")
    if labels.shape != vectors.shape[:1] or len(labels) == 0:
        raise ValueError(f"`{name}_labels` must be one for each of {len(vectors)} rows; got the shape {labels.shape}.")
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if bad.size > 0:
        raise ValueError(f"`{name}_vectors` must be finite; {bad.size} rows are not, the first of them row {bad[0]}.")
    return vectors, labels


def _held_out(labels, seed: int):
    """Every fifth row of each class, in random order."""
    held = np.zeros(len(labels), bool)
    order = np.random.default_rng(seed).permutation(len(labels))
    for label in np.unique(labels):
        held[order[labels[order] == label][4::5]] = True
    return held
