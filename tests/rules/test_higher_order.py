"""The rule applies again to the output; residuals are differentiated through fwd."""

import itertools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import derivative, gradients, leaf, stated, twice_backward

pytestmark = pytest.mark.usefixtures("unchecked")

X = torch.tensor([0.5, -1.2], dtype=torch.float64)


def forward_derivative(function):
    return lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


def orders(function, ways):
    """Differentiate a function once for each way, the first of them innermost."""
    for way in ways:
        function = {"r": derivative, "f": forward_derivative}[way](function)
    return function


def orders_by_backward(function, count, x):
    x = x.detach().requires_grad_()
    value = function(x)
    for _ in range(count):
        (value,) = gradients(value, x, create_graph=True)
    return value.detach()


ways = pytest.mark.parametrize(
    "way",
    ["".join(w) for n in (1, 2, 3) for w in itertools.product("rf", repeat=n)],
)


# y' = 10 y (1 - y) with the output as residual: each order multiplies by ten.


def logistic(saved):
    def fwd(x):
        y = torch.sigmoid(x)
        return y, saved(y)

    return fwd


by_output = stated(
    torch.sigmoid, logistic(lambda y: y), lambda y, g: 10 * g * y * (1 - y)
)


def chain(order):
    """Return d^n y / dx^n as a function of y, where y' = 10 y (1 - y)."""
    if order == 0:
        return lambda y: y
    return lambda y: derivative(chain(order - 1))(y) * 10 * y * (1 - y)


@ways
def test_an_output_that_is_a_residual_gets_the_rule_again(way):
    expected = chain(len(way))(torch.sigmoid(X))
    assert_close(orders(by_output, way)(X), expected)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_likewise_by_backward(order):
    expected = chain(order)(torch.sigmoid(X))
    assert_close(orders_by_backward(by_output, order, X), expected)


# The same slope computed in fwd: torch differentiates fwd, and ten stays ten.

by_residual = stated(
    torch.sigmoid, logistic(lambda y: y * (1 - y)), lambda slope, g: 10 * g * slope
)
by_input = stated(
    torch.sigmoid,
    lambda x: (torch.sigmoid(x), x),
    lambda x, g: 10 * g * torch.sigmoid(x) * torch.sigmoid(-x),
)
by_default = stated(
    torch.sigmoid,
    bwd=lambda r, g: 10 * g * torch.sigmoid(r[0][0]) * torch.sigmoid(-r[0][0]),
)


@ways
@pytest.mark.parametrize("rule", [by_residual, by_input, by_default])
def test_other_residuals_are_differentiated_as_they_were_computed(rule, way):
    expected = 10 * orders(torch.sigmoid, "r" * len(way))(X)
    assert_close(orders(rule, way)(X), expected)
    assert_close(orders_by_backward(rule, len(way), X), expected)


@ways
def test_a_chain_of_rules(way):
    def reference(x):
        inner = torch.sin(x)
        return torch.sin(10 * inner - 9 * inner.detach()) * 10 - 9 * torch.sin(inner)

    sine = stated(torch.sin, lambda x: (x.sin(), x), lambda x, g: g * x.cos())
    expected = orders(lambda x: torch.sin(torch.sin(x)), "r" * len(way))(X)
    assert_close(orders(lambda x: sine(sine(x)), way)(X), expected)


def test_the_way_of_an_argument_through_a_residual_alone_counts():
    """bwd returns nothing for w; d2y/dx dw exists all the same."""
    rule = stated(
        lambda x, w: x * w.exp(),
        lambda x, w: (x * w.exp(), w.exp()),
        lambda e, g: (10 * g * e, None),
    )
    x, w = leaf(2.0), leaf(0.3)
    (first,) = gradients(rule(x, w), x, create_graph=True)
    assert_close(gradients(first, w), (10 * w.detach().exp(),))
    mixed = torch.func.grad(
        lambda w: torch.func.grad(lambda x: rule(x, w).sum())(x).sum()
    )
    assert_close(mixed(w.detach()), 10 * w.detach().exp())


def test_cotangents_are_differentiated_through_bwd():
    rule = stated(torch.sin, lambda x: (x.sin(), x), lambda x, g: 10 * g * x.cos())
    x, g = X.clone().requires_grad_(), leaf(2.0, 3.0)
    (first,) = torch.autograd.grad(rule(x), x, g, create_graph=True)
    assert_close(gradients(first, g), (10 * X.cos(),))


