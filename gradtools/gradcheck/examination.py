"""What a rule is asked: one run through the questions, on one set of arguments."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.errors import GradientMismatchError, Violation
from gradtools.gradcheck import probes, second_order
from gradtools.gradcheck.numeric import Comparison, compare, random_like
from gradtools.gradcheck.probes import Probe
from gradtools.gradcheck.report import Evidence, Report
from gradtools.lowering.flat import Plan
from gradtools.lowering.replay import random_state, replayed
from gradtools.probing import probing
from gradtools.rules.rule import Approximate, Exact, Surrogate
from gradtools.trees import Structure

__all__ = ["describe", "examine"]

DIRECTIONS = 2
TRIES = 3
SMOOTH_RTOL = 1e-5
ROUGH_RTOL = 3e-3
MOST_NOISE = 1e-3  # for a refusal


def describe(plan: Plan) -> str:
    """Describe the arguments of a call in one line."""
    parts = [
        f"{path.removeprefix('args.')}: {tuple(meta.shape)} "
        + str(meta.dtype).removeprefix("torch.")
        for path, meta in zip(plan.signature.paths(), plan.signature.metas, strict=True)
        if meta is not None
    ]
    return ", ".join(parts)


def examine(plan: Plan, leaves: Sequence[Any]) -> Report:
    """Ask everything of a rule on the given leaves; raise when it is wrong."""
    start = time.perf_counter()
    with probing(), torch_compat.clean_autograd(), torch.no_grad():
        examination = _Examination(plan, leaves)
        evidence = examination.run()
    return Report(
        plan.rule.where,
        describe(plan),
        tuple(evidence),
        time.perf_counter() - start,
        examination.evaluations,
        examination.second_order,
    )


class _Examination:
    """One run through the questions."""

    def __init__(self, plan: Plan, leaves: Sequence[Any]) -> None:
        self.rule = plan.rule
        self.evaluations = 0
        self.in_double = False
        self.second_order: GradientMismatchError | None = None
        self.generator = torch.Generator().manual_seed(0)
        given = plan.rule.probe
        if given is None:
            plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]
            self.probe = Probe(plan, ()).with_leaves(plain)
        else:
            values = given()
            values = values if isinstance(values, tuple) else (values,)
            self.probe = probes.of_entries(plan, plan.rule.parameters.bind(values, {}))
        self.state = random_state(self.probe.leaves)

    def run(self) -> list[Evidence]:
        probe = self.widened()
        evidence = [self.forward_agrees(probe)]
        claimed = self.rule.contract
        if isinstance(claimed, Surrogate):
            if claimed.reference is None:
                evidence.append(
                    Evidence("derivative", "passed", "a surrogate, not compared")
                )
                return evidence
            rule = dataclasses.replace(self.rule, bwd=claimed.reference)
            probe = Probe(dataclasses.replace(probe.plan, rule=rule), probe.leaves)
        evidence += self.derivative(probe)
        if self.in_double and claimed == Exact():
            evidence += self.second_derivative(probe)
        return evidence

    # Running the user's functions.

    def fun(self, probe: Probe, leaves: Sequence[Any]) -> Sequence[torch.Tensor]:
        self.evaluations += 1
        plan = probe.plan
        with replayed(self.state):
            out = plan.signature.parameters.call(
                plan.rule.fun, plan.signature.entries(leaves)
            )
        return Structure.split(out)[0]

    def fwd(self, probe: Probe) -> Any:
        self.evaluations += 1
        with replayed(self.state):
            return probe.plan.forward(probe.leaves)

    def widened(self) -> Probe:
        """Return the probe in double precision, where the function takes that."""
        probe = probes.in_double(self.probe)
        try:
            self.fun(probe, probe.leaves)
            self.fwd(probe)
        except Exception:
            return self.probe
        self.in_double = True
        return probe

    # The questions.

    def forward_agrees(self, probe: Probe) -> Evidence:
        if self.rule.fwd is None:
            return Evidence("fwd agrees with fun", "passed", "fun itself runs")
        expected = self.fun(probe, probe.leaves)
        outs = self.fwd(probe)[0]
        worst = 0.0
        for place, (want, got) in enumerate(zip(expected, outs, strict=False)):
            if want.shape != got.shape or want.dtype != got.dtype:
                raise self.wrong_forward(place, _of(want), _of(got))
            error = _relative_error(want, got)
            tolerance = 1e-6 if self.in_double else 100 * _epsilon(want)
            if error > tolerance:
                raise self.wrong_forward(
                    place,
                    "the value of fun",
                    f"a value that differs by {error:.1e} of its size",
                )
            worst = max(worst, error)
        if len(expected) != len(outs):
            raise self.wrong_forward(
                0, f"{len(expected)} tensors", f"{len(outs)} tensors"
            )
        return Evidence("fwd agrees with fun", "passed", f"to {worst:.0e}", worst)

    def wrong_forward(
        self, place: int, expected: str, got: str
    ) -> GradientMismatchError:
        return GradientMismatchError(
            f"{self.rule.name}: fwd does not return what the function returns",
            rule=self.rule.where,
            function=self.rule.which("fwd"),
            violations=[Violation(f"output {place}", expected, got)],
            fix="Make fwd compute the function itself, and return its residuals beside "
            "it.",
        )

    def derivative(self, probe: Probe) -> list[Evidence]:
        """Compare bwd with differences: together, then one by one for the culprit."""
        places = probe.places
        if not isinstance(self.rule.contract, Approximate):
            together = self.measured(probe, places)
            if together is not None and all(map(self.is_allowed, together)):
                return [_evidence(_question(probe, places), together)]
        return [self.one(probe, place) for place in places]

    def one(self, probe: Probe, place: int) -> Evidence:
        question = _question(probe, [place])
        measured = self.measured(probe, [place])
        if measured is None:
            return Evidence(question, "not checked", "differences do not converge here")
        wrong = [item for item in measured if not self.is_allowed(item)]
        if wrong:
            raise self.wrong_derivative(probe, place, max(wrong, key=_error))
        return _evidence(question, measured)

    def second_derivative(self, probe: Probe) -> list[Evidence]:
        """Compare the derivative of bwd with differences of bwd.

        A rule may be right and have no second derivative: then it is refused where it
        is asked for, and only there.
        """
        if self.rule.bwd is None or self.rule.once_differentiable:
            return []
        worst: Comparison | None = None
        for _ in range(TRIES):
            near = probes.moved_off_kinks(probe, self.generator)
            try:
                item = self.compared_again(near)
            except Exception:  # code that torch cannot see raises what it likes
                return []
            if item.is_conclusive and self.is_allowed(item):
                return [_evidence("second derivative", [item])]
            known = item.noise <= MOST_NOISE * abs(item.numeric)
            if not (known and math.isfinite(item.analytic)):
                return []
            if worst is None or item.error < worst.error:
                worst = item
        assert worst is not None
        self.second_order = self.wrong_second_derivative(worst)
        detail = f"off by {worst.error:.1e} of its size; refused where it is asked for"
        return [Evidence("second derivative", "not given", detail, worst.error)]

    def wrong_second_derivative(self, worst: Comparison) -> GradientMismatchError:
        return GradientMismatchError(
            f"{self.rule.name}: the derivative of bwd, for a second derivative, is not "
            "what differences of bwd say",
            rule=self.rule.where,
            function=self.rule.which("bwd"),
            violations=[
                Violation(
                    "second derivative",
                    f"{worst.numeric:.6g} along a random direction, by differences",
                    f"{worst.analytic:.6g}",
                )
            ],
            fix="Look for a .detach(), .item() or no_grad in fwd or bwd, or declare "
            "once_differentiable=True.",
        )

    def measured(
        self,
        probe: Probe,
        places: list[int],
    ) -> list[Comparison] | None:
        """Compare along a few directions; None where differences mean nothing.

        A kink near the probe makes one try wrong, a wrong rule makes all tries wrong.
        """
        best: list[Comparison] | None = None
        for attempt in range(TRIES):
            near = probes.moved_off_kinks(probe, self.generator)
            found = self.compared(near, places)
            if found is None:
                found = self.compared(probe, places)
            if found is None:
                continue
            if best is None or _worst(found) < _worst(best):
                best = found
            if _worst(best) <= SMOOTH_RTOL or attempt + 1 == TRIES:
                break
        return best

    def compared(self, probe: Probe, places: list[int]) -> list[Comparison] | None:
        outs, new, layout = self.fwd(probe)
        kept = layout.pick(probe.leaves, outs, new)
        able = [out.is_floating_point() or out.is_complex() for out in outs]
        needs = [place in places for place in range(len(probe.leaves))]

        def fun(leaves: Sequence[Any]) -> list[torch.Tensor]:
            return [
                out
                for out, can in zip(self.fun(probe, leaves), able, strict=True)
                if can
            ]

        def bwd(cotangents: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
            self.evaluations += 1
            given = iter(cotangents)
            with replayed(self.state):
                every = [next(given) if can else None for can in able]
                return probe.plan.backward(layout, kept, every, needs)

        floating = [out for out, can in zip(outs, able, strict=True) if can]
        if not floating or not places:
            return []
        found = [
            compare(fun, bwd, probe, floating, places, self.generator)
            for _ in range(DIRECTIONS)
        ]
        return found if all(item.is_conclusive for item in found) else None

    def compared_again(self, probe: Probe) -> Comparison:
        plan, places = probe.plan, probe.places
        outs = self.fwd(probe)[0]
        cotangents = [
            random_like(out, self.generator)
            if out.is_floating_point() or out.is_complex()
            else None
            for out in outs
        ]

        def gradient(leaves: Sequence[Any]) -> list[torch.Tensor]:
            self.evaluations += 1
            with replayed(self.state):
                return second_order.gradient(plan, leaves, cotangents, places)

        def pulled_back(weights: Sequence[torch.Tensor]) -> Any:
            self.evaluations += 1
            with replayed(self.state):
                found = second_order.pulled_back(
                    plan, probe.leaves, cotangents, places, weights
                )
            return [None] * len(probe.leaves) if found is None else found

        here = gradient(probe.leaves)
        return compare(gradient, pulled_back, probe, here, places, self.generator)

    def allowed(self, item: Comparison) -> float:
        """Return the tolerance: what the contract says, else what was earned."""
        claimed = self.rule.contract
        if isinstance(claimed, Approximate):
            return claimed.rel + (claimed.abs or 0.0) / (item.scale or 1.0)
        if isinstance(claimed, Exact) and (claimed.rtol or claimed.atol):
            return (claimed.rtol or 0.0) + (claimed.atol or 0.0) / (item.scale or 1.0)
        if not self.in_double:
            return 10 * ROUGH_RTOL
        return SMOOTH_RTOL if item.precision < SMOOTH_RTOL / 10 else ROUGH_RTOL

    def is_allowed(self, item: Comparison) -> bool:
        return item.error <= self.allowed(item)

    def wrong_derivative(
        self, probe: Probe, place: int, worst: Comparison
    ) -> GradientMismatchError:
        path = probe.plan.signature.paths()[place]
        what = (
            "outside the budget of its contract"
            if isinstance(self.rule.contract, Approximate)
            else "not the derivative of the function"
        )
        return GradientMismatchError(
            f"{self.rule.name}: what bwd returns for {path} is {what}",
            rule=self.rule.where,
            function=self.rule.which("bwd"),
            violations=[
                Violation(
                    path,
                    f"{worst.numeric:.6g} along a random direction, by differences",
                    f"{worst.analytic:.6g}, off by {worst.error:.1e} of its size "
                    f"(allowed: {self.allowed(worst):.0e})",
                )
            ],
            fix="Correct bwd; if it is meant to differ, declare "
            "contract=Surrogate(...) or Approximate(...).",
        )


def _error(item: Comparison) -> float:
    return item.error


def _worst(found: Sequence[Comparison]) -> float:
    return max(map(_error, found), default=0.0)


def _evidence(question: str, found: Sequence[Comparison]) -> Evidence:
    bound = max((max(item.error, item.precision) for item in found), default=0.0)
    along = "a direction" if len(found) == 1 else f"{len(found)} directions"
    detail = f"relative error below {bound:.0e} along {along}"
    return Evidence(question, "passed", detail, bound)


def _question(probe: Probe, places: Sequence[int]) -> str:
    return f"derivative in {_list(probe, places)}"


def _list(probe: Probe, places: Sequence[int]) -> str:
    paths = probe.plan.signature.paths()
    return (
        ", ".join(paths[place].removeprefix("args.") for place in places) or "nothing"
    )


def _of(tensor: torch.Tensor) -> str:
    return f"a tensor of shape {tuple(tensor.shape)}, {tensor.dtype}"


def _epsilon(tensor: torch.Tensor) -> float:
    return torch.finfo(tensor.dtype).eps if _floats(tensor) else 0.0


def _floats(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _relative_error(want: torch.Tensor, got: torch.Tensor) -> float:
    """Largest difference as a part of the largest value, where both are finite."""
    if not _floats(want):
        return 0.0 if torch.equal(want, got) else float("inf")
    finite = torch.isfinite(want) & torch.isfinite(got)
    if not bool(finite.any()):
        return 0.0
    difference = (want - got)[finite].abs().max().item()
    size = want[finite].abs().max().item()
    return difference / size if size else difference
