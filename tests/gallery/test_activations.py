"""Five activations in one module."""

import runpy

import pytest
import torch
import torch.nn.functional as F

import gradtools as gt
from gradtools.__main__ import main
from tests.gallery.conftest import EXAMPLES

NAMES = ("swish", "mish", "gelu", "elu", "selu")
OF_TORCH = {
    "mish": F.mish,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "elu": F.elu,
    "selu": F.selu,
}


@pytest.fixture
def names(gallery):
    return gallery("activations")


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_value_and_derivatives_are_torchs(names, name, order):
    x = torch.linspace(-5, 5, 41, dtype=torch.float64) + 0.01
    found, expected = names[name], OF_TORCH[name]
    for _ in range(order):
        found, expected = torch.func.grad(found), torch.func.grad(expected)
    found, expected = (torch.func.vmap(f)(x) for f in (found, expected))
    torch.testing.assert_close(found, expected)


def test_swish_with_beta_one_is_torchs_silu(names):
    x = torch.randn(20)
    found = torch.func.grad(lambda x: names["swish"](x, torch.tensor(1.0)).sum())(x)
    torch.testing.assert_close(found, torch.func.grad(lambda x: F.silu(x).sum())(x))


def test_the_command_line_prints_a_row_for_each_and_finds_all_right(capsys):
    assert main(["check", str(EXAMPLES / "activations.py")]) == 0
    table = capsys.readouterr().out
    for name in NAMES:
        assert name in table
    assert "failed" not in table


def changed(tmp_path, stem, *wrong):
    """Write the module with mistakes in it."""
    text = (EXAMPLES / "activations.py").read_text()
    for name in wrong:
        assert text.count(MISTAKES[name][0]) == 1
        text = text.replace(*MISTAKES[name])
    path = tmp_path / f"{stem}.py"
    path.write_text(text)
    return str(path)


MISTAKES = {
    "mish": ("x * torch.sigmoid(x) * (1 - t * t)", "torch.sigmoid(x) * (1 - t * t)"),
    "gelu": ("1 + 3 * CUBIC * x**2", "1 + CUBIC * x**2"),
    "selu": ("1.0, ALPHA * torch.exp", "1.0, torch.exp"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_one_names_itself_and_leaves_the_others_alone(tmp_path, capsys, name):
    assert main(["check", changed(tmp_path, f"wrong_{name}", name)]) == 1
    out = capsys.readouterr().out
    rows = {
        row: line for line in out.splitlines() for row in NAMES if f".{row} " in line
    }
    assert f"{name}: what bwd returns for args.x is not the derivative" in out
    for other in set(NAMES) - {name}:
        assert f"\n{other}: what bwd" not in out
        assert "passed" in rows[other]


def test_two_wrong_ones_do_not_hide_each_other(tmp_path, capsys):
    path = changed(tmp_path, "two_wrong", "mish", "gelu")
    assert main(["check", path]) == 1
    out = capsys.readouterr().out
    for name in ("mish", "gelu"):
        assert f"\n{name}: what bwd returns for args.x is not the derivative" in out


def test_the_module_itself_says_which_is_wrong_and_goes_on(tmp_path, capsys):
    runpy.run_path(changed(tmp_path, "goes_on", "mish", "gelu"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    for name, line in zip(NAMES, lines, strict=True):
        wrong = name in {"mish", "gelu"}
        assert line.startswith(f"{name}: what bwd" if wrong else f"{name} (")


def test_each_is_checked_at_its_own_first_call_and_the_others_go_on_working(names):
    wrong = gt.custom_vjp(names["elu"].rule.fun)
    wrong.def_bwd(lambda residuals, g: g * torch.exp(residuals[0][0]))  # of elu, x < 0
    x = torch.linspace(-2, 2, 8).requires_grad_()
    with pytest.raises(gt.GradientMismatchError, match=r"elu.*wrong only where x > 0"):
        wrong(x)
    for name in ("mish", "gelu", "selu"):
        names[name](x).sum().backward()
    with pytest.raises(gt.GradientMismatchError, match="elu"):  # and again
        wrong(x)
