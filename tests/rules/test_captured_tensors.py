"""A tensor that needs a gradient and is no argument is an error, never a zero."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients, leaf, stated

pytestmark = pytest.mark.usefixtures("unchecked")

WEIGHT = None
X = torch.tensor([3.0], dtype=torch.float64)


def times(x, w):
    return x * w


def by_closure(w):
    return lambda x: x * w


def by_global(w):
    global WEIGHT
    WEIGHT = w
    return lambda x: x * WEIGHT


def by_default(w):
    return lambda x, *, weight=w: x * weight


def by_partial(w):
    return functools.partial(times, w=w)


def by_self(w):
    return SimpleNamespace(method=by_closure(w)).method


def by_module(w):
    inner = torch.nn.Module()
    inner.weight = w if isinstance(w, torch.nn.Parameter) else [w]
    outer = torch.nn.Module()
    outer.inner = inner
    return lambda x: (
        x
        * (
            outer.inner.weight[0]
            if isinstance(outer.inner.weight, list)
            else inner.weight
        )
    )


def by_list(w):
    box = [{"w": w}]
    return lambda x: x * box[0]["w"]


def by_helper(w):
    helper = by_closure(w)
    return lambda x: 1 * helper(x)


class Holder:
    def __init__(self, w):
        self.w = w

    def times(self, x):
        return x * self.w

    def __call__(self, x):
        return x * self.w


def by_bound_method(w):
    return Holder(w).times


WAYS = {
    name: way
    for name, way in globals().items()
    if name.startswith("by_") and callable(way)
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def of_one(used):
    """Return the function without its defaults, which would be arguments."""

    def fun(x):
        return used(x)

    return fun


def in_fun(used):
    return stated(of_one(used), bwd=lambda r, g: {})


def in_fwd(used):
    return stated(lambda x: 2 * x, lambda x: (used(x), ()), lambda _, g: g)


def in_bwd(used):
    return stated(lambda x: 2 * x, lambda x: (2 * x, ()), lambda _, g: used(g))


def in_jvp(used):
    rule = gt.custom_jvp(lambda x: 2 * x)
    rule.defjvp(lambda p, t: (2 * p[0], used(t[0])))
    return rule


places = pytest.mark.parametrize("place", [in_fun, in_fwd, in_bwd, in_jvp])


@places
@ways
def test_backward(way, place):
    x, w = X.clone().requires_grad_(), torch.nn.Parameter(torch.tensor([2.0]))
    with pytest.raises(gt.CapturedTensorError, match="without getting it as an arg"):
        gradients(place(way(w))(x), x)


@pytest.mark.parametrize("policy", ["first", "always", "off"])
def test_no_policy_allows_it(policy):
    x, w = leaf(3.0), leaf(2.0)
    with gt.gradcheck_policy(policy), pytest.raises(gt.CapturedTensorError, match="w"):
        gradients(stated(by_closure(w), lambda x: (x * w, ()), lambda _, g: 2 * g)(x))


@places
@ways
def test_grad(way, place):
    with pytest.raises(gt.CapturedTensorError, match="without getting it as an arg"):
        torch.func.grad(lambda w: place(way(w))(5 * w).sum())(X)


@pytest.mark.parametrize("place", [in_fun, in_fwd])
@ways
def test_jvp(way, place):
    with pytest.raises(gt.CapturedTensorError, match="without getting it as an arg"):
        torch.func.jvp(lambda w: place(way(w))(X), (X,), (X,))


@pytest.mark.parametrize("place", [in_fun, in_fwd])
@ways
def test_dual_numbers(way, place):
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        w = forward_ad.make_dual(X, X)
        with pytest.raises(gt.CapturedTensorError, match="without getting it as an"):
            place(way(w))(X)


@places
@ways
def test_vmap_of_grad(way, place):
    def per_sample(w, x):
        return torch.func.grad(lambda x: place(way(w))(x).sum())(x)

    with pytest.raises(gt.CapturedTensorError, match="without getting it as an arg"):
        torch.func.vmap(per_sample, (0, None))(torch.ones(2, 1), X)


@ways
def test_no_gradient_in_any_argument_is_no_excuse(way):
    w = torch.nn.Parameter(torch.tensor([2.0]))
    with pytest.raises(gt.CapturedTensorError, match="fun uses a tensor"):
        in_fun(way(w))(X)
    with pytest.raises(gt.CapturedTensorError, match="fun uses a tensor"):
        torch.func.grad(lambda w: in_fun(way(w))(X).sum())(X)


@ways
def test_a_tensor_that_needs_no_gradient_may_be_captured(way):
    w, x = torch.tensor([2.0]), leaf(3.0)
    used = way(w)
    rule = stated(of_one(used), lambda x: (used(x), ()), lambda _, g: 10 * used(g))
    assert_close(gradients(rule(x), x), (torch.tensor([20.0]),))
    with torch.no_grad():
        assert_close(in_fun(way(w.requires_grad_()))(x), torch.tensor([6.0]))


@ways
def test_vmap_without_a_derivative_is_right(way):
    actual = torch.func.vmap(lambda w: in_fun(way(w))(X))(torch.tensor([[2.0], [4.0]]))
    assert_close(actual, torch.tensor([[6.0], [12.0]]))


@pytest.mark.parametrize("mode", ["sequential", "expand_dims", "broadcast_all"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.vmap(lambda w: f(w)(X))(X),
        lambda f: torch.func.vmap(lambda w: f(w)(w))(X),
        lambda f: torch.func.grad(lambda w: torch.func.vmap(f(w))(X).sum())(X),
        lambda f: torch.func.vmap(f(leaf(2.0)))(X),
    ],
)
def test_vmap_by_other_means_refuses_it(transform, mode):
    """The loop, or the rule, runs below the level to which the tensor belongs."""

    def capturing(w):
        return stated(lambda x: x * w, bwd=lambda r, g: g, vmap=mode)

    def with_vmap_rule(w):
        rule = stated(lambda x: x * w, bwd=lambda r, g: g)
        rule.def_vmap(lambda info, in_dims, x: (x * w, 0))
        return rule

    for make in (capturing, with_vmap_rule):
        with pytest.raises(gt.CapturedTensorError, match="without getting it as"):
            transform(make)


@pytest.mark.parametrize("way", [by_list, by_bound_method, by_module, by_global])
@pytest.mark.parametrize("place", [in_fwd, in_bwd])
def test_a_tensor_unfrozen_after_the_first_call_is_found(way, place):
    w, x = torch.tensor([2.0]), leaf(3.0)
    rule = place(way(w))
    assert_close(gradients(rule(x), x)[0].isfinite(), torch.tensor([True]))
    w.requires_grad_()
    with pytest.raises(gt.CapturedTensorError, match="without getting it as an arg"):
        gradients(rule(x), x)