def test_a_rule_whose_bwd_is_a_rule_has_its_derivative():
    cosine = stated(torch.cos, lambda x: (x.cos(), x), lambda x, g: -7 * g * x.sin())
    rule = stated(torch.sin, lambda x: (x.sin(), x), lambda x, g: 10 * g * cosine(x))
    expected = -70 * X.sin()
    assert_close(twice_backward(rule, X), expected)
    for way in ("rr", "rf", "fr", "ff"):
        assert_close(orders(rule, way)(X), expected)


# What fwd keeps for it.


def test_an_input_that_bwd_does_not_read_may_change_after_the_call():
    rule = stated(torch.exp, lambda x: ((y := x.exp()) * 1, y * 1), lambda y, g: g * y)
    leaf_x = X.clone().requires_grad_()
    x = leaf_x * 1
    out = rule(x)
    x.mul_(2)
    assert_close(gradients(out, leaf_x, retain_graph=True), (X.exp(),))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(out, leaf_x, create_graph=True)


@pytest.mark.parametrize("second", [twice_backward, lambda f, x: orders(f, "rr")(x)])
def test_fwd_runs_again_with_the_same_random_numbers(second):
    masks = []

    def fwd(x):
        masks.append(torch.rand_like(x).round())
        return x**3 * masks[-1], 3 * x**2 * masks[-1]

    rule = stated(lambda x: fwd(x)[0], fwd, lambda slope, g: g * slope)
    x = torch.linspace(1, 2, 20)
    torch.manual_seed(3)
    actual = second(rule, x)
    expected = 6 * x * masks[0]
    assert 0 < expected.count_nonzero() < 20
    assert_close(actual, expected)


def test_a_fwd_that_draws_only_later_is_replayed_too():
    def fwd(x, rate):
        mask = (torch.rand_like(x) > rate).double() if rate else torch.ones_like(x)
        return x**3 * mask, 3 * x**2 * mask

    rule = stated(lambda x, r: fwd(x, r)[0], fwd, lambda slope, g: (g * slope, None))
    x = torch.linspace(1, 2, 20)
    rule(x.clone().requires_grad_(), 0.0)

    def value(x):
        y = rule(x, 0.5)
        return y.sum(), y

    def slope(x):
        first, y = torch.func.grad(value, has_aux=True)(x)
        return first.sum(), (first, y)

    second, (first, y) = torch.func.grad(slope, has_aux=True)(x)
    mask = y / x**3
    assert 0 < mask.count_nonzero() < 20
    assert_close((first, second), (3 * x**2 * mask, 6 * x * mask))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_that_fwd_draws_is_not_learned_from_a_trace(is_compiled):
    def fwd(x):
        mask = torch.rand_like(x).round()
        return x**3 * mask, 3 * x**2 * mask

    rule = stated(lambda x: fwd(x)[0], fwd, lambda slope, g: g * slope)
    x = torch.linspace(1, 2, 20)
    if is_compiled:
        first = torch.func.grad(lambda x: rule(x).sum())
        torch.compile(first, backend="aot_eager")(x)
    else:
        with FakeTensorMode():
            rule(torch.ones(20, requires_grad=True)).sum().backward()
    leaf_x = x.clone().requires_grad_()
    out = rule(leaf_x)
    torch.rand(3)  # what others draw meanwhile does not matter
    (first,) = gradients(out, leaf_x, create_graph=True)
    mask = out.detach() / x**3
    assert 0 < mask.count_nonzero() < 20
    assert_close(gradients(first, leaf_x), (6 * x * mask,))


@pytest.mark.on_cpu
def test_randomness_of_fwd_that_torch_cannot_replay_is_refused():
    generator = torch.Generator().manual_seed(0)

    def fwd(x):
        mask = torch.rand(x.shape, generator=generator)
        return x * mask, x * mask

    rule = stated(lambda x: x, fwd, lambda r, g: g * r)
    x = X.clone().requires_grad_()
    with pytest.raises(gt.TransformError, match="fwd gave other residuals"):
        gradients(rule(x), x, create_graph=True)


def test_once_differentiable_keeps_no_input_for_it():
    x = torch.randn(1000, requires_grad=True)
    sizes = []
    rules = [
        stated(
            torch.sigmoid,
            logistic(lambda y: y * (1 - y)),
            lambda slope, g: g * slope,
            once_differentiable=once,
        )
        for once in (True, False)
    ]
    for rule in rules:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
        ):
            rule(x * 1)
        sizes.append(sum(kept))
    assert sizes == [1000, 2000]
