"""custom_jvp: a forward rule, and reverse mode as its transpose."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import derivative, gradients, leaf, twice_backward

pytestmark = pytest.mark.usefixtures("unchecked")

X = torch.tensor([0.5, -1.2, 2.0], dtype=torch.float64)
Y = torch.tensor([1.5, 0.2, -1.0], dtype=torch.float64)
V = torch.tensor([1.0, 0.3, -2.0], dtype=torch.float64)
W = torch.tensor([0.7, -0.4, 3.0], dtype=torch.float64)


def rule_of(fun, jvp, **options):
    rule = gt.custom_jvp(fun, **options)
    assert rule.defjvp(jvp) is jvp
    return rule


def marked_product(primals, tangents):
    (x, y), (tx, ty) = primals, tangents
    return x * y, 10 * tx * y + 100 * x * ty


product = rule_of(torch.mul, marked_product)


@gt.custom_jvp
def exponential(x):
    return x.exp()


@exponential.defjvp
def _(primals, tangents):
    y = exponential(*primals)
    return y, 10 * tangents[0] * y


def test_both_modes_follow_the_rule():
    out = torch.func.jvp(product, (X, Y), (V, W))
    assert_close(out, (X * Y, 10 * V * Y + 100 * X * W))
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    assert_close(
        torch.autograd.grad(product(x, y), (x, y), V), (10 * V * Y, 100 * V * X)
    )
    assert_close(torch.func.vjp(product, X, Y)[1](V), (10 * V * Y, 100 * V * X))
    assert_close(torch.func.jacrev(product)(X, Y), torch.diag(10 * Y))
    assert_close(torch.func.jacfwd(product, 1)(X, Y), torch.diag(100 * X))


def test_without_a_derivative_the_function_itself_runs():
    rule = rule_of(torch.sin, lambda p, t: 1 / 0)
    assert_close(rule(X), X.sin())
    assert_close(torch.func.vmap(rule)(X), X.sin())
    with torch.no_grad():
        assert_close(rule(X.clone().requires_grad_()), X.sin())


def second_derivatives(function):
    def jvp(f):
        return lambda x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]

    yield twice_backward(function, X)
    for outer in (derivative, jvp):
        for inner in (derivative, jvp):
            yield outer(inner(function))(X)


def test_a_rule_that_calls_itself_applies_at_every_order():
    for second in second_derivatives(exponential):
        assert_close(second, 100 * X.exp())


def test_other_rules_are_differentiated_as_written():
    rule = rule_of(torch.exp, lambda p, t: (p[0].exp(), 10 * t[0] * p[0].exp()))
    for second in second_derivatives(rule):
        assert_close(second, 10 * X.exp())


# defjvps


def test_defjvps_states_it_by_argument():
    rule = gt.custom_jvp(lambda x, n, y: x * n * y)
    rule.defjvps(
        lambda t, out, x, n, y: 10 * t * n * y, None, lambda t, out, x, n, y: t * out
    )
    out = torch.func.jvp(lambda x, y: rule(x, 2, y), (X, Y), (V, W))
    assert_close(out, (2 * X * Y, 20 * V * Y + W * 2 * X * Y))
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    assert_close(gradients(rule(x, 2, y), x, y), (20 * Y, 2 * X * Y))


def test_none_means_that_an_argument_adds_nothing():
    rule = gt.custom_jvp(torch.mul)
    rule.defjvps(lambda t, out, x, y: t, None)
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    first, second = gradients(rule(x, y), x, y)
    assert_close(first, torch.ones(3))
    assert second is None or not second.any()
    _, tangent = torch.func.jvp(lambda y: rule(X, y), (Y,), (V,))
    assert_close(tangent, torch.zeros(3))


def test_defjvps_adds_trees_and_takes_none_in_them():
    rule = gt.custom_jvp(lambda x, y: {"a": x * y, "b": (x, y)})
    rule.defjvps(
        lambda t, out, x, y: {"a": t * y, "b": (10 * t, None)},
        lambda t, out, x, y: {"a": x * t, "b": (None, 10 * t)},
    )
    _, tangent = torch.func.jvp(rule, (X, Y), (V, W))
    assert_close(tangent, {"a": V * Y + X * W, "b": (10 * V, 10 * W)})


@pytest.mark.parametrize("count", [1, 3])
def test_defjvps_wants_one_entry_per_argument(count):
    parts = [None] * count
    with pytest.raises(gt.DefinitionError, match=f"got {count} functions for 2"):
        gt.custom_jvp(lambda x, y: x * y).defjvps(*parts)
    variadic = gt.custom_jvp(torch.mul)
    variadic.defjvps(*parts)
    with pytest.raises(gt.DefinitionError, match=f"got {count} functions for 2"):
        variadic(leaf(1.0), leaf(2.0))


def test_defjvps_serves_keyword_only_parameters():
    rule = gt.custom_jvp(lambda x, *, k: x * k)
    rule.defjvps(lambda t, out, x, k: 10 * t * k, lambda t, out, x, k: x * t)
    x, k = X.clone().requires_grad_(), leaf(2.0)
    expected = (torch.full((3,), 20.0), X.sum(0, keepdim=True))
    assert_close(gradients(rule(x, k=k), x, k), expected)


def test_defjvps_refuses_nondiff_arguments():
    rule = gt.custom_jvp(lambda n, x: n * x, nondiff_argnums=0)
    with pytest.raises(gt.DefinitionError, match="nondiff"):
        rule.defjvps(lambda t, out, x: t)


# Refusals


@pytest.mark.parametrize(
    "tangent",
    [
        lambda x, t: t.clamp(-1, 1),
        lambda x, t: t.clamp(-20, 20),
        lambda x, t: t + 1,
        lambda x, t: t * t,
    ],
)
def test_a_rule_that_is_not_linear_has_no_reverse_mode(tangent):
    rule = rule_of(torch.sin, lambda p, t: (p[0].sin(), tangent(p[0], t[0])))
    assert_close(torch.func.jvp(rule, (X,), (V,)), (X.sin(), tangent(X, V)))
    x = X.clone().requires_grad_()
    for use in (lambda: gradients(rule(x), x), lambda: derivative(rule)(X)):
        with pytest.raises(gt.TransformError, match="not linear in its tangents") as e:
            use()
        assert "custom_vjp" in e.value.fix


@pytest.mark.parametrize(
    "tangent",
    [
        lambda t: t.detach(),
        lambda t: t + t.detach(),
        lambda t: torch.tensor(t.tolist()),
    ],
)
def test_a_rule_that_hides_its_tangent_has_no_reverse_mode(tangent):
    rule = rule_of(torch.sin, lambda p, t: (p[0].sin(), tangent(t[0])))
    x = X.clone().requires_grad_()
    with pytest.raises(gt.TransformError, match="opaque in its tangents"):
        gradients(rule(x), x)


def test_without_a_rule_a_derivative_is_an_error_that_names_the_function():
    rule = gt.custom_jvp(torch.sin)
    assert_close(rule(X), X.sin())
    with pytest.raises(gt.DefinitionError, match="sin: a derivative is") as caught:
        rule(leaf(1.0))
    assert "defjvp" in caught.value.fix


# Binding, nondiff, identity


def test_nondiff_arguments_come_first_and_have_no_tangent():
    def fun(f, x, n):
        return f(x) * n

    def jvp(f, n, primals, tangents):
        (x,), (t,) = primals, tangents
        return f(x) * n, 10 * t * n

    for options in ({"nondiff_argnums": (0, 2)}, {"nondiff_argnames": ("f", "n")}):
        rule = rule_of(fun, jvp, **options)
        x = X.clone().requires_grad_()
        assert_close(gradients(rule(torch.sin, x, 3), x), (torch.full((3,), 30.0),))
        _, tangent = torch.func.jvp(lambda x, r=rule: r(torch.sin, x, 3), (X,), (V,))
        assert_close(tangent, 30 * V)


class Wave:
    frequency = 2.0

    @gt.custom_jvp
    def value(self, x, *, gain=1.0):
        return gain * torch.sin(self.frequency * x)

    @value.defjvp
    def _(self, primals, tangents):
        (_, x, gain), (_, t, none) = primals, tangents
        assert none is None
        return gain * torch.sin(self.frequency * x), 10 * gain * t


def test_a_method_gets_self_and_keywords():
    x = X.clone().requires_grad_()
    out = Wave().value(x, gain=3.0)
    assert_close(out, 3 * torch.sin(2 * X))
    assert_close(gradients(out, x), (torch.full((3,), 30.0),))


def test_a_rule_is_one_object_found_by_its_name():
    assert copy.deepcopy(exponential) is exponential
    assert pickle.loads(pickle.dumps(exponential)) is exponential
    assert repr(exponential).startswith("<CustomJVP exponential (")
