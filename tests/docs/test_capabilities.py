"""docs/capabilities.md is what its generator writes, of the cells that there are."""

import subprocess
import sys

import pytest

from tests import capabilities
from tests.capabilities import ERROR, PASSED, Cell


@pytest.fixture(scope="module")
def collected():
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/transforms"],
        capture_output=True,
        text=True,
        check=True,
        cwd=capabilities.ROOT,
    ).stdout
    cases = capabilities.case_names()
    cells = (capabilities.cell_of(line, cases) for line in listed.splitlines())
    return {cell for cell in cells if cell is not None}


def test_the_page_has_the_cells_that_the_tests_have(collected):
    _, cells = capabilities.read_page()
    assert cells.keys() == {(capabilities.in_words(c.test), c.case) for c in collected}


def test_the_page_is_as_its_generator_writes_it(collected, monkeypatch):
    version, cells = capabilities.read_page()
    outcomes = {c: cells[capabilities.in_words(c.test), c.case] for c in collected}
    monkeypatch.setattr(capabilities, "version", lambda: version)
    written = capabilities.page(outcomes, capabilities.case_names())
    assert written == capabilities.PAGE.read_text(encoding="utf-8")


class Report:
    longrepr = ("path", 1, "Skipped: no reason")

    def __init__(self, test, outcome):
        self.nodeid = f"tests/transforms/{test}"
        self.skipped, self.failed = outcome == "skipped", outcome == "failed"
        self.passed = outcome == "passed"


@pytest.mark.parametrize(
    ("test", "outcome", "says"),
    [
        ("test_grad.py::test_grad[needs]", "passed", None),
        ("test_grad.py::test_grad[needs]", "skipped", "says '✓' of this cell"),
        ("test_grad.py::test_grad[a new rule]", "passed", None),
        ("test_new.py::test_new[needs]", "passed", "says 'nothing' of this cell"),
    ],
)
def test_a_contradiction_is_found(test, outcome, says, monkeypatch):
    version, _ = capabilities.read_page()
    monkeypatch.setattr(capabilities, "version", lambda: version)
    found = capabilities.disagreement(Report(test, outcome))
    assert found is None if says is None else says in found


def test_cells_are_told_from_names_of_tests():
    cases = ("needs", "no fwd", "a rule")
    cell_of = capabilities.cell_of
    assert cell_of("t/test_a.py::test_b[no fwd]", cases) == Cell(
        "test_a", "test_b", "no fwd"
    )
    assert cell_of("t/test_a.py::test_b[x-no fwd]", cases).case == "no fwd"
    assert cell_of("t/test_a.py::test_b[no fwd-x]", cases).case == "no fwd"
    assert cell_of("t/test_a.py::test_b[other]", cases) is None
    assert cell_of("t/test_a.py::test_b", cases) is None


def test_the_worst_outcome_of_a_cell_counts():
    recorder = capabilities.Recorder()
    recorder.found = {
        "t/test_a.py::test_b[needs-1]": PASSED,
        "t/test_a.py::test_b[needs-2]": "no device",
        "t/test_a.py::test_b[needs-3]": PASSED,
    }
    assert recorder.outcomes(("needs",)) == {
        Cell("test_a", "test_b", "needs"): "no device"
    }
    error = Report("x.py::test_it_is_an_error[n]", "passed")
    assert capabilities.outcome_of(error) == ERROR
