"""What bwd may return, what it is given, and what it may ask for."""

from typing import NamedTuple

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients, leaf, stated

pytestmark = pytest.mark.usefixtures("unchecked")


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def total(x, tree):
    return x * tree["a"] + tree["b"][0] + tree["b"][1]


def rule_returning(value):
    """Return a rule of ``total`` whose bwd returns the value, or calls it with g."""
    return stated(
        total,
        lambda x, tree: (total(x, tree), ()),
        lambda _, g: value(g) if callable(value) else value,
    )


def marks(value):
    """Return what the four tensors of ``total`` get when bwd returns a value."""
    x, a, b, c = (torch.tensor(float(i), requires_grad=True) for i in range(4))
    return gradients(rule_returning(value)(x, {"a": a, "b": (b, c)}), x, a, b, c)


def scalars(*values):
    return tuple(None if v is None else torch.tensor(float(v)) for v in values)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (lambda g: (2 * g, {"a": 3 * g, "b": (4 * g, 5 * g)}), (2, 3, 4, 5)),
        (lambda g: [2 * g, {"a": 3 * g, "b": [4 * g, 5 * g]}], (2, 3, 4, 5)),
        (lambda g: {"tree": {"b": (4 * g, 5 * g), "a": 3 * g}, "x": g}, (1, 3, 4, 5)),
        (lambda g: (2 * g, {"a": None, "b": (4 * g, None)}), (2, None, 4, None)),
        (lambda g: (2 * g, {"a": 3 * g, "b": None}), (2, 3, None, None)),
        (lambda g: (2 * g, None), (2, None, None, None)),
        (lambda g: {"x": 2 * g}, (2, None, None, None)),
        (lambda g: {"x": None}, (None,) * 4),
        ({}, (None,) * 4),
        ((None, None), (None,) * 4),
    ],
)
def test_none_and_omission_mean_zero_at_any_depth(returned, expected):
    assert marks(returned) == scalars(*expected)


@pytest.mark.parametrize("returned", [lambda g: 7 * g, lambda g: None])
@pytest.mark.parametrize(
    "others", [(2, "a"), (True, None), (torch.arange(3), print), ([1, {"k": 2}], 1.5)]
)
def test_a_bare_value_belongs_to_the_only_differentiable_argument(returned, others):
    rule = stated(
        lambda n, x, o: 2 * x,
        lambda n, x, o: (2 * x, ()),
        lambda _, g: returned(g),
    )
    x = leaf(1.0)
    (actual,) = gradients(rule(others[0], x, others[1]), x)
    expected = returned(torch.ones(1))
    assert actual is None if expected is None else torch.equal(actual, expected)


def test_a_bare_none_with_two_differentiable_arguments_is_refused():
    x, y = leaf(1.0), leaf(2.0)
    rule = stated(torch.add, lambda x, y: (x + y, ()), lambda _, g: None)
    with pytest.raises(gt.BackwardContractError, match="a tuple of 2"):
        gradients(rule(x, y), x)


def test_zeros_are_what_torch_func_makes_of_none():
    rule = stated(torch.mul, lambda x, y: (x * y, ()), lambda _, g: (g, None))
    x, y = torch.tensor(2.0), torch.tensor(3.0)
    actual = torch.func.grad(rule, (0, 1))(x, y)
    assert actual == scalars(1, 0)


def test_a_namedtuple_argument_takes_a_namedtuple_and_no_other_tuple():
    def rule(make):
        return stated(
            lambda p: p.left * p.right, lambda p: (p.left * p.right, ()), make
        )

    x, y = leaf(1.0), leaf(2.0)
    out = rule(lambda _, g: (Pair(2 * g, 3 * g),))(Pair(x, y))
    assert gradients(out, x, y) == (2, 3)
    with pytest.raises(gt.BackwardContractError, match=r"args\.p\n.*a Pair of 2"):
        gradients(rule(lambda _, g: ((2 * g, 3 * g),))(Pair(x, y)), x)


