"""When a rule is checked, and what is remembered of it."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.errors import GradtoolsError
from gradtools.gradcheck.examination import describe, examine
from gradtools.gradcheck.report import Evidence, Report
from gradtools.lowering.flat import Plan
from gradtools.probing import is_checking
from gradtools.rules.rule import Rule

__all__ = ["Checker"]

MOST_BYTES = 256 * 2**20


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
        plan.state.second_order = report.refusal
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
