"""The table of docs/capabilities.md: what the tests of compositions found.

``python -m tests.capabilities`` runs tests/transforms and writes the page. A run of the
tests on the same version of torch compares each cell with the page (see
tests/transforms/conftest.py), so the two cannot part.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests/transforms"
PAGE = ROOT / "docs/capabilities.md"

WRITING = "WRITE_CAPABILITIES"  # set in a run that the page follows
PASSED, FAILED, ERROR, ABSENT = "✓", "failed", "error", "."


class Cell(NamedTuple):
    """A composition (file and test) on a rule of the case table."""

    file: str
    test: str
    case: str


def cell_of(nodeid: str, cases: tuple[str, ...]) -> Cell | None:
    """Return the cell that a test belongs to, or None for one without a rule."""
    found = re.search(r"([^/]+)\.py::(\w+)\[(.*)\]$", nodeid)
    if found is None:
        return None
    file, test, name = found.groups()
    fitting = [
        case
        for case in cases
        if name == case or name.startswith(case + "-") or name.endswith("-" + case)
    ]
    return Cell(file, test, max(fitting, key=len)) if fitting else None


def case_names() -> tuple[str, ...]:
    """Return the rules of the case table, in its order."""
    from tests.transforms.cases import CASES  # it states rules: not on import

    return tuple(case.name for case in CASES)


class Recorder:
    """A plugin of pytest that keeps what became of every test."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self.found[report.nodeid] = outcome_of(report)

    def outcomes(self, cases: tuple[str, ...]) -> dict[Cell, str]:
        """Return the outcome of each cell: the worst of its tests."""
        outcomes: dict[Cell, str] = {}
        for nodeid, outcome in self.found.items():
            cell = cell_of(nodeid, cases)
            if cell is not None and outcomes.get(cell, PASSED) in (PASSED, ERROR):
                outcomes[cell] = outcome
        return outcomes


def outcome_of(report: Any) -> str:
    """Return what stands in the table for a test's report."""
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        return reason.removeprefix("Skipped: ")
    if report.failed:
        return FAILED
    test = report.nodeid.partition("[")[0]
    return ERROR if test.endswith("_is_an_error") else PASSED


# The page.

HEAD = """\
# What composes with what

All transforms of torch, alone and nested, on rules of every kind. A tick is a test that
compares the composition, number by number in float64, with torch code that does not use
gradtools. Nearly all of these rules are *markers*: their derivative is deliberately not
that of their function. So a transform that drops the rule, and differentiates the
function instead, fails.

This page is written by `python -m tests.capabilities` from a run of `tests/transforms`,
and each run of the tests compares itself with it. The columns are the rules listed
[below](#the-rules); the rows are test files, whose names say the composition.
"""


def page(outcomes: Mapping[Cell, str], cases: tuple[str, ...]) -> str:
    """Return the page."""
    reasons = sorted({o for o in outcomes.values() if is_reason(o)})
    signs = {reason: f"s{number}" for number, reason in enumerate(reasons, 1)}
    count = sum(o == PASSED for o in outcomes.values())
    refused = sum(o == ERROR for o in outcomes.values())
    skipped = sum(map(is_reason, outcomes.values()))
    lines = [
        HEAD,
        f"With torch {version()}: right in {count:,} cells; an error of torch's in "
        f"{refused}; skipped: {skipped}.\n",
    ]
    for group, rows in _grouped(outcomes).items():
        lines += [f"## {group}\n", *_table(rows, outcomes, cases, signs), ""]
    lines += ["## What the signs mean\n", f"- {PASSED}: right."]
    lines += [f"- {ERROR}: torch cannot do this of any function, and says so."]
    lines += [f"- {sign}: skipped. {reason}." for reason, sign in signs.items()]
    lines += ["", "## The rules\n", "| | rule |", "|--:|---|"]
    lines += [f"| {n} | {case} |" for n, case in enumerate(cases, 1)]
    lines += ["", *_runtime(), ""]
    return "\n".join(lines)


def version() -> str:
    """Return torch's version without the build."""
    return torch.__version__.partition("+")[0]


def is_reason(outcome: str) -> bool:
    """Whether an outcome is the reason of a skip."""
    return outcome not in (PASSED, FAILED, ERROR, ABSENT)


