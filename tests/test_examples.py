"""The demo runs, in a small form, and shows what it claims."""

import importlib
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def digits(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("digits")


def test_the_digits_are_learned(digits, tmp_path):
    path = tmp_path / "digits.png"
    found = digits.main(epochs=10, steps=3, repeats=2, path=path)
    assert found["accuracy"] > 0.95
    assert found["difference"] < 1e-12
    by_rule, by_torch = found["eigenvalues"]
    assert by_rule == pytest.approx(by_torch, rel=1e-9)
    assert path.read_bytes().startswith(b"\x89PNG")
    for rule in (digits.swish, digits.layer_norm):
        assert rule.reports
        assert {report.outcome for report in rule.reports} == {"passed"}


def test_without_a_compiler_the_demo_says_so(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    digits.main(epochs=1, steps=1, path=tmp_path / "digits.png")
    assert "not compiled: no C++ compiler" in capsys.readouterr().out


def test_the_loss_by_rules_is_the_loss_by_torch(digits):
    params = digits.initial()
    data = torch.randn(3, 64), torch.tensor([1, 2, 9])
    torch.testing.assert_close(
        torch.func.grad_and_value(digits.loss)(params, *data),
        torch.func.grad_and_value(digits.loss_by_torch)(params, *data),
    )
