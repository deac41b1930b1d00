"""What a check found: records that print as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from gradtools.errors import GradtoolsError
from gradtools.spelling import spelled
from gradtools.tables import as_html, as_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Capability", "Evidence", "Figures", "Outcome", "Report"]

Outcome = Literal["passed", "failed", "not checked", "not given"]
Capability = Literal["reverse", "forward mode", "second order", "vmap"]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One question asked of a rule, and its answer.

    Attributes:
        question: What was asked, such as "derivative in x".
        outcome: ``"passed"``, ``"failed"``, ``"not checked"``, or ``"not given"`` for
            what the rule need not have and refuses.
        detail: The figures, or why nothing could be checked.
        error: The largest relative error that was found, where one was measured.
        capability: What the rule was used for when the question came up.
    """

    question: str
    outcome: Outcome
    detail: str = ""
    error: float | None = None
    capability: Capability = "reverse"


@dataclasses.dataclass(frozen=True)
class Figures:
    """The cotangent of one argument beside its reference, for the pictures.

    Attributes:
        where: Key path of the argument, such as ``args.x``.
        shape: Its shape.
        places: Positions of the elements below in the flattened argument; all of them,
            or a sample.
        analytic: What bwd returns there, for one random cotangent.
        reference: What it should be.
        source: Where the reference comes from: ``"autograd"`` or ``"differences"``.
        steps: Step sizes of central differences along one direction, relative to the
            size of the argument.
        errors: For each of them the relative distance from what bwd says.
    """

    where: str
    shape: tuple[int, ...]
    places: np.ndarray[Any, Any]
    analytic: np.ndarray[Any, Any]
    reference: np.ndarray[Any, Any]
    source: str
    steps: np.ndarray[Any, Any]
    errors: np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """What was checked of a rule at one signature; prints as a table.

    Attributes:
        rule: Name and place of the rule.
        signature: The arguments, in words.
        evidence: The questions and answers, in the order in which they were asked.
        contract: What the rule claims to be.
        seconds: How long the checks took.
        evaluations: How often fun, fwd and bwd ran for them, together.
        failure: What the check raised, if it raised.
        figures: What the pictures show; from ``gradcheck()`` only.
    """

    rule: str
    signature: str
    evidence: tuple[Evidence, ...]
    contract: str = "Exact()"
    seconds: float = 0.0
    evaluations: int = 0
    failure: GradtoolsError | None = None
    figures: tuple[Figures, ...] = dataclasses.field(default=(), repr=False)

    @property
    def outcome(self) -> Outcome:
        """The worst outcome among the evidence."""
        outcomes = {item.outcome for item in self.evidence}
        if "failed" in outcomes:
            return "failed"
        return "not checked" if "not checked" in outcomes else "passed"

    def with_more(self, later: Report) -> Report:
        """Return this report with what a later check of the same signature found."""
        known = {(item.capability, item.question): item for item in self.evidence}
        known |= {(item.capability, item.question): item for item in later.evidence}
        order = get_args(Capability)
        return dataclasses.replace(
            later,
            evidence=tuple(
                sorted(known.values(), key=lambda item: order.index(item.capability))
            ),
            seconds=self.seconds + later.seconds,
            evaluations=self.evaluations + later.evaluations,
            failure=later.failure or self.failure,
            figures=later.figures or self.figures,
        )

    @spelled
    def to_html(self, path: str | Path) -> Path:
        """Write the report, with pictures, as one file that needs no other.

        Args:
            path: Where to.

        Returns:
            The path.

        Raises:
            ImportError: The report has pictures and matplotlib is not installed.
        """
        return write_page([self], path)

    @property
    def headline(self) -> str:
        """The rule, the outcome and what the check took, in one line."""
        return (
            f"{self.rule}: {self.outcome} in {self.seconds * 1e3:.1f} ms, "
            f"{self.evaluations} evaluations"
        )

    @property
    def claim(self) -> str:
        """The arguments, and what the rule claims to be where that is not exact."""
        told = "" if self.contract == "Exact()" else f"; contract {self.contract}"
        return f"{self.signature}{told}"

    def __repr__(self) -> str:
        rows = [(item.outcome, item.question, item.detail) for item in self.evidence]
        return as_text(f"{self.headline}\n  {self.claim}", rows)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        rows = [
            (item.outcome, item.capability, item.question, item.detail)
            for item in self.evidence
        ]
        headings = "outcome", "of", "question", "detail"
        return as_html(f"{self.headline}; {self.claim}", rows, headings)

    def __rich__(self) -> Table:
        """Print in colour where rich prints."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=escape(self.headline),
            caption=escape(self.signature),
            title_justify="left",
        )
        for heading in ("outcome", "of", "question", "detail"):
            table.add_column(heading)
        for item in self.evidence:
            colour = _COLOURS[item.outcome]
            cells = item.capability, escape(item.question), escape(item.detail)
            table.add_row(f"[{colour}]{item.outcome}[/]", *cells)
        return table


_COLOURS = {
    "passed": "green",
    "failed": "bold red",
    "not checked": "yellow",
    "not given": "dim",
}


def write_page(reports: Sequence[Report], path: str | Path) -> Path:
    """Write reports as one HTML file."""
    from gradtools.gradcheck.page import page  # matplotlib, where it draws

    target = Path(path)
    target.write_text(page(reports), encoding="utf-8")
    return target
