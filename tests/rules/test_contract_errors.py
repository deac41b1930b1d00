"""What bwd returns wrongly, and how the error says it."""

import copy
import pickle

import pytest
import torch

import gradtools as gt
from gradtools.errors import Violation
from tests.rules.stating import backward, functional, leaf, stated

pytestmark = pytest.mark.usefixtures("unchecked")


def raised_by(use, returned, fun=lambda x, b, n: x * b):
    """Return the error of a rule of ``fun`` whose bwd returns a wrong thing."""
    rule = stated(fun, lambda *args: (fun(*args), ()), lambda _, g: returned(g))
    x, b = (torch.ones(*s, requires_grad=True) for s in ((2, 3), (3,)))
    args = (x, b, 4)[: fun.__code__.co_argcount]
    with pytest.raises(gt.BackwardContractError, match="bwd returned") as caught:
        use(rule, *args)
    return caught.value


HERE = str(torch.empty(()).device)
WHOLE = "a tuple of 3 (x, b, n), or a dict by name"


@pytest.mark.parametrize("use", [backward, functional])
@pytest.mark.parametrize(
    ("returned", "where", "expected", "got", "fix"),
    [
        (lambda g: (g,), "return", WHOLE, "a tuple of 1", "one cotangent per"),
        (lambda g: (g,) * 4, "return", WHOLE, "a tuple of 4", "one cotangent per"),
        (lambda g: g, "return", WHOLE, "a tensor of shape", "one cotangent per"),
        (lambda g: "text", "return", WHOLE, "a value of type str", "one cotangent per"),
        (lambda g: {"y": g}, "return", "x, b, n", "'y'", "Use one of 'x', 'b', 'n'"),
        # A shape that broadcasts to the right one, and a number that would.
        (lambda g: (g, g, None), "args.b", "(3,)", "(2, 3)", "Sum over"),
        (lambda g: (g[:1], None, None), "args.x", "(2, 3)", "(1, 3)", "shape"),
        (lambda g: (g.sum(), None, None), "args.x", "(2, 3)", "()", "shape"),
        (lambda g: (0.0, None, None), "args.x", "a tensor", "float", "None for zero"),
        (lambda g: ([g], None, None), "args.x", "(2, 3)", "a list of 1", "a tensor"),
        (lambda g: (g.float(), None, None), "args.x", "float64", "float32", "dtype"),
        (lambda g: (g.int(), None, None), "args.x", "float64", "int32", "dtype"),
        (lambda g: (g * 1j, None, None), "args.x", "float64", "complex", ".real"),
        (lambda g: (g.to("meta"), None, None), "args.x", HERE, "meta", "device"),
        (lambda g: (None, None, g), "args.n", "None", "a tensor", "Return None"),
        (lambda g: (None, None, 0), "args.n", "None", "type int", "Return None"),
    ],
)
def test_a_wrong_cotangent_is_named_with_what_was_expected(
    use, returned, where, expected, got, fix
):
    error = raised_by(use, returned)
    (violation,) = error.violations
    assert violation.where == where
    assert expected in violation.expected
    assert got in violation.got
    assert fix in error.fix


@pytest.mark.parametrize("use", [backward, functional])
def test_all_that_is_wrong_is_said_at_once(use):
    error = raised_by(use, lambda g: (g.sum(), g, g))
    assert [v.where for v in error.violations] == ["args.x", "args.b", "args.n"]
    assert "shape. Sum over" in error.fix
    assert error.fix.endswith("Return None for an argument that has no gradient.")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_cotangent_for_an_integer_tensor_is_refused(dtype):
    rule = stated(lambda x, i: 2 * x, lambda x, i: (2 * x, ()), lambda _, g: (g, g))
    with pytest.raises(gt.BackwardContractError, match=r"args\.i\n.*expected  None"):
        backward(rule, leaf(1.0), torch.ones(1, dtype=dtype))


def product(params):
    return params["w"] * params["b"][0]


@pytest.mark.parametrize(
    ("returned", "where", "got"),
    [
        (lambda g: ({"w": g},), "args.params", "a dict of 1 (['w'])"),
        (lambda g: ({"w": g, "b": [g], "c": g},), "args.params", "a dict of 3"),
        (lambda g: ({"w": g, "b": (g,)},), "args.params['b']", "a tuple of 1 ([0])"),
        (lambda g: ({"w": g, "b": [g, g]},), "args.params['b']", "a list of 2"),
        (lambda g: ({"w": g, "b": g},), "args.params['b']", "a tensor of shape"),
        (lambda g: ({"w": [g], "b": [g]},), "args.params['w']", "a list of 1 ([0])"),
        (lambda g: ({"w": g, "b": [g[0]]},), "args.params['b'][0]", "shape ()"),
    ],
)
def test_a_wrong_structure_is_named_by_its_path(returned, where, got):
    rule = stated(product, lambda p: (product(p), ()), lambda _, g: returned(g))
    with pytest.raises(gt.BackwardContractError, match="does not fit") as caught:
        backward(rule, {"w": leaf(1.0), "b": [leaf(2.0)]})
    (violation,) = caught.value.violations
    assert violation.where == where
    assert got in violation.got


def test_a_dict_with_the_keys_of_the_argument_is_shown_the_right_form():
    rule = stated(product, lambda p: (product(p), ()), lambda _, g: {"w": g, "b": [g]})
    fix = r"Return {'params': {...}}: the outer dict is by parameter name"
    with pytest.raises(gt.BackwardContractError, match="unknown names") as caught:
        backward(rule, {"w": leaf(1.0), "b": [leaf(2.0)]})
    assert caught.value.fix.startswith(fix)


def test_a_bare_pytree_is_no_cotangent():
    rule = stated(lambda p: p[0] * p[1], lambda p: (p[0], ()), lambda _, g: (g, g))
    with pytest.raises(gt.BackwardContractError, match=r"expected  a tuple of 1 \(p\)"):
        backward(rule, (leaf(1.0), leaf(2.0)))


# The error itself.


@pytest.mark.on_cpu
def test_the_parts_of_an_error_are_its_data_and_its_message():
    error = raised_by(backward, lambda g: (g, g, None))
    assert error.what.endswith(
        "bwd returned a cotangent that does not fit the arguments"
    )
    assert error.rule.startswith(f"<lambda> ({__file__}:")
    assert error.function.startswith(f"bwd ({__file__}:")
    (violation,) = error.violations
    assert violation == Violation(
        "args.b", "a tensor of shape (3,), float64, cpu", violation.got
    )
    assert str(error).splitlines() == [
        error.what,
        f"  rule      {error.rule}",
        f"  function  {error.function}",
        "  where     args.b",
        "  expected  a tensor of shape (3,), float64, cpu",
        "  got       a tensor of shape (2, 3), float64, cpu",
        f"  fix       {error.fix}",
    ]


@pytest.mark.parametrize("copied", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
def test_an_error_survives_copying_and_pickling(copied):
    error = raised_by(backward, lambda g: (g, g, None))
    twin = copied(error)
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert twin.violations == error.violations
