"""Exact cost accounting: FLOPs from shapes alone, and plans at matched compute."""

from .._declare import branches as branches, trips as trips
from ._bytes import nbytes as nbytes
from ._cost import Cost as Cost
from ._count import count as count
from ._expect import expected as expected, spent as spent
from ._match import match as match, Plan as Plan, PlanRow as PlanRow
from ._parameters import Parameters as Parameters, parameters as parameters
from ._solve import Solution as Solution, solve as solve


__all__ = [
    "branches",
    "Cost",
    "count",
    "expected",
    "match",
    "nbytes",
    "Parameters",
    "parameters",
    "Plan",
    "PlanRow",
    "Solution",
    "solve",
    "spent",
    "trips",
]
