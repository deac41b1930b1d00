"""The check of a rule: which questions are asked, and when."""

from __future__ import annotations

import copy
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
        reports: The last report for each signature that was met.
    """

    def __init__(self) -> None:
        self.reports: dict[str, Report] = {}
        self.lock = threading.RLock()

    def before_use(self, plan: Plan, leaves: Sequence[Any]) -> None:
        """Check the rule if its policy asks for it; raise again what was found."""
        if plan.policy == "off":
            self.note(plan, "the policy is off")
        elif not is_checking() and not _is_known(plan):
            with self.lock:
                if not _is_known(plan):
                    self.check(plan, leaves)

    def check(self, plan: Plan, leaves: Sequence[Any]) -> None:
        """Check the rule, and remember what was found."""
        seen = bool(self.reports)
        reason = _obstacle(leaves)
        if reason is not None:
            # A trace of a rule that was checked, or warned of, goes without a word.
            if self.note(plan, reason) and not (seen and reason == _WITHOUT_VALUES):
                _warn(plan.rule, reason)
            return
        try:
            report = examine(plan, leaves)
        except GradtoolsError as error:
            plan.state.checked = copy.copy(error)  # without the frames of this call
            raise
        plan.state.checked = report
        self.keep(report)
        for item in report.evidence:
            if item.outcome == "not checked":
                _warn(plan.rule, f"{item.question}: {item.detail}")

    def keep(self, report: Report) -> None:
        """File a report."""
        self.reports[report.signature] = report

    def note(self, plan: Plan, reason: str) -> bool:
        """Record that nothing was checked, and why; return whether that is news."""
        if reason in plan.state.unchecked:
            return False
        plan.state.unchecked.add(reason)
        evidence = Evidence("everything", "not checked", reason)
        report = Report(plan.rule.where, describe(plan), (evidence,))
        self.reports.setdefault(report.signature, report)
        return True

    def before_trace(self, rule: Rule, policy: str) -> None:
        """Say that a rule is traced that no call has checked yet."""
        outcomes = {report.outcome for report in self.reports.values()}
        if policy != "off" and not outcomes:
            reason = "torch.compile traces it; call it once before, or use gradcheck()"
            evidence = Evidence("everything", "not checked", reason)
            self.keep(Report(rule.where, "under torch.compile", (evidence,)))
            _warn(rule, reason)


def _is_known(plan: Plan) -> bool:
    """Whether the rule was checked at this signature; raise again if it was wrong."""
    found = plan.state.checked
    if isinstance(found, GradtoolsError):
        raise copy.copy(found)
    return found is not None and plan.policy != "always"


def _warn(rule: Rule, reason: str) -> None:
    warnings.warn(
        f"gradtools did not check the rule {rule.where}: {reason}", stacklevel=2
    )


_WITHOUT_VALUES = "the arguments are meta or fake tensors, without values"


def _obstacle(leaves: Sequence[Any]) -> str | None:
    """Say why a check cannot run on these leaves."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(tensor.is_meta or torch_compat.is_fake(tensor) for tensor in tensors):
        return _WITHOUT_VALUES
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
            "give the rule smaller ones with probe="
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
        self.in_double = False
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
        return evidence + self.derivative(probe)

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
                return [_evidence(probe, places, together)]
        return [self.one(probe, place) for place in places]

    def one(self, probe: Probe, place: int) -> Evidence:
        measured = self.measured(probe, [place])
        if measured is None:
            question = f"derivative in {_list(probe, [place])}"
            return Evidence(question, "not checked", "differences do not converge here")
        wrong = [item for item in measured if not self.is_allowed(item)]
        if wrong:
            raise self.wrong_derivative(probe, place, max(wrong, key=_error))
        return _evidence(probe, [place], measured)

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


def _evidence(
    probe: Probe, places: Sequence[int], found: Sequence[Comparison]
) -> Evidence:
    bound = max((max(item.error, item.precision) for item in found), default=0.0)
    detail = f"relative error below {bound:.0e} along {len(found)} directions"
    return Evidence(f"derivative in {_list(probe, places)}", "passed", detail, bound)


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
