"""When a rule is checked, and what is remembered of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast, get_args

import torch

from gradtools import torch_compat
from gradtools.gradcheck import probes
from gradtools.gradcheck.examination import (
    examine,
    examine_batch,
    examine_invented,
)
from gradtools.gradcheck.policy import Policy, gradcheck_policy
from gradtools.gradcheck.report import Capability, Evidence, Report
from gradtools.gradcheck.surroundings import in_fresh_thread
from gradtools.lowering.flat import Plan
from gradtools.probing import is_checking
from gradtools.rules.rule import Rule
from gradtools.warning import warn

__all__ = ["Checker", "check_now", "listeners"]


def check_now(
    plan: Plan,
    leaves: Sequence[Any],
    uses: Sequence[Capability],
    *,
    watch: bool = True,
) -> Report:
    """Ask of a rule what some uses of it need; raise where it is wrong.

    Args:
        plan: The rule at a signature.
        leaves: The arguments.
        uses: What to ask about.
        watch: Look for captured tensors too.
    """
    reason = _obstacle(leaves)
    if reason is not None:
        evidence = Evidence("everything", "not checked", reason)
        return Report(plan.rule.where, plan.shown, (evidence,))
    report = examine(plan, leaves, uses, watch=watch)
    if report.failure is not None:
        raise copy.copy(report.failure)
    return report


listeners: list[Callable[[Report], None]] = []  # a test run hears of every report


def _tell(report: Report) -> None:
    for hear in listeners:
        hear(report)


MOST_REPORTS = 256
_SAFE = ("auto", "sequential")
EVERYTHING: tuple[Capability, ...] = get_args(Capability)


class Checker:
    """When a rule is checked, and what has been found of it so far.

    Attributes:
        reports: What was found, by signature.
    """

    def __init__(self) -> None:
        self.reports: dict[str, Report] = {}
        self.warned: set[str] = set()

    def under(self, policy: str) -> gradcheck_policy:
        """Return the context in which a policy is in force."""
        return gradcheck_policy(cast("Policy", policy))

    def before_use(self, plan: Plan, leaves: Sequence[Any]) -> None:
        """Check the rule for the use at hand; raise again what was found."""
        if plan.policy == "off":
            self.note(plan, "the policy is off")
            plan.is_unchecked = False
            return
        if is_checking() or plan.primal:
            return
        if plan.state.remembered is None and not _is_traced(leaves):
            plan.state.remembered = probes.Remembered(leaves)
        if plan.moving and plan.rule.jvp is not None and plan.order == 1:
            return  # bwd takes no part in it
        self.ensure(plan, "reverse", lambda: _examine(plan, leaves, "reverse"))
        plan.is_unchecked = (
            plan.policy == "always" or "reverse" not in plan.state.checked
        )

    def before_batch(self, plan: Plan, batched: Any, leaves: Sequence[Any]) -> None:
        """Check that a batch gives what its elements give."""
        if plan.policy == "off" or is_checking():
            return
        if plan.primal and plan.rule.vmap_rule is None and plan.rule.vmap in _SAFE:
            return  # torch, or a loop, does it all
        use = ("vmap", batched.pattern)
        if _is_traced(leaves):
            self.ensure(
                plan,
                use,
                lambda: in_fresh_thread(
                    lambda: examine_batch(plan, batched, probes.made_up(leaves))
                ),
            )
        else:
            values = _plain(leaves)
            self.ensure(
                plan,
                use,
                lambda: _obstacle(values) or examine_batch(plan, batched, values),
            )

    def before_deriving(self, plan: Plan, what: Any) -> None:
        """Check what is derived from bwd, on the arguments of an earlier call.

        In a thread of its own: the use may be in a trace, or under a transform.
        """
        remembered = plan.state.remembered
        if plan.policy == "off" or is_checking() or remembered is None:
            return
        self.ensure(
            plan,
            what,
            lambda: in_fresh_thread(lambda: _examine_again(plan, remembered, what)),
        )

    def ensure(
        self, plan: Plan, use: Hashable, examination: Callable[[], Report | str]
    ) -> None:
        """Run an examination unless it has been; raise what it found, once or again.

        Args:
            plan: The rule at a signature.
            use: What the rule is about to be used for.
            examination: Returns a report, or why there can be none.
        """
        state = plan.state
        if _is_known(plan, use):
            return
        with state.checking:
            if _is_known(plan, use):
                return
            if state.is_one_of_many:
                found: Report | str = _CROWDED
            else:
                found = examination()
            if isinstance(found, str):
                self.note(plan, found)
                if found is _CROWDED:
                    state.checked[use] = None
                return
            self.file(found)
            state.checked[use] = found.failure
        if found.failure is not None:
            raise copy.copy(found.failure)
        self.tell_gaps(plan.rule, found)

    def check_in_full(self, plan: Plan, leaves: Sequence[Any]) -> Report:
        """Ask everything, now, and measure what the pictures show."""
        reason = _obstacle(leaves)
        if reason is not None:
            return self.not_checked(plan, reason)
        report = examine(plan, leaves, EVERYTHING, full=True)
        self.file(report)
        if report.failure is not None:
            raise copy.copy(report.failure)
        return report

    def before_trace(self, plan: Plan, leaves: Sequence[Any], order: int) -> None:
        """Check a rule that torch.compile traces, on numbers that are made up."""
        if plan.policy == "off":
            self.note(plan, "the policy is off")
        elif not is_checking():
            self.ensure(plan, "reverse", lambda: _examine_invented(plan, leaves))
            if order > 1 and not plan.rule.once_differentiable:
                self.before_deriving(plan, "second order")

    def before_blind_trace(self, rule: Rule, policy: str) -> None:
        """Say that a rule is traced, unchecked, on arguments that no check can see."""
        if policy != "off" and not is_checking() and not self.reports:
            self.warn(
                rule,
                "torch.compile traces it with an object made in the trace; call it "
                "once before, or give it probe= and call gradcheck()",
            )

    def file(self, report: Report) -> None:
        """Keep a report, beside what is known of the signature."""
        _tell(report)
        known = self.reports.get(report.signature)
        if known is None or known.outcome != "passed" or report.figures:
            self.keep(report)
        else:
            self.keep(known.with_more(report))

    def not_checked(self, plan: Plan, reason: str) -> Report:
        """Return, and file, the report of a signature that goes unchecked."""
        evidence = Evidence("everything", "not checked", reason)
        report = Report(plan.rule.where, plan.shown, (evidence,))
        _tell(report)
        if report.signature not in self.reports:
            self.keep(report)
        return report

    def keep(self, report: Report) -> None:
        """Remember a report; of too many, such as one for each step, the last ones."""
        self.reports[report.signature] = report
        if len(self.reports) > MOST_REPORTS:
            del self.reports[next(iter(self.reports))]

    def note(self, plan: Plan, reason: str) -> None:
        """Record that nothing was checked, and why; say so once."""
        if reason in plan.state.unchecked:
            return
        plan.state.unchecked.add(reason)
        self.not_checked(plan, reason)
        if plan.policy != "off":
            self.warn(plan.rule, reason)

    def tell_gaps(self, rule: Rule, report: Report) -> None:
        """Say once what could not be checked."""
        for item in report.evidence:
            if item.outcome == "not checked":
                self.warn(rule, f"{item.question}: {item.detail}")

    def warn(self, rule: Rule, reason: str) -> None:
        """Say once that something of a rule goes unchecked."""
        if reason not in self.warned:
            self.warned.add(reason)
            warn(f"gradtools did not check the rule {rule.where}: {reason}")


_CROWDED = (
    "it is used at more than 16 signatures, and this is a further one (check it with "
    "gradcheck(), or give the rule fewer kinds of arguments)"
)


def _is_known(plan: Plan, use: Hashable) -> bool:
    """Whether the rule was checked for a use; raise again if it was wrong."""
    checked = plan.state.checked
    if use not in checked:
        return False
    error = checked[use]
    if error is not None:
        raise copy.copy(error)
    return plan.policy != "always" or use != "reverse"


def _examine(plan: Plan, leaves: Sequence[Any], use: Capability) -> Report | str:
    if _is_traced(leaves):
        return _examine_invented(plan, leaves, use)
    reason = _obstacle(leaves)
    return examine(plan, leaves, (use,)) if reason is None else reason


def _examine_again(
    plan: Plan, remembered: probes.Remembered, use: Capability
) -> Report | str:
    leaves = remembered.recall()
    if leaves is None:
        return f"{use}: an argument of the call it would be checked on is no more"
    try:
        return _examine(plan, leaves, use)
    except Exception as error:
        if remembered.is_whole:
            raise
        return f"{use}: on what is left of an earlier call's arguments, {error!r}"


def _examine_invented(
    plan: Plan, leaves: Sequence[Any], use: Capability = "reverse"
) -> Report | str:
    return in_fresh_thread(lambda: examine_invented(plan, leaves, use))


def _is_traced(leaves: Sequence[Any]) -> bool:
    return any(isinstance(x, torch.Tensor) and torch_compat.is_fake(x) for x in leaves)


def _plain(leaves: Sequence[Any]) -> list[Any]:
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]


def _obstacle(leaves: Sequence[Any]) -> str | None:
    """Say why a check cannot run on these leaves."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if any(tensor.is_meta for tensor in tensors):
        return "the arguments are meta tensors, without values"
    if any(t.layout is not torch.strided for t in tensors):
        return "an argument is sparse: its numbers cannot be moved one by one"
    strange = [t for t in tensors if torch_compat.is_foreign_subclass(t)]
    if strange:
        return (
            f"an argument is a {type(strange[0]).__name__}, which a check cannot copy"
        )
    if any(t.is_cuda for t in tensors) and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None
