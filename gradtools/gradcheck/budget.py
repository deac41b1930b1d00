"""How far an approximate bwd is from the derivative, per argument."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradtools.gradcheck import numeric
from gradtools.gradcheck.diagnosis import Culprit
from gradtools.gradcheck.numeric import Comparison
from gradtools.gradcheck.report import Evidence
from gradtools.gradcheck.trial import Trial, filled
from gradtools.rules.rule import Approximate

__all__ = ["approximation"]


def approximation(trial: Trial, claimed: Approximate) -> list[Evidence]:
    """Measure the error in every argument; raise where it leaves the budget."""
    return [_of(trial, place, claimed) for place in trial.probe.places]


def _of(trial: Trial, place: int, claimed: Approximate) -> Evidence:
    question = f"error in {trial.probe.paths[place].removeprefix('args.')}"
    slopes = [trial.slope([place]), trial.slope([place])]
    items = [item for found in slopes for item in trial.compared(found)]
    if not all(item.is_conclusive for item in items):
        return Evidence(question, "not checked", "differences do not converge here")
    error, size = _in_full(trial, place, slopes), items[0].scale
    how = "over all elements"
    if error is None:
        worst = max(items, key=lambda item: item.error)
        error, size, how = worst.error, worst.scale, f"along {len(items)} directions"
    allowed = claimed.rel + (claimed.abs or 0.0) / (size or 1.0)
    if error > allowed:
        raise Culprit(trial, place, max(items, key=_error)).error()
    detail = f"{error:.1e} of its size, {how} (budget {allowed:.1e})"
    return Evidence(question, "passed", detail, error)


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


def _error(item: Comparison) -> float:
    return item.error
