"""A rule under make_fx, with and without symbolic shapes; first met there, or known."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import gradtools as gt


def marked():
    @gt.custom_vjp(contract=gt.Surrogate())
    def f(x):
        return torch.sin(x)

    @f.def_fwd
    def _(x):
        return torch.sin(x), (torch.cos(x),)

    @f.def_bwd
    def _(residuals, g):
        return 10 * g * residuals[0]

    return f


def known():
    f = marked()
    for _ in range(4):  # until there is code for such calls
        f(torch.ones(3, requires_grad=True)).sum().backward()
    return f


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("rule", [marked, known])
def test_a_first_derivative(rule, mode):
    f = rule()

    def gradient(x):
        return torch.autograd.grad(f(x).sum(), x)[0]

    traced = make_fx(gradient, tracing_mode=mode)(torch.ones(3, requires_grad=True))
    x = torch.linspace(0, 1, 5 if mode == "symbolic" else 3).requires_grad_()
    assert_close(traced(x), 10 * torch.cos(x))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("rule", [marked, known])
def test_a_second_derivative(rule, mode):
    f = rule()

    def second(x):
        (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    arg = torch.linspace(0, 1, 3).requires_grad_()
    traced = make_fx(second, tracing_mode=mode)(arg)
    assert_close(traced(arg), -10 * torch.sin(arg))
    assert_close(second(arg), -10 * torch.sin(arg))  # nothing wrong was learned


def test_a_rule_first_met_under_the_vmap_of_autograd_functional():
    @gt.custom_vjp
    def f(x):
        return torch.sin(x)

    f.def_bwd(lambda residuals, g: g * torch.cos(residuals[0][0]))
    x = torch.linspace(0, 1, 3)
    found = torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    )
    assert_close(found, torch.cos(x).diag())
    assert f.reports[0].outcome == "passed", f.reports
