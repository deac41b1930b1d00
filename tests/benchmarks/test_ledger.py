"""Runs keep what was measured, and the page shows the last and the spread of all."""

import pytest

from tests.benchmarks import ledger, page
from tests.benchmarks.ledger import Curve, Part, Row
from tests.benchmarks.rivals.contest import COMBINED, GRADTOOLS
from tests.benchmarks.timing import Figure

WORK = "forward + backward, tiny"


def ratio(value, bar=1.05, width=0.01, rule=ledger.MEAN):
    figure = Figure(value, value - width, value + width)
    return ledger.row("speed", WORK, rule, GRADTOOLS, COMBINED, "ratio", figure, bar)


def counted(unit, value, bar):
    return ledger.exact("memory", "kept", "exp", GRADTOOLS, COMBINED, unit, value, bar)


def test_what_is_stored_comes_back(tmp_path):
    part = Part([ratio(1.0)], [Curve("size", GRADTOOLS, [1, 10], [1.0, 1.1])])
    first = ledger.store("cpu", [part], tmp_path)
    second = ledger.store("cpu", [part, Part([ratio(2.0, rule="exp")])], tmp_path)
    assert [first.number, second.number] == [1, 2]
    assert ledger.load(tmp_path) == [first, second]


def test_the_last_run_is_shown_with_the_spread_of_all(tmp_path):
    ledger.store("cpu", [Part([ratio(1.1), ratio(0.9, rule="exp")])], tmp_path)
    ledger.store("cpu", [Part([ratio(1.2)])], tmp_path)
    ledger.store("cpu", [Part([ratio(1.0)])], tmp_path)
    runs = ledger.load(tmp_path)
    mean, exp = ledger.histories(runs)
    assert (mean.row.value, mean.spread) == (1.0, (1.0, 1.2))
    assert (exp.row.value, exp.spread) == (0.9, (0.9, 0.9))
    text = page.write(runs, {})
    assert "| 1.00 [0.99, 1.01] | 1.00 to 1.20 in 3 | 1.05 | met |" in text
    assert "Nothing." in text


@pytest.mark.parametrize(
    ("row", "is_met"),
    [
        (ratio(1.05), True),  # its interval ends within the allowance
        (ratio(1.05, width=0.03), False),
        (ratio(1.2), False),
        (ratio(9.0, bar=None), True),
        (counted("ratio", 1.0, 1.0), True),
        (counted("ratio", 1.001, 1.0), False),  # what is counted has no allowance
        (counted("bytes", 4, 0), False),
    ],
)
def test_bars(row, is_met):
    assert row.is_met == is_met


def test_a_miss_is_listed_with_its_reason(tmp_path, monkeypatch):
    ledger.store("cpu", [Part([ratio(1.5)])], tmp_path)
    runs = ledger.load(tmp_path)
    assert "no reason recorded" in page.write(runs, {})
    key = "speed", WORK, ledger.MEAN, COMBINED
    monkeypatch.setitem(page.REASONS, key, "It rained.")
    text = page.write(runs, {})
    assert "It rained." in text
    assert "no reason recorded" not in text


def test_a_row_is_what_json_can_hold():
    assert Row(**vars(ratio(1.0))) == ratio(1.0)
