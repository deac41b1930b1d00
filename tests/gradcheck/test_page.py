"""The page of reports: complete, safe, and drawn for every kind of argument."""

import re
import sys
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from gradtools.errors import GradientMismatchError, Violation
from gradtools.gradcheck.page import page
from gradtools.gradcheck.report import Evidence, Figures, Report

STEPS = np.logspace(-10, -1, 10)


def figures(
    analytic, reference=None, *, shape=None, places=None, steps=STEPS, errors=None
):
    """Figures of an argument; right ones where no reference is given."""
    analytic = np.asarray(analytic)
    return Figures(
        where="args.x",
        shape=analytic.shape if shape is None else shape,
        places=np.arange(analytic.size) if places is None else places,
        analytic=analytic.ravel(),
        reference=(analytic if reference is None else np.asarray(reference)).ravel(),
        source="autograd",
        steps=steps,
        errors=steps**2 + 1e-16 / steps if errors is None else errors,
    )


def report(outcome="passed", rule="cube (rules.py:3)", **parts):
    evidence = Evidence("derivative in x", outcome, "to 3e-16", 3e-16)
    return Report(rule, "x: (3,) float64", (evidence,), **parts)


def drawn(shown):
    """The pictures of figures: three, each of them well-formed."""
    text = page([report(figures=(shown,))])
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        ET.fromstring(picture)
    return text


def test_a_page_says_what_a_report_says():
    failure = GradientMismatchError(
        "cube: what bwd returns for args.x is not the derivative",
        rule="cube (rules.py:3)",
        violations=[Violation("args.x", "3.0", "2.0")],
        fix="Look at bwd.",
    )
    text = page(
        [
            report(contract="Approximate(rel=0.01)", seconds=0.0123, evaluations=31),
            report("failed", failure=failure),
            report("not checked", rule="square (rules.py:9)"),
        ]
    )
    assert "3 reports of 2 rules" in text
    assert ">1 failed<" in text
    assert ">1 not checked<" in text
    assert ">1 passed<" in text
    for part in ("cube", "rules.py:3", "x: (3,) float64", "Approximate(rel=0.01)"):
        assert part in text
    assert "12.3 ms, 31 evaluations" in text
    assert "derivative in x" in text
    assert "3.0e-16" in text
    assert f"<pre>{failure}</pre>" in text


def test_a_page_needs_nothing_else():
    text = drawn(figures([1.0, 2.0]))
    assert "<script" not in text
    assert "<link" not in text
    assert "prefers-color-scheme: dark" in text
    assert re.findall(r'(?:src|href)="(?!#|data:)', text) == []
    names = re.findall(r'\bid="([^"]*)"', text)
    assert len(names) == len(set(names))


def test_what_users_wrote_is_text():
    bad = "<b>&"
    evidence = Evidence(bad, "failed", bad)
    one = np.ones(1)
    shown = Figures(bad, (1,), np.arange(1), one, one, bad, STEPS, STEPS)
    failure = GradientMismatchError(bad)
    text = page([Report(bad, bad, (evidence,), bad, failure=failure, figures=(shown,))])
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;" in text


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (1, 1), (3, 4), (2, 3, 4), (2, 1, 3, 2), (700, 3)]
)
def test_arguments_of_any_shape_are_drawn(shape):
    values = np.random.default_rng(0).normal(size=shape)
    drawn(figures(values, values + 1e-9))


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(figures(np.zeros((0, 3))), id="no elements"),
        pytest.param(figures(np.zeros(0), steps=np.zeros(0)), id="nothing at all"),
        pytest.param(figures(np.zeros(4)), id="zero"),
        pytest.param(figures(np.full(4, 2.5)), id="constant"),
        pytest.param(figures(np.ones(4), np.zeros(4)), id="zero reference"),
        pytest.param(figures([np.nan, 1.0], [1.0, 1.0]), id="one nan"),
        pytest.param(figures([np.nan, np.inf]), id="nothing finite"),
        pytest.param(figures([1e300, -1e300], [-1e300, 1e300]), id="huge"),
        pytest.param(figures([1e-320, 0.0], [0.0, 0.0]), id="denormal"),
        pytest.param(figures([1 + 2j, 3j], [1 + 2j, 2j]), id="complex"),
        pytest.param(figures([1, 2], [1, 3]), id="integers"),
        pytest.param(figures([1.0], errors=np.full(10, np.nan)), id="nan errors"),
        pytest.param(figures([1.0], errors=np.zeros(10)), id="zero errors"),
        pytest.param(figures([1.0], errors=np.full(10, 2.0)), id="flat errors"),
        pytest.param(figures([1.0], steps=np.array([0.1])), id="one step"),
    ],
)
def test_strange_derivatives_are_drawn(shown):
    drawn(shown)


def test_a_sample_of_a_large_argument_is_drawn():
    values = np.ones(5)
    places = np.array([0, 10, 77_777, 500_000, 999_999])
    wrong = np.array([1.0, 1.0, 1.5, 1.0, np.nan])
    shown = figures(wrong[:4], values[:4], shape=(1000, 1000), places=places[:4])
    assert "worst 5.0e-01 at [77, 777]" in drawn(shown)
    drawn(figures(values, shape=(1000, 1000), places=places))
    drawn(figures(values * np.nan, shape=(1000, 1000), places=places))
    shown = figures(wrong, values, shape=(1000, 1000), places=places)
    assert "worst not finite at [999, 999]" in drawn(shown)


def test_the_worst_element_is_named():
    right = np.arange(12.0).reshape(3, 4)
    wrong = right.copy()
    wrong[1, 2] += 1.1
    text = drawn(figures(wrong, right))
    assert "shape (3, 4), worst 1.0e-01 at [1, 2]" in text


def test_a_page_without_pictures_needs_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "cube" in page([report()])
    with pytest.raises(ImportError, match=r"pip install 'gradtools\[report\]'"):
        page([report(figures=(figures([1.0]),))])
