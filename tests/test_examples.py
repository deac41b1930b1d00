"""The demo runs, and shows what it claims."""

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """Return what a script leaves behind and prints; it draws into a folder of ours."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)

    def run(script):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            left = runpy.run_path(str(EXAMPLES / f"{script}.py"))
        return left, printed.getvalue()

    return run


def test_the_digits_are_learned_by_rules_that_were_checked(demo):
    left, printed = demo("digits")
    assert left["accuracy"] > 0.95
    for rule in (left["swish"], left["layer_norm"]):
        assert {report.outcome for report in rule.reports} == {"passed"}
        assert str(rule.reports[0]) in printed


def test_the_network_of_rules_is_that_of_torch(demo):
    left, _ = demo("digits")
    x, y = torch.randn(3, 64), torch.tensor([1, 2, 9])
    inner, scale, shift, beta, outer = left["params"]
    h = F.layer_norm(x @ inner, (64,), scale, shift)
    out = (h * torch.sigmoid(beta * h)) @ outer
    found, expected = (
        torch.autograd.grad(F.cross_entropy(o, y), left["params"])
        for o in (left["network"](x), out)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_inside_the_network_all_is_as_autograd_has_it(demo):
    left, printed = demo("inside_a_network")
    assert left["difference"] < 1e-4
    top = left["top"]
    assert top["the rule"] == pytest.approx(top["autograd"], rel=1e-3)
    assert "off by" in printed
    assert Path("out/inside_a_network.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_figure_and_no_error(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _, printed = demo("inside_a_network")
    assert "matplotlib is not installed" in printed
    assert not Path("out").exists()


def test_a_compiled_step_has_the_gradients_of_the_eager_one(demo):
    left, printed = demo("compiled_step")
    assert left["difference"] < 1e-5
    assert "compiled step" in printed


def test_without_a_compiler_the_step_is_one_graph_all_the_same(demo, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    left, printed = demo("compiled_step")
    assert left["difference"] < 1e-5
    assert "compiled by aot_eager" in printed


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_an_example_is_short_and_can_be_pasted_into_a_notebook(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert "__file__" not in text
    assert "argparse" not in text
    siblings = {other.stem for other in EXAMPLES.glob("*.py")}
    for line in text.splitlines():
        if line.startswith(("import ", "from ")):
            assert line.split()[1].partition(".")[0] not in siblings
