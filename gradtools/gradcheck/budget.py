"""How far an approximate bwd is from the derivative, per argument."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gradtools.errors import Violation
from gradtools.gradcheck import numeric
from gradtools.gradcheck.diagnosis import Culprit
from gradtools.gradcheck.numeric import Comparison
from gradtools.gradcheck.report import Evidence
from gradtools.gradcheck.trial import Trial, filled
from gradtools.rules.rule import Approximate

__all__ = ["approximation"]

DIRECTIONS = 4


def approximation(trial: Trial, claimed: Approximate) -> list[Evidence]:
    """Measure the error in every argument; raise where it leaves the budget."""
    return [_of(trial, place, claimed) for place in trial.probe.places]


def _of(trial: Trial, place: int, claimed: Approximate) -> Evidence:
    question = f"error in {trial.probe.paths[place].removeprefix('args.')}"
    slopes = [trial.slope([place]) for _ in range(DIRECTIONS)]
    items = [item for found in slopes for item in trial.compared(found)]
    if not all(item.is_conclusive for item in items):
        return Evidence(question, "not checked", "differences do not converge here")
    allowed = claimed.rel + (claimed.abs or 0.0) / (items[0].scale or 1.0)
    error, how = _in_full(trial, place, slopes), "over all elements"
    if error is None:
        if _along(items) > allowed:  # by chance, it may be: ask again
            more = [trial.slope([place]) for _ in range(2 * DIRECTIONS)]
            items += [item for found in more for item in trial.compared(found)]
        error, how = _along(items), f"along {len(items)} directions"
    measured = f"{error:.1e} of its size, {how}"
    if error > allowed:
        excess = Violation(
            trial.probe.paths[place],
            f"an error of at most {allowed:.1e} of its size, the budget",
            f"an error of {measured}",
        )
        worst = max(items, key=lambda item: item.error)
        raise Culprit(trial, place, worst, excess).error()
    return Evidence(question, "passed", f"{measured} (budget {allowed:.1e})", error)


def _in_full(trial: Trial, place: int, slopes: Sequence[numeric.Slope]) -> float | None:
    """Return the error over all elements, where differences vouch for autograd."""
    if trial.reference is None:
        return None
    vouched = all(
        item.is_conclusive and trial.tolerance.admits(item)
        for found in slopes
        for given, right in zip(trial.cotangents, trial.reference, strict=True)
        for item in [numeric.compare(found, trial.outs, given, right)]
    )
    if not vouched:
        return None
    leaf, worst = trial.probe.leaves[place], 0.0
    for said, right in zip(trial.values, trial.reference, strict=True):
        true = filled(right[place], leaf)
        gap = torch.linalg.vector_norm(filled(said[place], leaf) - true)
        size = torch.linalg.vector_norm(true)
        worst = max(worst, float(gap / size) if bool(size) else float(gap))
    return worst


def _along(items: Sequence[Comparison]) -> float:
    """Return the error along some directions, in parts of the derivative itself.

    In parts of what bwd returns, no gradient would be off by more than its own size,
    were it a hundred times too large. The directions are taken together, for along
    one of them the derivative may be small by chance.
    """
    beyond = [item.error * (item.scale or 1.0) for item in items]
    gap, size = math.hypot(*beyond), math.hypot(*(item.numeric for item in items))
    return gap / size if size else gap
