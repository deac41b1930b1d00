"""Whether the tangent of the output, derived or given, is the derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradtools.errors import GradientMismatchError, TransformError, Violation
from gradtools.gradcheck import numeric, probes
from gradtools.gradcheck.probes import Probe
from gradtools.gradcheck.report import Evidence
from gradtools.gradcheck.subject import Run, Subject, floats
from gradtools.gradcheck.trial import Tolerance
from gradtools.lowering import preconditions
from gradtools.lowering.forward_mode import transposed

__all__ = ["forward_mode"]

TRIES = 3
QUESTION = "tangent of the output"


def forward_mode(subject: Subject, probe: Probe) -> list[Evidence]:
    """Compare the tangent with differences, number by number.

    Raises:
        GradientMismatchError: The tangent is wrong.
    """
    worst: tuple[float, int, torch.Tensor, torch.Tensor] | None = None
    agrees = False
    for attempt in range(TRIES):
        near = probes.moved_off_kinks(probe, subject.generator)
        moves = numeric.direction(
            near, near.places, subject.generator, relative=attempt == 1
        )
        run = subject.fwd(near)
        refused = _refusal(run)
        if refused is not None:
            return [Evidence(QUESTION, "not given", refused.what)]
        try:
            moved = subject.again(lambda run=run, moves=moves: _tangents(run, moves))
        except TransformError as error:
            return [Evidence(QUESTION, "not given", error.what)]
        found = _compared(subject, run, moves, moved)
        if found is None:
            agrees = agrees or _as_bwd(subject, run, moves, moved)
            continue
        if found[0] <= 1:
            detail = f"relative error below {subject_tolerance(subject, run):.0e}"
            return [Evidence(QUESTION, "passed", detail)]
        worst = found if worst is None or found[0] < worst[0] else worst
    if worst is None and agrees:
        detail = "as bwd has it; differences do not converge here"
        return [Evidence(QUESTION, "passed", detail)]
    if worst is None:
        return [Evidence(QUESTION, "not checked", "differences do not converge here")]
    raise _wrong(subject, *worst[1:])


def subject_tolerance(subject: Subject, run: Run) -> float:
    """Return the relative error that a tangent may have."""
    values = (*run.outs, *run.probe.leaves)
    tolerance = Tolerance.of(subject.rule.contract, values)
    return tolerance.along + tolerance.wide_relative


def _refusal(run: Run) -> TransformError | None:
    """Return why there is no forward mode, as the first use of it would find out."""
    plan = run.probe.plan
    if plan.rule.jvp is None:
        preconditions.linearity(plan, run.layout, run.kept, run.outs)
    return plan.state.linear


def _tangents(run: Run, moves: numeric.Moves) -> Sequence[torch.Tensor | None]:
    """Return the tangent of each output: by the jvp rule, or from bwd."""
    probe, plan = run.probe, run.probe.plan
    tangents = [moves.get(place) for place in range(len(probe.leaves))]
    if plan.rule.jvp is not None:
        return plan.jvp(run.layout, probe.leaves, tangents, run.outs, run.kept)
    return transposed(plan, run.layout, run.kept, run.outs, tangents)


def _compared(
    subject: Subject,
    run: Run,
    moves: numeric.Moves,
    moved: Sequence[torch.Tensor | None],
) -> tuple[float, int, torch.Tensor, torch.Tensor] | None:
    """Return the error as a multiple of what is allowed, and where; None: unknown."""

    def fun(leaves: Sequence[Any]) -> list[torch.Tensor]:
        return [out for out in subject.fun(run.probe, leaves) if floats(out)]

    outs = [out for out in run.outs if floats(out)]
    given = [t for out, t in zip(run.outs, moved, strict=True) if floats(out)]
    dtypes = [tensor.dtype for tensor in (*outs, *moves.values())]
    slope = numeric.slope(fun, run.probe, moves, dtypes)
    relative = subject_tolerance(subject, run)
    worst: tuple[float, int, torch.Tensor, torch.Tensor] | None = None
    rows = zip(outs, given, slope.value, slope.doubt, strict=True)
    for number, (out, known, right, doubt) in enumerate(rows):
        if out.numel() == 0:
            continue
        tangent = torch.zeros_like(out) if known is None else known
        size = _largest(right)
        noise = _largest(doubt) + slope.rounding * _largest(out)
        if not noise <= max(0.01 * size, numeric.FLAT * _largest(out)):
            return None
        gap = _largest(tangent - right, nan=float("inf"))
        bound = relative * max(size, numeric.FLAT * _largest(out)) + 10 * noise
        ratio = gap / bound if bound else (0.0 if gap == 0 else float("inf"))
        if worst is None or ratio > worst[0]:
            worst = (ratio, number, tangent, right)
    if worst is None:
        zero = torch.zeros(())
        return 0.0, 0, zero, zero
    return worst


def _as_bwd(
    subject: Subject,
    run: Run,
    moves: numeric.Moves,
    moved: Sequence[torch.Tensor | None],
) -> bool:
    """Whether <u, tangent> is <bwd(u), direction>, for a bwd checked by autograd."""
    if subject.rule.bwd is None:
        return False
    given = [numeric.signs(out, subject.generator) for out in run.outs if floats(out)]
    values = subject.bwd(run, given)
    tangents = [t for out, t in zip(run.outs, moved, strict=True) if floats(out)]
    pairs = [(u, t) for u, t in zip(given, tangents, strict=True) if t is not None]
    there = [numeric.products(u, t) for u, t in pairs]
    back = [
        numeric.products(numeric.dense(value), move)
        for place, move in moves.items()
        if (value := values[place]) is not None
    ]
    size = sum(float(part.abs().sum()) for part in back)
    gap = sum(float(p.sum()) for p in there) - sum(float(p.sum()) for p in back)
    return abs(gap) <= subject_tolerance(subject, run) * size


def _largest(tensor: torch.Tensor, nan: float = float("nan")) -> float:
    return torch.nan_to_num(tensor.abs(), nan=nan).max().item()


def _wrong(
    subject: Subject, number: int, said: torch.Tensor, right: torch.Tensor
) -> GradientMismatchError:
    rule = subject.rule
    place = int(torch.nan_to_num((said - right).abs(), nan=float("inf")).argmax())
    role = "the jvp rule" if rule.jvp is not None else "the transpose of bwd"
    return GradientMismatchError(
        f"{rule.name}: the tangent that {role} gives output {number} is not the "
        "derivative of the function",
        rule=rule.where,
        function=rule.which("jvp" if rule.jvp is not None else "bwd"),
        violations=[
            Violation(
                f"output {number}, element {place}",
                f"{right.flatten()[place].item():.6g}, by differences",
                f"{said.flatten()[place].item():.6g}",
            )
        ],
        fix="Correct the rule; if it is meant to differ, declare "
        "contract=Surrogate(...) or Approximate(...).",
        kind="tangent",
    )
