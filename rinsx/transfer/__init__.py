"""What embeddings are worth: zero-shot classification, retrieval, linear probes, at every depth of interest.

Needs `pip install 'rinsx[train]'`, and for [`rinsx.transfer.linear_probe`][] `rinsx[vision]` too. Scores are taken on the host.
"""

from ._embed import embed as embed, Embeddings as Embeddings
from ._probe import linear_probe as linear_probe, Probe as Probe
from ._rank import classifier as classifier, Recall as Recall, retrieval as retrieval, zero_shot as zero_shot
from ._zero_shot import evaluate_zero_shot as evaluate_zero_shot


__all__ = [
    "Embeddings",
    "Probe",
    "Recall",
    "classifier",
    "embed",
    "evaluate_zero_shot",
    "linear_probe",
    "retrieval",
    "zero_shot",
]
