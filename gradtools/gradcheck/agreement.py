"""Whether fwd returns what the function returns."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradtools.errors import GradientMismatchError, Violation
from gradtools.gradcheck.report import Evidence
from gradtools.gradcheck.subject import Subject, floats
from gradtools.rules.rule import Rule

__all__ = ["agreement"]

Tensors = Sequence[torch.Tensor]


def agreement(subject: Subject, wanted: Tensors, outs: Tensors) -> Evidence:
    """Compare the outputs of fun and of fwd; raise where they differ."""
    rule = subject.rule
    question = "fwd agrees with fun"
    if rule.fwd is None:
        return Evidence(question, "passed", "fun itself runs")
    if len(wanted) != len(outs):
        raise _wrong(rule, 0, f"{len(wanted)} tensors", f"{len(outs)} tensors")
    worst = 0.0
    for place, (want, got) in enumerate(zip(wanted, outs, strict=True)):
        if want.shape != got.shape or want.dtype != got.dtype:
            raise _wrong(rule, place, _of(want), _of(got))
        error = relative_error(want, got)
        if not error <= (1e-6 if subject.in_double else 100 * _epsilon(want)):
            raise _wrong(
                rule,
                place,
                "the value of fun",
                f"a value that differs by {error:.1e} of its size",
            )
        worst = max(worst, error)
    return Evidence(question, "passed", f"to {worst:.0e}", worst)


def _wrong(rule: Rule, place: int, expected: str, got: str) -> GradientMismatchError:
    return GradientMismatchError(
        f"{rule.name}: fwd does not return what the function returns",
        rule=rule.where,
        function=rule.which("fwd"),
        violations=[Violation(f"output {place}", expected, got)],
        fix="Make fwd compute the function itself, and return its residuals beside it.",
        kind="fwd",
    )


def _of(tensor: torch.Tensor) -> str:
    return f"a tensor of shape {tuple(tensor.shape)}, {tensor.dtype}"


def _epsilon(tensor: torch.Tensor) -> float:
    return torch.finfo(tensor.dtype).eps if floats(tensor) else 0.0


def relative_error(want: torch.Tensor, got: torch.Tensor) -> float:
    """Return the largest difference as a part of the largest value.

    What is not finite in fun may be so in a stabler fwd; not the other way round.
    """
    if not floats(want):
        return 0.0 if torch.equal(want, got) else float("inf")
    finite = torch.isfinite(want)
    if not bool(finite.any()):
        return 0.0
    gap = (want - got)[finite].abs()
    if not bool(torch.isfinite(gap).all()):
        return float("inf")
    difference, size = gap.max().item(), want[finite].abs().max().item()
    return difference / size if size else difference
