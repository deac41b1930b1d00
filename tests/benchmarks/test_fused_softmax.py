"""The kernels, the rule and the Function are torch.softmax and its derivative.

On CUDA they run as they are. Elsewhere Triton interprets them, which it has to know
before it is imported: all of this is run once more, in a process of its own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

HAS_CUDA = torch.cuda.is_available()
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if HAS_CUDA else "cpu"
SHAPES = [(5, 8), (3, 1), (4, 37), (2, 3, 130), (7,), (0, 5)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def fused():
    if not HAS_CUDA and not IS_INTERPRETED:
        pytest.skip("no CUDA device: runs in a process of its own, interpreted")
    from tests.benchmarks import fused_softmax

    return fused_softmax


def normal(*shape):
    return torch.randn(shape, dtype=torch.float32, device=DEVICE)


def value_and_gradient(function, x, g):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), *torch.autograd.grad(y, x, g)


@pytest.mark.skipif(HAS_CUDA or IS_INTERPRETED, reason="there is no need")
def test_all_of_these_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@shapes
def test_kernels(fused, shape):
    x, g = normal(*shape), normal(*shape)
    y, gradient = value_and_gradient(fused.composite, x, g)
    torch.testing.assert_close(fused.softmax_of_rows(x), y)
    torch.testing.assert_close(fused.gradient_of_rows(y, g), gradient)


@shapes
@pytest.mark.parametrize("name", ["softmax", "Combined"])
def test_rule_and_function(fused, name, shape):
    spelling = fused.softmax if name == "softmax" else fused.Combined.apply
    x, g = normal(*shape), normal(*shape)
    for _ in range(4):  # the rule gets code of its own on the way
        found = value_and_gradient(spelling, x, g)
        torch.testing.assert_close(found, value_and_gradient(fused.composite, x, g))
        assert all(each.dtype == torch.float32 for each in found)


def test_large_numbers_do_not_overflow(fused):
    x, g = 1e4 * normal(4, 9), normal(4, 9)
    x[1, 2] = -torch.inf
    found = value_and_gradient(fused.softmax, x, g)
    torch.testing.assert_close(found, value_and_gradient(fused.composite, x, g))
    assert all(each.isfinite().all() for each in found)


def test_memory_in_another_order(fused):
    x, g = normal(6, 4).mT, normal(1, 6).expand(4, 6)
    expected = value_and_gradient(fused.composite, x, g)
    for spelling in (fused.softmax, fused.Combined.apply):
        torch.testing.assert_close(value_and_gradient(spelling, x, g), expected)


def test_the_rule_is_checked(fused):
    x = normal(3, 6)
    value_and_gradient(fused.softmax, x, torch.ones_like(x))
    assert "passed" in {report.outcome for report in fused.softmax.reports}


@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_is_one_launch(fused, dim, monkeypatch):
    x, g = normal(3, 4, 5), normal(3, 4, 5)
    expected = value_and_gradient(fused.composite, x, g)
    launches = []

    def counting(kernel, *tensors):
        launches.append(kernel)
        return launched(kernel, *tensors)

    def one(x, g):
        y, pull = torch.func.vjp(fused.softmax, x)
        return y, *pull(g)

    mapped = torch.func.vmap(one, dim, out_dims=dim)
    mapped(x, g)  # checked
    launched = fused.launched
    monkeypatch.setattr(fused, "launched", counting)
    torch.testing.assert_close(mapped(x, g), expected)
    assert launches == [fused.forward_kernel, fused.backward_kernel]


def test_second_derivatives_are_refused(fused):
    x = normal(2, 3).requires_grad_()
    for spelling in (fused.softmax, fused.Combined.apply):
        (gradient,) = torch.autograd.grad(
            spelling(x), x, normal(2, 3).requires_grad_(), create_graph=True
        )
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_section_of_the_benchmark(fused):
    from tests.benchmarks import ledger, page
    from tests.benchmarks.speed import Effort

    part = fused.measure(Effort(DEVICE, rounds=2), rows=2, columns=(3, 4))
    run = ledger.Run("2026-01-01", 1, DEVICE, {"cpu": ""}, part.rows, part.curves)
    table = page.triton(ledger.histories([run]))
    assert table.startswith("## Triton\n")
    assert table.count("\n| 2 x ") == 2
