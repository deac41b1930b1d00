"""``gradient="finite-differences"``: a derivative for a kernel that has none."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients, twice_backward

X = torch.tensor([0.5, -1.25, 2.0], dtype=torch.float64)


def differenced(function, out=lambda x, *rest: torch.empty_like(x), **options):
    return gt.external(
        function, out=out, gradient="finite-differences", numpy=True, **options
    )


def product(x, w):
    return np.sin(x) * w.sum()


def native(x, w):
    return x.sin() * w.sum()


W = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
TOLERANCES = {torch.float64: 1e-8, torch.float32: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gradients_and_tangents(dtype):
    rule, tolerance = differenced(product), TOLERANCES[dtype]
    x, w = X.to(dtype), W.to(dtype)
    close = {"rtol": tolerance, "atol": tolerance}
    loss = lambda f: torch.func.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1))
    assert_close(loss(rule)(x, w), loss(native)(x, w), **close)
    moved = [torch.func.jvp(f, (x, w), (2 * x, -w))[1] for f in (rule, native)]
    assert_close(*moved, **close)
    jacobians = [torch.func.jacfwd(f)(x, w) for f in (rule, native)]
    assert_close(*jacobians, **close)
    rows = torch.stack([x, 2 * x])
    batches = [torch.func.vmap(loss(f), (0, None))(rows, w) for f in (rule, native)]
    assert_close(*batches, **close)


def test_the_contract_is_approximate_and_the_error_is_in_the_report():
    rule = differenced(product)
    rule(X.clone().requires_grad_(), W)
    (report,) = rule.reports
    assert report.contract.startswith("Approximate")
    (error,) = [e.error for e in report.evidence if e.question == "error in x"]
    assert error < 1e-8


def test_the_cost_is_two_runs_for_every_number_that_needs_a_gradient():
    calls = []

    def counted(x, w):
        calls.append(1)
        return product(x, w)

    rule = differenced(counted)
    with gt.gradcheck_policy("off"):
        x = X.clone().requires_grad_()
        out = rule(x, W)
        calls.clear()
        out.sum().backward()
        assert len(calls) == 2 * 3  # none for w
        for _ in range(2):  # what holds for the rule is found out the first time
            calls.clear()
            torch.func.jvp(lambda x: rule(x, W), (X,), (X,))
        assert len(calls) == 2 + 2  # fun, and the value beside the tangent


def test_large_and_small_numbers_have_steps_of_their_own():
    x = torch.tensor([1e6, 1.0, 0.0], dtype=torch.float64)
    rule = differenced(lambda x: x**2)
    x.requires_grad_()
    with gt.gradcheck_policy("off"):
        (found,) = gradients(rule(x), x)
    assert_close(found, 2 * x.detach(), rtol=1e-6, atol=1e-2)


def test_complex_arguments():
    z = torch.complex(X, X.flip(0))
    rule = differenced(lambda z: np.exp(1j * z) * z.conj())
    native = lambda z: torch.exp(1j * z) * z.conj()
    loss = lambda f: torch.func.grad(lambda z: (f(z) * (1 + 2j)).real.sum())
    assert_close(loss(rule)(z), loss(native)(z), rtol=1e-7, atol=1e-7)


def test_integer_outputs_and_pytrees():
    rule = differenced(
        lambda p, n: {"y": n * p["x"] ** 2, "i": np.argsort(p["x"])},
        out=lambda p, n: {"y": p["x"], "i": p["x"].long()},
    )
    found = torch.func.grad(lambda x: rule({"x": x}, 3)["y"].sum())(X)
    assert_close(found, 6 * X, rtol=1e-8, atol=1e-8)


def test_a_second_derivative_is_refused():
    rule = differenced(lambda x: x**2)
    with pytest.raises(gt.TransformError, match="once_differentiable"):
        twice_backward(rule, X)


@pytest.mark.parametrize("mode", ["expand_dims", "broadcast_all"])
def test_batches_at_once(mode):
    rule = differenced(lambda x: x**3, vmap=mode)
    loss = lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))
    rows = torch.stack([X, 2 * X])
    assert_close(loss(rule)(rows), 3 * rows**2, rtol=1e-7, atol=1e-7)


def test_compiled():
    rule = differenced(product)
    step = torch.compile(
        torch.func.grad(lambda x, w: rule(x, w).sum(), (0, 1)),
        fullgraph=True,
        backend="aot_eager",
    )
    right = torch.func.grad(lambda x, w: native(x, w).sum(), (0, 1))(X, W)
    assert_close(step(X, W), right, rtol=1e-8, atol=1e-8)
