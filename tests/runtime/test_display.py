"""What rules, reports, operators and estimates show of themselves."""

from html.parser import HTMLParser

import pytest
import torch

import gradtools as gt

pytestmark = pytest.mark.filterwarnings("ignore:gradtools did not check")


def swish_of(**options):
    @gt.custom_vjp(**options)
    def swish(x, beta):
        return x * torch.sigmoid(beta * x)

    @swish.def_fwd
    def _(x, beta):
        return x * torch.sigmoid(beta * x), (x, beta)

    @swish.def_bwd
    def _(residuals, g):
        x, beta = residuals
        s = torch.sigmoid(beta * x)
        ds = s * (1 - s)
        return g * (s + x * beta * ds), (g * x * x * ds).sum()

    return swish


def place(function):
    return f"({__file__}:{function.__code__.co_firstlineno})"


def table(rule):
    """Return the rows of a repr: the use, where it comes from, what was checked."""
    _, *lines = repr(rule).splitlines()
    cells = [[cell for cell in line.split("  ") if cell.strip()] for line in lines]
    return {cell[0].strip(): tuple(map(str.strip, cell[1:])) for cell in cells}


X = torch.linspace(-1.0, 2.0, 5, dtype=torch.float64)
BETA = torch.tensor(1.5, dtype=torch.float64)


def test_a_rule_shows_what_is_given_derived_and_checked():
    swish = swish_of()
    stated = swish.rule
    assert table(swish) == {
        "function": (f"fun {place(stated.fun)}",),
        "reverse": (f"bwd {place(stated.bwd)}", "not used yet"),
        "forward mode": ("derived: the transpose of bwd", "not used yet"),
        "second order": ("derived: through fwd and bwd", "not used yet"),
        "vmap": ("derived: torch.func.vmap", "not used yet"),
    }
    swish(X.clone().requires_grad_(), BETA)
    assert table(swish)["reverse"][1] == "passed"
    assert table(swish)["forward mode"][1] == "not used yet"
    torch.func.jvp(lambda x: swish(x, BETA), (X,), (X,))
    assert table(swish)["forward mode"][1] == "passed"
    torch.func.hessian(lambda x: swish(x, BETA).sum())(X)
    assert table(swish)["second order"][1] == "passed"
    torch.func.vmap(torch.func.grad(lambda x: swish(x, BETA).sum()))(X.repeat(2, 1))
    assert table(swish)["vmap"][1] == "passed"
    swish(X[:1].clone().requires_grad_(), BETA)  # of length 1: another signature
    assert "passed (2 signatures)" in table(swish)["reverse"][1]


def test_it_shows_what_is_wrong_and_what_went_unchecked():
    swish = swish_of()
    swish.def_bwd(lambda residuals, g: (g, None))
    with pytest.raises(gt.GradientMismatchError):
        swish(X.clone().requires_grad_(), BETA)
    assert table(swish)["reverse"][1] == "failed"
    off = swish_of()
    with gt.gradcheck_policy("off"):
        off(X.clone().requires_grad_(), BETA)
    assert table(off)["reverse"][1] == "not checked"


def test_it_shows_options_and_rules_of_its_own():
    rule = swish_of(
        once_differentiable=True, vmap="sequential", contract=gt.Approximate(rel=0.1)
    )
    rule.def_jvp(len)
    shown = table(rule)
    assert shown["forward mode"][0] == "jvp (builtins.builtin_function_or_method)"
    assert shown["second order"][0] == "refused: once_differentiable"
    assert shown["vmap"][0] == "'sequential'"
    assert shown["contract"] == ("Approximate(rel=0.1, abs=None)",)
    rule.def_vmap(place)
    assert table(rule)["vmap"][0] == f"def_vmap {place(place)}"


def test_a_rule_of_forward_mode_shows_the_converse():
    rule = gt.custom_jvp(torch.sin)
    assert table(rule)["reverse"] == ("not stated", "not used yet")
    rule.defjvp(place)
    assert table(rule)["reverse"][0] == "derived: the transpose of jvp"
    assert table(rule)["forward mode"][0] == f"jvp {place(place)}"
    assert table(rule)["second order"][0] == "derived: through jvp"


class Cells(HTMLParser):
    """Collects the text of each cell; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells.append(data)


def test_notebooks_show_the_same_as_a_table():
    swish = swish_of()
    report = swish.gradcheck(X, BETA)
    cells = Cells(swish._repr_html_()).cells
    assert cells[0] == repr(swish).partition("\n")[0]  # <CustomVJP ...>, as text
    for use, (*source, outcome) in table(swish).items():
        assert {use, *source, outcome} <= set(cells)
    cells = Cells(report._repr_html_()).cells
    for item in report.evidence:
        assert item.question in cells
        assert item.outcome in cells
    assert str(report) == repr(report)
    assert repr(report).startswith("swish (")
    assert "x: (5,) float64" in repr(report)


def test_a_method_shows_its_rule_in_one_line_and_in_a_notebook_the_table():
    class Layer:
        double = gt.custom_vjp(lambda self, x: 2 * x)

        def __repr__(self):
            return "Layer<&>"

    assert repr(Layer().double).endswith(": nothing stated> of Layer<&>>")
    assert "\n" not in repr(Layer().double)
    assert "forward mode" in Cells(Layer().double._repr_html_()).cells


def test_operators_and_estimates_show_their_figures():
    op = gt.hvp_fn(lambda p: (p["w"] ** 2).sum() + p["b"], {"w": X, "b": BETA})
    cells = Cells(op._repr_html_()).cells
    assert cells[0] == "<Hessian of 6 numbers>"
    assert dict(zip(cells[1::2], cells[2::2], strict=True)) == {
        "value": f"{float((X**2).sum() + BETA):.6g}",
        "norm of the gradient": f"{float((4 * (X**2).sum() + 1) ** 0.5):.6g}",
        "tensors": "(5,), ()",
        "dtype": "torch.float64",
        "device": "cpu",
    }
    estimate = gt.hessian_trace(lambda x: (x**2).sum(), X, samples=8)
    assert repr(estimate.value) in Cells(estimate._repr_html_()).cells
