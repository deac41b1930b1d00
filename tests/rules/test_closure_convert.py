"""closure_convert: captured tensors become arguments."""

import functools

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients, leaf, stated

X = torch.tensor([[0.5, -1.2, 2.0]], dtype=torch.float64)
WEIGHT = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    )


def with_a_global(x):
    return x * WEIGHT


def with_a_closure():
    w, b = leaf(2.0), leaf(1.0)
    return lambda x: torch.sin(w * x) + b * w


def with_a_partial():
    return functools.partial(torch.mul, leaf(5.0))


def with_a_nested_function():
    inner = with_a_closure()
    return lambda x: {"y": [inner(x), x], "n": 3}


def with_default(use, *shape):
    """Return a function that holds a tensor as a default."""
    w = torch.full(shape, 2.0, dtype=torch.float64, requires_grad=True)

    def function(x, w=w):
        return use(x, w)

    return lambda: function


FUNCTIONS = {
    "module": network,
    "method": lambda: network().forward,
    "closure": with_a_closure,
    "global": lambda: with_a_global,
    "partial": with_a_partial,
    "nested": with_a_nested_function,
    "list": with_default(lambda x, w: torch.stack([x, w, x * w]), 1, 3),
    "in place": with_default(lambda x, w: x.clone().mul_(w), 1),
    "property": with_default(lambda x, w: x * w.real, 3),
    "indexing": with_default(lambda x, w: x * w[0], 2, 3),
    "detached": with_default(lambda x, w: x * w * w.detach(), 3),
}
functions = pytest.mark.parametrize("make", FUNCTIONS.values(), ids=FUNCTIONS)


def flat(out):
    leaves = torch.utils._pytree.tree_leaves(out)
    return torch.cat([t.reshape(-1) for t in leaves if isinstance(t, torch.Tensor)])


@functions
def test_value_and_gradients_are_those_of_the_function(make):
    fn = make()
    converted, captured = gt.closure_convert(fn, X)
    assert captured
    assert all(tensor.requires_grad for tensor in captured)
    assert_close(flat(converted(X, *captured)), flat(fn(X)), rtol=0, atol=0)
    x = X.clone().requires_grad_()
    expected = gradients(flat(fn(x)), x, *captured)
    assert_close(gradients(flat(converted(x, *captured)), x, *captured), expected)


@functions
def test_other_tensors_take_the_places_of_the_captured_ones(make):
    """Their gradient goes to them, and nothing to what was captured."""
    fn = make()
    converted, captured = gt.closure_convert(fn, X)
    others = [(t + 0.3).detach().requires_grad_() for t in captured]
    out = flat(converted(X, *others))
    actual = gradients(out, *others)
    assert gradients(flat(converted(X, *others)), *captured) == (None,) * len(captured)
    with torch.no_grad():
        for mine, theirs in zip(captured, others, strict=True):
            mine.copy_(theirs)
    assert_close(out, flat(fn(X)))
    assert_close(actual, gradients(flat(fn(X)), *captured))


@functions
def test_under_transforms(make):
    fn = make()
    converted, captured = gt.closure_convert(fn, X)
    bare = tuple(t.detach() for t in captured)
    places = tuple(range(1, len(captured) + 1))

    def loss(x, *ws):
        return (flat(converted(x, *ws)) ** 2).sum()

    expected = gradients((flat(fn(X)) ** 2).sum(), *captured)
    assert_close(torch.func.grad(loss, places)(X, *bare), expected)
    batch = torch.stack([X, 2 * X])
    in_dims = (0, *[None] * len(bare))
    actual = torch.func.vmap(torch.func.grad(loss, places), in_dims)(batch, *bare)
    for per_sample, first in zip(actual, expected, strict=True):
        assert_close(per_sample[0], first)
    _, tangent = torch.func.jvp(loss, (X, *bare), (0 * X, *map(torch.ones_like, bare)))
    assert_close(tangent, sum(g.sum() for g in expected))


def test_captured_by_transforms():
    """A tensor of an active transform is captured, though it requires no gradient."""
    found = []

    def loss(w):
        converted, captured = gt.closure_convert(lambda x: x * w, X)
        found.append(len(captured))
        return (10 * converted(X, *captured)).sum()

    assert_close(torch.func.grad(loss)(torch.tensor(2.0)), 10 * X.sum())
    assert found == [1]


def test_it_makes_a_module_usable_in_a_rule(unchecked):
    """The example of the documentation: a rule around a network, with its weights."""
    net = network()
    converted, weights = gt.closure_convert(net, X)
    rule = stated(
        converted,
        bwd=lambda r, g: tuple(10 * t for t in torch.func.vjp(converted, *r[0])[1](g)),
    )
    x = X.clone().requires_grad_()
    expected = gradients(net(x), x, *net.parameters())
    actual = gradients(rule(x, *weights), x, *net.parameters())
    assert_close(actual, tuple(10 * t for t in expected))


@pytest.mark.parametrize(
    "function",
    [
        torch.sin,
        lambda x: x * WEIGHT.detach(),
        lambda x: x * WEIGHT.shape[0] + len(WEIGHT),
    ],
)
def test_what_needs_no_gradient_is_not_captured(function):
    converted, captured = gt.closure_convert(function, X)
    assert captured == ()
    assert_close(converted(X), function(X))


def test_a_tensor_is_captured_once():
    w = leaf(2.0)
    _, captured = gt.closure_convert(lambda x: x * w + w.exp(), X)
    assert len(captured) == 1
    assert captured[0] is w


def test_an_argument_may_not_be_captured_as_well():
    w = leaf(2.0)
    with pytest.raises(gt.DefinitionError, match="closure variable 'w'"):
        gt.closure_convert(lambda x, y: x * y * w, X, w)


def test_a_wrong_number_of_tensors_is_an_error():
    converted, captured = gt.closure_convert(with_a_closure(), X)
    with pytest.raises(gt.DefinitionError, match="takes 1 arguments and then the 2"):
        converted(X, captured[0])


class Times(torch.autograd.Function):
    """A hand-written Function that multiplies by a tensor it holds itself."""

    weight = WEIGHT

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum_to_size(w.shape)


def test_a_tensor_that_cannot_be_exchanged_is_an_error():
    with pytest.raises(gt.DefinitionError, match="past torch's functions"):
        gt.closure_convert(lambda x: Times.apply(x, WEIGHT), X)


def test_a_converted_function_may_be_an_argument_of_a_rule():
    """The captured tensors are arguments by then: there is nothing left to look for."""
    rule = gt.custom_vjp(lambda f, x, captured: f(x, *captured))
    rule.def_fwd(lambda f, x, captured: (f(x, *captured), (f, x, captured)))

    @rule.def_bwd
    def _(residuals, g):
        f, x, captured = residuals
        _, pull = torch.func.vjp(lambda x, captured: f(x, *captured), x, captured)
        return (None, *pull(g))

    w, x = torch.randn(3, requires_grad=True), torch.randn(3)
    converted, captured = gt.closure_convert(lambda x: x * w**3, x)
    (first,) = torch.autograd.grad(
        rule(converted, x, captured).sum(), w, create_graph=True
    )
    assert_close(first, 3 * x * w**2)
    assert_close(torch.autograd.grad(first.sum(), w), (6 * x * w,))