# needs


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_needs_mirrors_the_arguments_in_fwd_and_bwd(wanted):
    seen = {}

    def fwd(n, p, i, *, needs):
        seen["fwd"] = needs
        return p["x"] * p["y"][0], ()

    def bwd(_, g, *, needs):
        seen["bwd"] = needs
        return {"p": {"x": g, "y": [g]}}

    rule = stated(lambda n, p, i: p["x"] * p["y"][0], fwd, bwd)
    x, y = (torch.ones(2).requires_grad_(w) for w in wanted)
    rule(3, {"x": x, "y": [y]}, torch.arange(2)).sum().backward()
    tree = {"x": wanted[0], "y": [wanted[1]]}
    assert seen["fwd"] == seen["bwd"] == (False, tree, False)


def test_needs_is_an_ordinary_argument_of_a_function_that_has_one():
    def fun(x, *, needs):
        return needs * x

    rule = stated(
        fun, lambda x, *, needs: (needs * x, needs), lambda n, g: {"x": 10 * g * n}
    )
    x = leaf(1.0)
    assert gradients(rule(x, needs=3.0), x) == (30,)


# Outputs that are unused, integer, or no tensors.


def three(x):
    return {"y": 2 * x, "order": x.argsort(), "z": (3 * x, "a text", 4)}


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("functional", [True, False])
def test_the_cotangent_has_the_structure_of_the_output(materialize, functional):
    seen = []
    rule = stated(
        three,
        lambda x: (three(x), ()),
        lambda _, g: seen.append(g) or g["y"],
        materialize_grads=materialize,
    )
    x = torch.ones(2, requires_grad=True)

    def used(x):
        return rule(x)["y"].sum()

    if functional:
        torch.func.grad(used)(x.detach())
    else:
        used(x).backward()
    zeros = torch.zeros(2) if materialize else None
    expected = {"y": torch.ones(2), "order": None, "z": (zeros, None, None)}
    assert_close(seen[-1], expected, rtol=0, atol=0)


def test_outputs_that_are_no_floating_tensors_come_out_as_they_are():
    rule = stated(three, lambda x: (three(x), ()), lambda _, g: g["y"])
    out = rule(leaf(3.0, 1.0))
    assert out["z"][1:] == ("a text", 4)
    assert out["order"].tolist() == [1, 0]
    assert not out["order"].requires_grad
    assert out["y"].requires_grad
    assert out["z"][0].requires_grad


@pytest.mark.parametrize("output", [None, 3, (), torch.arange(2)])
def test_a_function_without_a_floating_output_has_no_gradient(output):
    rule = stated(lambda x: output, lambda x: (output, ()), lambda _, g: 1 / 0)
    out = rule(leaf(1.0))
    assert_close(out, output)
    assert not getattr(out, "requires_grad", False)


# Sparse cotangents.


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_sparse_cotangent_passes_as_it_is():
    @gt.custom_vjp
    def lookup(table, indices):
        return table[indices]

    @lookup.def_fwd
    def _(table, indices):
        return table[indices], (indices, table.shape)

    @lookup.def_bwd
    def _(residuals, g):
        indices, shape = residuals
        values = 10 * g
        return torch.sparse_coo_tensor(
            indices[None], values, shape, check_invariants=False
        ), None

    table = torch.randn(5, 3, requires_grad=True)
    indices = torch.tensor([1, 3, 1])

    def loss(lookup, table):
        return (lookup(table, indices) ** 2).sum()

    (expected,) = torch.autograd.grad(loss(torch.Tensor.__getitem__, table), table)
    (actual,) = torch.autograd.grad(loss(lookup, table), table)
    assert actual.is_sparse
    assert_close(actual.to_dense(), 10 * expected)
    functional = torch.func.grad(lambda table: loss(lookup, table))(table.detach())
    assert_close(functional.to_dense(), 10 * expected)


def test_a_pullback_needs_nothing_of_a_tensor_of_the_level_below():
    seen = []
    rule = gt.custom_vjp(lambda x, w: x * w)
    rule.def_fwd(lambda x, w: (x * w, (x, w)))

    @rule.def_bwd
    def _(residuals, g, *, needs):
        seen.append(needs)
        x, w = residuals
        return g * w if needs[0] else None, g * x if needs[1] else None

    x, w = torch.rand(3), torch.rand(3, requires_grad=True)
    _, pull = torch.func.vjp(lambda x: rule(x, w), x)
    assert_close(pull(torch.ones(3)), (w,))
    assert seen[-1] == (True, False)
