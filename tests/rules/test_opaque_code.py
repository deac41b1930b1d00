"""Code that torch cannot see serves a first derivative; a second one is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import derivative, gradients, stated, twice_backward

X = torch.tensor([0.5, -1.2], dtype=torch.float64)


def sine(fwd, bwd, **options):
    return stated(torch.sin, fwd, bwd, **options)


def by_numpy(function, *tensors):
    return torch.from_numpy(
        np.asarray(function(*(t.detach().numpy() for t in tensors)))
    )


@torch.no_grad()
def without_grad(x, g):
    return g * x.cos()


@torch.no_grad()
def slope_without_grad(x):
    return x.cos()


IN_BWD = {
    "numpy": lambda x, g: by_numpy(lambda x, g: g * np.cos(x), x, g),
    "item": lambda x, g: g * torch.tensor([v.item() for v in x]).cos(),
    "tolist": lambda x, g: torch.tensor(g.tolist()) * x.cos(),
    "detached residual": lambda x, g: g * x.detach().cos(),
    "detached cotangent": lambda x, g: g.detach() * x.cos(),
    "no_grad": without_grad,
    "data": lambda x, g: g * x.data.cos(),
}
IN_FWD = {
    "numpy": (lambda x: by_numpy(np.cos, x), lambda c, g: g * c),
    "no_grad": (slope_without_grad, lambda c, g: g * c),
    "detached": (lambda x: x.cos().detach(), lambda c, g: g * c),
    "copy of the input": (lambda x: x.detach().clone(), lambda x, g: g * x.cos()),
    "a float": (lambda x: x.cos().tolist(), lambda c, g: g * torch.tensor(c)),
    "an array": (lambda x: x.cos().detach().numpy(), lambda c, g: g * torch.tensor(c)),
    "an array in an object": (
        lambda x: SimpleNamespace(c=x.cos().detach().numpy()),
        lambda o, g: g * torch.tensor(o.c),
    ),
}
OPAQUE_OBJECTS = {
    "an object": (lambda x: SimpleNamespace(x=x), lambda o, g: g * o.x.cos()),
    "a set": (lambda x: {x}, lambda s, g: g * next(iter(s)).cos()),
    "a closure": (lambda x: lambda g: g * x.cos(), lambda f, g: f(g)),
    "a pullback": (lambda x: torch.func.vjp(torch.sin, x)[1], lambda f, g: f(g)[0]),
}
RULES = {
    **{
        f"bwd: {k}": lambda b=b: sine(lambda x: (x.sin(), x), b)
        for k, b in IN_BWD.items()
    },
    **{
        f"fwd: {k}": lambda r=r, b=b: sine(lambda x: (x.sin(), r(x)), b)
        for k, (r, b) in (IN_FWD | OPAQUE_OBJECTS).items()
    },
    "once_differentiable": lambda: sine(
        lambda x: (x.sin(), x.cos()), lambda c, g: g * c, once_differentiable=True
    ),
}
every_rule = pytest.mark.parametrize("make", RULES.values(), ids=RULES)


@every_rule
def test_first_order_works(make):
    x = X.clone().requires_grad_()
    assert_close(gradients(make()(x), x), (X.cos(),))
    assert_close(torch.func.grad(lambda x: make()(x).sum())(X), X.cos())
    out, pull_back = torch.func.vjp(make(), X)
    assert_close((out, *pull_back(torch.ones(2))), (X.sin(), X.cos()))


def jvp(function):
    return lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1]


ORDERS_TWO = {
    "backward twice": lambda f: twice_backward(f, X),
    "grad of grad": lambda f: derivative(derivative(f))(X),
    "jvp of grad": lambda f: jvp(derivative(f))(X),
    "grad of jvp": lambda f: derivative(jvp(f))(X),
    "jvp of jvp": lambda f: jvp(jvp(f))(X),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum())(X),
    "backward of grad": lambda f: twice_backward(derivative(f), X) * 0,
    "vmap of hessian": lambda f: torch.func.vmap(torch.func.hessian(f))(X),
}
every_order_two = pytest.mark.parametrize("second", ORDERS_TWO.values(), ids=ORDERS_TWO)


@every_rule
@every_order_two
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_second_order_is_refused_or_right(make, second):
    """Code that vmap cannot enter raises torch's own error: no number comes back."""
    refused = (gt.TransformError, RuntimeError, TypeError)
    with pytest.raises(
        refused, match=r"cannot be d|once_d|opaque object|data pointer|vmap|0-d"
    ):
        second(make())


