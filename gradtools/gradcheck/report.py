"""What a check found: records that print as a table."""

from __future__ import annotations

import dataclasses
from typing import Literal

from gradtools.errors import GradtoolsError

__all__ = ["Evidence", "Report"]

Outcome = Literal["passed", "failed", "not checked", "not given"]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One question asked of a rule, and its answer.

    Attributes:
        question: What was asked, such as "derivative of args.x".
        outcome: ``"passed"``, ``"failed"``, ``"not checked"``, or ``"not given"`` for
            what the rule need not have and refuses.
        detail: The figures, or why nothing could be checked.
        error: The largest relative error that was found, where one was measured.
    """

    question: str
    outcome: Outcome
    detail: str = ""
    error: float | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What was checked of a rule at one signature.

    Attributes:
        rule: Name and place of the rule.
        signature: The arguments, in words.
        evidence: The questions and answers, in the order in which they were asked.
        seconds: How long the check took.
        evaluations: How often fun, fwd and bwd ran for it, together.
        refusal: What a second derivative will raise, where the rule gives none.
    """

    rule: str
    signature: str
    evidence: tuple[Evidence, ...]
    seconds: float = 0.0
    evaluations: int = 0
    refusal: GradtoolsError | None = None

    @property
    def outcome(self) -> Outcome:
        """The worst outcome among the evidence."""
        outcomes = {item.outcome for item in self.evidence}
        if "failed" in outcomes:
            return "failed"
        return "not checked" if "not checked" in outcomes else "passed"

    def __str__(self) -> str:
        width = max((len(item.question) for item in self.evidence), default=0)
        lines = [
            f"{self.rule}: {self.outcome} in {self.seconds * 1e3:.1f} ms, "
            f"{self.evaluations} evaluations",
            f"  {self.signature}",
            *(
                f"  {item.outcome:<11}  {item.question:<{width}}  {item.detail}"
                for item in self.evidence
            ),
        ]
        return "\n".join(lines)
