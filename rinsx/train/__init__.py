"""Training: optimisers and schedules, checkpoints, logs."""

from ._checkpoint import Checkpoint as Checkpoint, Checkpoints as Checkpoints
from ._evaluate import evaluate as evaluate, Totals as Totals
from ._fit import fit as fit, NonFiniteLoss as NonFiniteLoss, Run as Run
from ._log import (
    AbstractLog as AbstractLog,
    JsonLines as JsonLines,
    peak_flops as peak_flops,
    Progress as Progress,
    TensorBoard as TensorBoard,
)
from ._mesh import mesh as mesh, place as place
from ._optimizers import adafactor as adafactor, adamw as adamw, muon as muon
from ._roles import roles as roles
from ._schedules import (
    constant as constant,
    cosine as cosine,
    reverse_square_root as reverse_square_root,
    warmup_stable_decay as warmup_stable_decay,
)
from ._step import cost as cost


__all__ = [
    "AbstractLog",
    "JsonLines",
    "Progress",
    "TensorBoard",
    "peak_flops",
    "Checkpoint",
    "Checkpoints",
    "NonFiniteLoss",
    "Run",
    "Totals",
    "adafactor",
    "adamw",
    "constant",
    "cosine",
    "cost",
    "evaluate",
    "fit",
    "mesh",
    "place",
    "muon",
    "reverse_square_root",
    "roles",
    "warmup_stable_decay",
]
