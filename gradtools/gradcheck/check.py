"""The check of a rule: which questions are asked, and when."""

from __future__ import annotations

import dataclasses
import threading
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.errors import GradientMismatchError, GradtoolsError, Violation
from gradtools.gradcheck import probes
from gradtools.gradcheck.numeric import Comparison, compare
from gradtools.gradcheck.probes import Probe
from gradtools.gradcheck.report import Evidence, Report
from gradtools.lowering.flat import Plan
from gradtools.lowering.replay import random_state, replayed
from gradtools.probing import is_checking, probing
from gradtools.rules.rule import Approximate, Exact, Rule, Surrogate
from gradtools.trees import Structure

__all__ = ["Checker", "examine"]

MOST_BYTES = 256 * 2**20
DIRECTIONS = 2
TRIES = 3
SMOOTH_RTOL = 1e-5
ROUGH_RTOL = 3e-3


class Checker:
    """When a rule is checked, and what has been found of it so far.

    Attributes:
        reports: One report per signature that was met.
    """

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.lock = threading.RLock()

    def before_use(self, plan: Plan, leaves: Sequence[Any]) -> None:
        """Check the rule if its policy asks for it; raise again what was found."""
        state = plan.state
        if isinstance(state.checked, GradtoolsError):
            raise state.checked
        if is_checking() or (state.checked is not None and plan.policy != "always"):
            return
        if plan.policy == "off":
            state.checked = self.note(plan, "the policy is off")
            return
        with self.lock:
            if state.checked is not None and plan.policy != "always":
                return
            reason = _obstacle(leaves)
            if reason is not None:
                state.checked = self.note(plan, reason)
                _warn(plan.rule, reason)
                return
            try:
                state.checked = examine(plan, leaves)
            except GradtoolsError as error:
                state.checked = error
                raise
            self.reports.append(state.checked)
            for item in state.checked.evidence:
                if item.outcome == "not checked":
                    _warn(plan.rule, f"{item.question}: {item.detail}")

    def note(self, plan: Plan, reason: str) -> Report:
        """Record that nothing was checked, and why."""
        evidence = Evidence("everything", "not checked", reason)
        report = Report(plan.rule.where, describe(plan), (evidence,))
        self.reports.append(report)
        return report


def _warn(rule: Rule, reason: str) -> None:
    warnings.warn(
        f"gradtools did not check the rule {rule.where}: {reason}", stacklevel=2
    )


def _obstacle(leaves: Sequence[Any]) -> str | None:
    """Say why a check cannot run on these leaves."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(tensor.is_meta for tensor in tensors):
        return "the arguments are meta tensors, without values"
    if any(torch_compat.is_fake(tensor) for tensor in tensors):
        return "the arguments are fake tensors, without values"
    strange = [t for t in tensors if torch_compat.is_foreign_subclass(t)]
    if strange:
        return (
            f"an argument is a {type(strange[0]).__name__}, which a check cannot copy"
        )
    if any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    size = 8 * 8 * sum(tensor.numel() for tensor in tensors)
    if size > MOST_BYTES:
        return (
            f"the check of arguments of this size would take {size / 2**20:.0f} MiB; "
            "give "
            "the rule smaller ones with probe="
        )
    return None


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
    )


class _Examination:
    """One run through the questions."""

    def __init__(self, plan: Plan, leaves: Sequence[Any]) -> None:
        self.rule = plan.rule
        self.evaluations = 0
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
        probe, in_double = self.widened()
        evidence = [self.forward_agrees(probe, in_double=in_double)]
        claimed = self.rule.contract
        if isinstance(claimed, Surrogate):
            if claimed.reference is None:
                evidence.append(
                    Evidence("derivative", "passed", "a surrogate, not compared")
                )
                return evidence
            rule = dataclasses.replace(self.rule, bwd=claimed.reference)
            probe = Probe(dataclasses.replace(probe.plan, rule=rule), probe.leaves)
        return evidence + self.derivative(probe, in_double=in_double)

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

    def widened(self) -> tuple[Probe, bool]:
        """Return the probe in double precision, where the function takes that."""
        probe = probes.in_double(self.probe)
        try:
            self.fun(probe, probe.leaves)
            self.fwd(probe)
        except Exception:
            return self.probe, False
        return probe, True

    # The questions.

    def forward_agrees(self, probe: Probe, *, in_double: bool) -> Evidence:
        if self.rule.fwd is None:
            return Evidence("fwd agrees with fun", "passed", "fun itself runs")
        expected = self.fun(probe, probe.leaves)
        outs = self.fwd(probe)[0]
        worst = 0.0
        for place, (want, got) in enumerate(zip(expected, outs, strict=False)):
            if want.shape != got.shape or want.dtype != got.dtype:
                raise self.wrong_forward(place, _of(want), _of(got))
            error = _relative_error(want, got)
            tolerance = 1e-6 if in_double else 100 * _epsilon(want)
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

    def derivative(self, probe: Probe, *, in_double: bool) -> list[Evidence]:
        """Compare bwd with differences: together, then one by one for the culprit."""
        places = probe.places
        budget = self.tolerance(in_double=in_double)
        if isinstance(self.rule.contract, Approximate):
            return [self.one(probe, [place], budget) for place in places]
        together = self.measured(probe, places)
        if together is not None and all(item.error <= budget for item in together):
            worst = max(item.error for item in together)
            detail = f"relative error {worst:.0e} along {len(together)} directions"
            return [
                Evidence(
                    f"derivative in {_list(probe, places)}", "passed", detail, worst
                )
            ]
        return [self.one(probe, [place], budget) for place in places]

    def one(self, probe: Probe, places: list[int], budget: float) -> Evidence:
        question = f"derivative in {_list(probe, places)}"
        measured = self.measured(probe, places)
        if measured is None:
            return Evidence(question, "not checked", "differences do not converge here")
        worst = max(measured, key=lambda item: item.error)
        if worst.error > budget:
            raise self.wrong_derivative(probe, places[0], worst, budget)
        detail = f"relative error {worst.error:.0e} along {len(measured)} directions"
        return Evidence(question, "passed", detail, worst.error)

    def measured(self, probe: Probe, places: list[int]) -> list[Comparison] | None:
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

    def tolerance(self, *, in_double: bool) -> float:
        claimed = self.rule.contract
        if isinstance(claimed, Approximate):
            return claimed.rel
        if isinstance(claimed, Exact) and claimed.rtol is not None:
            return claimed.rtol
        return ROUGH_RTOL if in_double else 10 * ROUGH_RTOL

    def wrong_derivative(
        self, probe: Probe, place: int, worst: Comparison, budget: float
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
                    f"(allowed: {budget:.0e})",
                )
            ],
            fix="Correct bwd; if it is meant to differ, declare "
            "contract=Surrogate(...) "
            "or Approximate(...).",
        )


def _worst(found: Sequence[Comparison]) -> float:
    return max((item.error for item in found), default=0.0)


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
