"""Whether the derivative of bwd is the second derivative of the function.

bwd reads residuals. One that is an argument leads to that argument, one that is an
output to the rule again, and one that fwd made to the arguments through fwd. A residual
that was detached on the way, or copied, is right at first order and wrong here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradtools.errors import (
    GradientMismatchError,
    GradtoolsError,
    TransformError,
    Violation,
)
from gradtools.gradcheck import numeric, probes
from gradtools.gradcheck.autodiff import pulled_back, tracked
from gradtools.gradcheck.numeric import Comparison
from gradtools.gradcheck.probes import Probe
from gradtools.gradcheck.report import Evidence
from gradtools.gradcheck.subject import Subject, floats, spread
from gradtools.gradcheck.trial import Tolerance, filled
from gradtools.lowering.flat import Plan
from gradtools.probing import plainly
from gradtools.trees import Structure

__all__ = ["second_order"]

Tensors = Sequence[torch.Tensor]
Optional = Sequence[torch.Tensor | None]

TRIES = 3
QUESTION = "second derivative"


def second_order(
    subject: Subject, probe: Probe, *, strict: bool = False
) -> list[Evidence]:
    """Compare the derivative of bwd with differences of bwd, and with autograd's.

    Args:
        subject: The rule.
        probe: Where.
        strict: Raise also where torch sees nothing of bwd; a use of the second
            derivative is refused then without this check.

    Returns:
        The evidence; "not given" where torch cannot see into bwd: the rule is then
        refused by name where a second derivative is asked for.

    Raises:
        GradientMismatchError: The second derivative would be silently wrong.
    """
    pair: _Pair | None = None
    for attempt in range(TRIES):
        near = probes.moved_off_kinks(probe, subject.generator)
        try:
            pair = _Pair(subject, near)
            if strict:
                pair.refuse_unseen()
            settled = pair.by_autograd()
            item = pair.compared(near.places, relative=attempt == 1)
        except TransformError as error:
            return [Evidence(QUESTION, "not given", error.what)]
        except GradtoolsError:
            raise
        except Exception as error:  # code that torch cannot see raises what it likes
            return [Evidence(QUESTION, "not given", f"{type(error).__name__}: {error}")]
        if item.is_conclusive and pair.tolerance.admits(item):
            return [*settled, _passed(item)]
        if settled:
            return settled
        if item.vanishes:
            return [_none_found(item)]
        if pair.is_blind and not strict:
            return [Evidence(QUESTION, "not given", "torch does not see into bwd")]
    assert pair is not None
    for place in pair.probe.places:
        item = pair.compared([place])
        if pair.refutes(item) and pair.refutes(pair.compared([place], relative=True)):
            raise pair.wrong(place, item)
    return [Evidence(QUESTION, "not checked", "differences do not converge here")]


def _passed(item: Comparison) -> Evidence:
    bound = max(item.error, item.precision)
    detail = f"relative error below {bound:.0e} along a direction"
    return Evidence(f"{QUESTION} by differences", "passed", detail, bound)


def _none_found(item: Comparison) -> Evidence:
    bound = item.noise / item.size
    detail = f"zero, and differences find none: below {bound:.0e} of bwd"
    return Evidence(f"{QUESTION} by differences", "passed", detail, bound)


class _Pair:
    """The gradient of a rule as a function of the arguments, and its derivative."""

    def __init__(self, subject: Subject, probe: Probe) -> None:
        self.subject, self.probe = subject, probe
        self.plan = probe.plan
        run = subject.fwd(probe)
        self.outs = run.outs
        self.cotangents = [
            numeric.signs(out, subject.generator) for out in run.outs if floats(out)
        ]
        self.every = spread(run.outs, self.cotangents)
        self.here = self.gradient(probe.leaves)
        self.weights = [numeric.signs(g, subject.generator) for g in self.here]
        self.tolerance = Tolerance.of(subject.rule.contract, (*run.outs, *probe.leaves))
        found = subject.again(lambda: pulled_back_through(self, self.weights))
        self.is_blind = found is None
        self.values = [None] * len(probe.leaves) if found is None else found[0]
        self.back = [None] * len(self.every) if found is None else found[1]

    def gradient(self, leaves: Sequence[Any]) -> list[torch.Tensor]:
        """Return the cotangents of the leaves for fixed output cotangents."""

        def run() -> list[torch.Tensor]:
            outs, new, layout = self.plan.forward(leaves)
            kept = layout.pick(leaves, outs, new)
            needs = self.plan.signature.needs
            values = self.plan.backward(layout, kept, self.every, needs)
            return [filled(values[place], leaves[place]) for place in self.probe.places]

        return self.subject.again(run)

    def compared(self, places: Sequence[int], **how: Any) -> Comparison:
        """Compare the derivative of bwd with differences of bwd."""
        moves = numeric.direction(
            self.probe, places, self.subject.generator, [self.values], **how
        )
        dtypes = [tensor.dtype for tensor in (*self.here, *moves.values())]
        found = numeric.slope(self.gradient, self.probe, moves, dtypes)
        return numeric.compare(found, self.here, self.weights, self.values)

    def refuse_unseen(self) -> None:
        """Raise for a bwd whose cotangent torch loses sight of.

        bwd is linear in it, so its derivative in it is bwd itself.
        """
        other = [numeric.signs(c, self.subject.generator) for c in self.cotangents]
        kept, every = self.every, spread(self.outs, other)
        try:
            self.every = every
            there = self.gradient(self.probe.leaves)
        finally:
            self.every = kept
        pairs = zip(self.weights, there, strict=True)
        wanted = [numeric.products(w, value) for w, value in pairs]
        got = [
            numeric.products(numeric.dense(value), move)
            for value, move in zip(self.back, every, strict=True)
            if value is not None and move is not None
        ]
        size = sum(float(part.abs().sum()) for part in wanted)
        gap = sum(float(p.sum()) for p in wanted) - sum(float(p.sum()) for p in got)
        if abs(gap) <= self.tolerance.along * size:
            return
        rule = self.subject.rule
        raise GradientMismatchError(
            f"{rule.name}: the {QUESTION} in the cotangent, by differentiating bwd, is "
            "wrong: torch does not see all of what bwd does with its cotangent",
            rule=rule.where,
            function=rule.which("bwd" if rule.bwd is not None else "jvp"),
            fix="Look for a .detach(), .data, .item() or no_grad in bwd; or declare "
            "once_differentiable=True.",
            kind="second derivative",
        )

    def by_autograd(self) -> list[Evidence]:
        """Compare with the second derivative of the function, element by element."""
        reference = self.of_function()
        if reference is None:
            return []
        worst = 0.0
        for place in self.probe.places:
            leaf = self.probe.leaves[place]
            said = filled(self.values[place], leaf)
            right = filled(reference[place], leaf)
            known = torch.isfinite(right)
            if not bool(known.any()):
                continue
            gap, size = (said - right)[known].abs(), right[known].abs()
            largest = float(size.max())
            first = [float(g.abs().max()) for g in self.here if g.numel()]
            natural = max(first, default=0.0)
            floor = max(1e3 * self.tolerance.floor * largest, numeric.FLAT * natural)
            if bool((gap > 10 * self.tolerance.relative * size + floor).any()):
                return self.disputed(place)
            worst = max(worst, float(gap.max()) / largest if largest else 0.0)
        detail = f"to {worst:.0e}, element by element"
        return [Evidence(f"{QUESTION} by autograd", "passed", detail, worst)]

    def of_function(self) -> Optional | None:
        """Return the second derivative by autograd through the function."""
        signature, rule = self.plan.signature, self.subject.rule

        def run() -> Optional | None:
            with torch.enable_grad(), plainly():
                inputs = tracked(self.probe.leaves, self.probe.places)
                out = signature.parameters.call(rule.fun, signature.entries(inputs))
                outs = [o for o in Structure.split(out)[0] if floats(o)]
                first = pulled_back(outs, inputs, self.cotangents, again=True)
                if first is None:
                    return None
                chosen = [first[place] for place in self.probe.places]
                found = pulled_back(chosen, inputs, self.weights)
            return [None] * len(inputs) if found is None else found

        try:
            return self.subject.again(run)
        except Exception:  # an operation without a second derivative
            return None

    def refutes(self, item: Comparison) -> bool:
        """Whether differences prove the derivative wrong."""
        return item.is_conclusive and not self.tolerance.admits(item)

    def disputed(self, place: int) -> list[Evidence]:
        """Let differences of bwd decide between it and autograd, in one argument."""
        item = self.compared([place])
        if self.refutes(item):
            raise self.wrong(place, item)
        return []

    def wrong(self, place: int, item: Comparison) -> GradientMismatchError:
        """Return the error for a second derivative that is wrong in an argument."""
        rule, where = self.subject.rule, f"{QUESTION} in {self.probe.paths[place]}"
        return GradientMismatchError(
            f"{rule.name}: the {where}, by differentiating bwd, is wrong",
            rule=rule.where,
            function=rule.which("bwd" if rule.bwd is not None else "jvp"),
            violations=[
                Violation(
                    where,
                    f"{item.numeric:.6g} along a random direction, by differences of "
                    "bwd",
                    f"{item.analytic:.6g}",
                )
            ],
            fix="Look for a .detach(), .data, .item(), a copy of an argument or the "
            "like in fwd or bwd; or declare once_differentiable=True.",
            kind="second derivative",
        )


def pulled_back_through(
    pair: _Pair, weights: Tensors
) -> tuple[list[Any], list[Any]] | None:
    """Return the derivative of the weighted gradient in leaves and cotangents.

    This is what the lowering computes at second order, said once more in few words.

    Returns:
        One cotangent per leaf, and one per output; None where torch sees nothing of
        bwd.
    """
    plan: Plan = pair.plan
    leaves, needs = pair.probe.leaves, plan.signature.needs
    with torch.enable_grad():
        inputs = tracked(leaves, pair.probe.places)
        outs, new, layout = plan.forward(inputs)
        kept = tracked(layout.pick(inputs, outs, new))
        every = tracked(pair.every)
        values = plan.backward(layout, kept, every, needs)
    chosen = [values[place] for place in pair.probe.places]
    found = pulled_back(chosen, [*kept, *every], weights)
    if found is None:
        return None
    total: list[torch.Tensor | None] = [None] * len(leaves)
    again: list[torch.Tensor | None] = [None] * len(outs)
    made: list[torch.Tensor | None] = [None] * len(new)
    into = {"input": total, "output": again, "new": made}
    for (kind, number), value in zip(layout.kept, found, strict=False):
        into[kind][number] = value
    parts = []
    if any(value is not None for value in again):
        bare = [tensor.detach() for tensor in kept]
        if plan.rule.materialize_grads:
            again = [
                torch.zeros_like(out) if value is None and floats(out) else value
                for out, value in zip(outs, again, strict=True)
            ]
        parts.append(plan.backward(layout, bare, again, needs))
    if any(value is not None for value in made):
        through = pulled_back(new, inputs, made)
        parts.append([None] * len(leaves) if through is None else through)
    for part in parts:
        total = [_added(a, b) for a, b in zip(total, part, strict=True)]
    return total, found[len(kept) :]


def _added(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b
