"""Where nobody wants a derivative, the function itself runs, and fwd does not."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close

from tests.rules.stating import gradients, leaf, stated

pytestmark = pytest.mark.usefixtures("unchecked")

X = torch.tensor([0.5, -1.2], dtype=torch.float64)


@pytest.fixture
def calls():
    return []


@pytest.fixture
def rule(calls):
    """A rule of the sine that notes which of its functions ran."""

    def fwd(x, *rest):
        calls.append("fwd")
        return x.sin(), x

    def bwd(x, g):
        calls.append("bwd")
        return {"x": 10 * g * x.cos()}

    return stated(lambda x, *rest: calls.append("fun") or x.sin(), fwd, bwd)


def a_constant(rule):
    return rule(X)


def a_constant_beside_integers(rule):
    return rule(X, torch.arange(2), 3, "text")


@torch.no_grad()
def no_grad(rule):
    return rule(X.clone().requires_grad_())


def inference_mode(rule):
    with torch.inference_mode():
        return rule(X.clone())


def vmap(rule):
    return torch.func.vmap(rule)(X)


def vmap_under_no_grad(rule):
    with torch.no_grad():
        return torch.func.vmap(rule)(X.clone().requires_grad_())


def no_grad_inside_grad(rule):
    """no_grad stops every level, so that the rule is a constant there."""

    def loss(x):
        with torch.no_grad():
            y = rule(x)
        return (x * y).sum(), y

    gradient, y = torch.func.grad(loss, has_aux=True)(X)
    assert_close(gradient, X.sin())
    return y


def grad_in_something_else(rule):
    _, out = torch.func.grad(lambda w: (2 * w, rule(X)), has_aux=True)(X[0])
    return out


@pytest.mark.parametrize(
    "use",
    [
        a_constant,
        a_constant_beside_integers,
        no_grad,
        inference_mode,
        vmap,
        vmap_under_no_grad,
        no_grad_inside_grad,
        grad_in_something_else,
    ],
)
def test_the_function_itself_runs(rule, calls, use):
    out = use(rule)
    assert_close(out.clone(), X.sin())
    assert not out.requires_grad
    assert calls == ["fun"]


def test_a_rule_inside_fwd_and_bwd_of_another_runs_its_function(rule, calls):
    outer = stated(rule, lambda x: (rule(x), x), lambda x, g: g * rule(x))
    x = X.clone().requires_grad_()
    assert_close(gradients(outer(x), x), (X.sin(),))
    assert calls == ["fun", "fun"]


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_tangents_flow_under_no_grad_too(rule, calls, grad_enabled):
    with torch.set_grad_enabled(grad_enabled), forward_ad.dual_level():
        out = forward_ad.unpack_dual(rule(forward_ad.make_dual(X, X)))
    assert_close(out.tangent, 10 * X * X.cos())
    assert "fun" not in calls
    with torch.set_grad_enabled(grad_enabled):
        _, tangent = torch.func.jvp(rule, (X,), (X,))
    assert_close(tangent, 10 * X * X.cos())


def test_a_transform_inside_no_grad_is_a_derivative_that_is_wanted(rule, calls):
    with torch.no_grad():
        gradient = torch.func.grad(lambda x: rule(x).sum())(X)
    assert_close(gradient, 10 * X.cos())
    assert "fun" not in calls


def test_an_unused_gradient_costs_fwd_and_no_bwd(rule, calls):
    out = rule(leaf(0.5, -1.2))
    assert out.requires_grad
    assert calls == ["fwd"]
    assert out.grad_fn.name().startswith("<lambda>")


def test_an_output_of_the_function_that_is_the_argument_stays_it(calls):
    rule = stated(lambda x: x, bwd=lambda r, g: g)
    assert rule(X) is X
    with torch.no_grad():
        assert rule(X) is X
    assert_close(torch.func.vmap(rule)(X), X)