@pytest.mark.parametrize(
    "second", list(ORDERS_TWO.values())[:6], ids=list(ORDERS_TWO)[:6]
)
@pytest.mark.parametrize("make", [RULES["bwd: numpy"], RULES["fwd: a float"]])
def test_the_refusal_names_rule_function_and_ways_out(make, second):
    with pytest.raises(gt.TransformError, match="sin: ") as caught:
        second(make())
    assert caught.value.rule.startswith("sin")
    assert __file__ in caught.value.function
    assert "def_jvp" in caught.value.fix or "once_differentiable" in caught.value.fix


FORWARD = [
    name
    for name in RULES
    if name in {"bwd: numpy", "bwd: tolist", "bwd: detached cotangent", "bwd: no_grad"}
]


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_cannot_be_derived_from_what_hides_the_cotangent(name):
    with pytest.raises(gt.TransformError, match="opaque in its cotangent"):
        jvp(RULES[name]())(X)


@pytest.mark.parametrize("name", [n for n in RULES if n not in FORWARD])
def test_forward_mode_of_the_others_is_right_or_refused(name):
    if name in {f"fwd: {k}" for k in OPAQUE_OBJECTS}:
        with pytest.raises(gt.TransformError, match="inside an opaque object"):
            jvp(RULES[name]())(X)
    else:
        assert_close(jvp(RULES[name]())(X), X.cos())


def test_a_part_of_the_cotangent_that_is_hidden_is_a_part_too_much(unchecked):
    half = sine(lambda x: (x.sin(), x), lambda x, g: (g + g.detach()) / 2 * x.cos())
    with pytest.raises(gt.TransformError, match="opaque in its cotangent"):
        jvp(half)(X)


@every_rule
def test_a_second_derivative_is_refused_after_a_first_use_at_zero_too(make):
    """Zero does not move when it is scaled, and tells nothing about dependence."""
    rule, zeros = make(), torch.zeros(2)
    for x in (zeros, X):
        with pytest.raises(gt.TransformError, match="sin: "):
            derivative(derivative(rule))(x)


def test_zero_cotangents_and_unused_derivatives_pass():
    rule = RULES["bwd: numpy"]()
    x = X.clone().requires_grad_()
    (first,) = gradients(rule(x), x, create_graph=True)
    assert_close(first, X.cos())
    assert_close(gradients(first * 0, x, retain_graph=True), (torch.zeros(2),))
    with pytest.raises(gt.TransformError, match="bwd cannot be differentiated"):
        gradients(first, x)


def test_piecewise_constant_code_is_no_opaque_code():
    """A mask and an integer do not move with the input: their derivative is zero."""

    def fwd(x):
        return x.relu(), ((x > 0).to(x.dtype), int(x.shape[0]), "text", float(2))

    rule = stated(torch.relu, fwd, lambda r, g: g * r[0] * r[3] / r[1])
    assert_close(derivative(derivative(rule))(X), torch.zeros(2))
    assert_close(twice_backward(lambda x: rule(x) ** 2, X), torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize(
    ("residual", "bwd"), OPAQUE_OBJECTS.values(), ids=OPAQUE_OBJECTS
)
@pytest.mark.parametrize("mode", ["auto", "sequential", "expand_dims", "broadcast_all"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.vmap(derivative(f)),
        lambda f: derivative(torch.func.vmap(f)),
        lambda f: torch.func.jacrev(lambda x: x.flip(0) * torch.func.vmap(f)(x)),
    ],
)
def test_vmap_refuses_tensors_inside_opaque_objects(residual, bwd, mode, transform):
    """bwd may run under other levels than fwd did; a hidden batch would be mixed up."""
    rule = sine(lambda x: (x.sin(), residual(x)), bwd, vmap=mode)
    with pytest.raises(
        gt.TransformError, match=r"inside an opaque object|differ between"
    ):
        transform(rule)(X)


@pytest.mark.parametrize("name", OPAQUE_OBJECTS)
def test_a_batch_of_cotangents_is_right(name):
    pull_back = torch.func.vjp(RULES[f"fwd: {name}"](), X)[1]
    assert_close(
        torch.func.vmap(pull_back)(torch.eye(2, dtype=X.dtype))[0], X.cos().diag()
    )
