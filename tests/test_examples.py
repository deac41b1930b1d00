"""The demo runs, in a small form, and shows what it claims."""

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_digits_are_learned(tmp_path):
    digits = load("digits")
    path = tmp_path / "digits.png"
    found = digits.main(epochs=10, samples=10, steps=3, repeats=2, path=path)
    assert found["accuracy"] > 0.95
    assert found["difference"] < 1e-12
    by_rule, by_torch = found["eigenvalues"]
    assert by_rule == pytest.approx(by_torch, rel=1e-9)
    assert path.read_bytes().startswith(b"\x89PNG")
    for rule in (digits.swish, digits.layer_norm):
        assert {report.outcome for report in rule.reports} == {"passed"}


def test_the_rules_of_the_demo_are_those_of_torch():
    digits = load("digits")
    x, w, b = torch.randn(3, 64), torch.randn(64), torch.randn(64)
    torch.testing.assert_close(
        torch.func.grad(lambda *args: digits.layer_norm(*args).sin().sum(), (0, 1, 2))(
            x, w, b
        ),
        torch.func.grad(
            lambda x, w, b: torch.nn.functional.layer_norm(x, (64,), w, b).sin().sum(),
            (0, 1, 2),
        )(x, w, b),
    )