def _grouped(outcomes: Mapping[Cell, str]) -> dict[str, list[tuple[str, str]]]:
    names = ("Plain autograd", "torch.func", "torch.compile")
    groups: dict[str, list[tuple[str, str]]] = {name: [] for name in names}
    for file, test in sorted({(cell.file, cell.test) for cell in outcomes}):
        groups[_group(file)].append((file, test))
    return groups


def _group(file: str) -> str:
    if file.startswith(("test_compiled", "test_inductor")):
        return "torch.compile"
    _, _, code = (FOLDER / f"{file}.py").read_text(encoding="utf-8").split('"""', 2)
    functional = r"torch\.func\.|compositions import .*\b(grad|jvp)\b"
    return "torch.func" if re.search(functional, code) else "Plain autograd"


def _table(
    rows: list[tuple[str, str]],
    outcomes: Mapping[Cell, str],
    cases: tuple[str, ...],
    signs: Mapping[str, str],
) -> Iterator[str]:
    yield f"| composition | {' | '.join(str(n) for n in range(1, len(cases) + 1))} |"
    yield "|---|" + "--|" * len(cases)
    for file, test in rows:
        cells = [outcomes.get(Cell(file, test, case), ABSENT) for case in cases]
        shown = " | ".join(signs.get(cell, cell) for cell in cells)
        yield f"| {in_words(test)} | {shown} |"


def in_words(test: str) -> str:
    """Return the name of a test as words."""
    return test.removeprefix("test_").replace("_", " ")


def _runtime() -> Iterator[str]:
    """Say which tests there are of what surrounds a rule."""
    yield "## What else is tested\n"
    yield (
        "Not by the table, but once each: what a rule does in the surroundings that "
        "programs have.\n"
    )
    yield "| tests | what |"
    yield "|---|---|"
    for path in sorted((ROOT / "tests/runtime").glob("test_*.py")):
        first = path.read_text(encoding="utf-8").partition("\n")[0].strip('"')
        yield f"| `{path.relative_to(ROOT).as_posix()}` | {first} |"


# The page read back.


def disagreement(report: Any) -> str | None:
    """Say where a test's report and the page contradict each other."""
    torch_of_page, cells = read_page()
    cell = cell_of(report.nodeid, case_names())
    elsewhere = torch_of_page != version() or torch.empty(0).device.type != "cpu"
    if cell is None or elsewhere or os.environ.get(WRITING):
        return None
    claimed = cells.get((in_words(cell.test), cell.case), "nothing")
    outcome = outcome_of(report)
    if outcome == claimed:
        return None
    return (
        f"{PAGE.relative_to(ROOT)} says {claimed!r} of this cell, and the test "
        f"{outcome!r}: run python -m tests.capabilities"
    )


@functools.cache
def read_page() -> tuple[str, dict[tuple[str, str], str]]:
    """Read the page as it is."""
    return read(PAGE.read_text(encoding="utf-8"))


def read(text: str) -> tuple[str, dict[tuple[str, str], str]]:
    """Return the version of torch of a page, and its cells.

    Cells are by test, in words, and case.
    """
    found = re.search(r"With torch ([\d.]+):", text)
    if found is None:
        return "", {}
    reasons = dict(re.findall(r"^- (s\d+): skipped\. (.*)\.$", text, re.MULTILINE))
    cases = re.findall(r"^\| \d+ \| (.*) \|$", text, re.MULTILINE)
    cells: dict[tuple[str, str], str] = {}
    for line in text.splitlines():
        name, *signs = line.strip("|").split(" | ")
        if len(signs) == len(cases) and not signs[0].isdigit():
            for case, sign in zip(cases, signs, strict=True):
                outcome = reasons.get(sign.strip(), sign.strip())
                if outcome != ABSENT:
                    cells[name.strip(), case] = outcome
    return found[1], cells


def main() -> int:
    """Run the tests and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", default="2", help="processes (2)")
    options = parser.parse_args()
    recorder = Recorder()
    os.environ[WRITING] = "1"
    arguments = ["-q", "-n", options.jobs, "--dist", "worksteal"]
    status = pytest.main([*arguments, str(FOLDER)], plugins=[recorder])
    if status == 0:
        cases = case_names()
        outcomes = recorder.outcomes(cases)
        PAGE.write_text(page(outcomes, cases), encoding="utf-8")
        print(f"{PAGE.relative_to(ROOT)}: {len(outcomes)} cells")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
