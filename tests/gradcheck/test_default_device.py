"""A default device that is not the arguments' own: ``meta`` stands for an accelerator.

What gradtools draws or counts must name its device, or it would land there.
"""

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from gradtools import testing

pytestmark = pytest.mark.on_cpu


@pytest.fixture(autouse=True)
def _elsewhere():
    with torch.device("meta"):
        yield


def numbers(*shape, dtype=torch.float64):
    return torch.linspace(
        0.2, 1.4, torch.Size(shape).numel(), dtype=dtype, device="cpu"
    ).reshape(shape)


def stated():
    @gt.custom_vjp
    def rule(x, y):
        return x.sin() * y

    @rule.def_bwd
    def _(residuals, g):
        (x, y), _ = residuals
        return g * x.cos() * y, g * x.sin()

    return rule


def opaque():
    @gt.custom_vjp(vmap="sequential")
    def rule(x):
        return torch.from_numpy(x.detach().numpy() ** 3)

    @rule.def_bwd
    def _(residuals, g):
        ((x,), _) = residuals
        return 3 * x**2 * g

    return rule


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.complex128])
def test_the_check_of_a_first_call(dtype):
    rule = stated()
    x = numbers(3, 2).to(dtype).requires_grad_()
    y = numbers(3, 2).to(dtype).requires_grad_()
    rule(x, y).abs().sum().backward()
    (report,) = rule.reports
    assert report.outcome == "passed"


def test_the_check_of_more_than_is_sampled():
    x = numbers(40_000).requires_grad_()
    rule = opaque()
    rule(x).sum().backward()
    assert rule.reports[0].outcome == "passed"
    assert_close(x.grad, 3 * x.detach() ** 2)


def test_a_failure_is_diagnosed():
    @gt.custom_vjp
    def wrong(x):
        return x**3

    @wrong.def_bwd
    def _(residuals, g):
        return 2 * residuals[0][0] ** 2 * g

    with pytest.raises(gt.GradientMismatchError, match=r"0\.6667 times"):
        wrong(numbers(3).requires_grad_())


def test_checks_of_what_is_derived():
    rule, x, y = stated(), numbers(3), numbers(3)
    testing.check_grads(rule, (x, y))
    testing.check_transforms(rule, (x, y))
    found = torch.func.jvp(rule, (x, y), (y, x))[1]
    assert_close(found, x.cos() * y * y + x.sin() * x)
    gradient = torch.func.grad(lambda x, y: rule(x, y).sum())
    assert_close(torch.func.vmap(gradient)(x, y), x.cos() * y)
    second = torch.func.grad(lambda x: gradient(x, y).sum())
    assert_close(second(x), -x.sin() * y)


def test_the_check_in_a_trace():
    rule, x, y = stated(), numbers(3), numbers(3)
    gradient = torch.func.grad(lambda x, y: rule(x, y).sum())
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, y), x.cos() * y)


def test_second_order():
    f, x = (lambda x: (x**4).sum()), numbers(40)
    assert gt.check_second_order(f, x).outcome == "passed"
    assert_close(gt.hvp(f, (x,), (x,))[0], 12 * x**3)
    exact = 12 * x**2
    assert_close(gt.hessian_diag(f, x).value, exact)
    assert_close(gt.hessian_diag(f, x, method="hutchinson").value, exact)
    for method in ("exact", "hutchinson", "hutch++", "xtrace"):
        found = gt.hessian_trace(f, x, method=method, samples=20).value
        assert_close(found, exact.sum(), rtol=0.3, atol=0)
    for method in ("lanczos", "lobpcg"):
        found = gt.hessian_eigs(f, x, k=1, method=method).values
        assert_close(found, exact.max()[None], rtol=1e-5, atol=0)
    solution, info = gt.cg(lambda v: exact * v, exact, rtol=1e-10)
    assert info.converged
    assert_close(solution, torch.ones_like(x), rtol=1e-5, atol=0)
