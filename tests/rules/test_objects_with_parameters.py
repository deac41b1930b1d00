"""Modules and other objects, arguments or self, that hold tensors with a gradient."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients, leaf, stated

pytestmark = pytest.mark.usefixtures("unchecked")


class Scale(torch.nn.Module):
    """A module that holds its tensor in one of three ways."""

    def __init__(self, kind, requires_grad=True):
        super().__init__()
        w = torch.tensor([2.0])
        if kind == "parameter":
            self.w = torch.nn.Parameter(w, requires_grad=requires_grad)
        elif kind == "buffer":
            self.register_buffer("w", w.requires_grad_(requires_grad))
        else:
            self.w = w.requires_grad_(requires_grad)

    def forward(self, x):
        return x * self.w


class Caller:
    """A callable with a state, which is no module."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return self.module(x)


kinds = pytest.mark.parametrize("kind", ["parameter", "buffer", "attribute"])
wrappings = pytest.mark.parametrize(
    "wrapped",
    [
        lambda m: m,
        lambda m: torch.nn.Sequential(torch.nn.Identity(), m),
        lambda m: m.forward,
        lambda m: lambda x: 1 * m(x),
        lambda m: functools.partial(torch.nn.Module.__call__, m),
        Caller,
    ],
    ids=["module", "nested", "method", "closure", "partial", "callable"],
)

apply = stated(
    lambda x, f: f(x), lambda x, f: (f(x), f), lambda f, g: (10 * f(g), None)
)


@kinds
@wrappings
def test_an_argument_with_parameters_is_refused(wrapped, kind):
    with pytest.raises(gt.CapturedTensorError, match="an argument holds") as caught:
        apply(leaf(3.0), wrapped(Scale(kind)))
    (violation,) = caught.value.violations
    assert violation.where == "args.f"
    assert "w needs a gradient" in violation.got
    assert "functional_call" in caught.value.fix
    assert "closure_convert" in caught.value.fix


@kinds
@wrappings
def test_one_without_is_an_argument_like_any_other(wrapped, kind):
    x = leaf(3.0)
    frozen = wrapped(Scale(kind, requires_grad=False))
    assert_close(gradients(apply(x, frozen), x), (torch.tensor([20.0]),))


def test_no_gradient_wanted_means_no_refusal():
    module = Scale("parameter")
    with torch.no_grad():
        assert_close(apply(leaf(3.0), module), torch.tensor([6.0]))


def test_a_module_frozen_at_first_is_refused_once_it_is_not():
    x, module = leaf(3.0), Scale("parameter", requires_grad=False)
    apply(x, module)
    module.requires_grad_()
    with pytest.raises(gt.CapturedTensorError, match="an argument holds"):
        apply(x, module)


def test_under_grad_a_closure_over_what_is_differentiated_is_refused():
    def loss(w):
        return apply(3 * w, lambda x: x * w).sum()

    with pytest.raises(gt.CapturedTensorError, match="an argument holds"):
        torch.func.grad(loss)(torch.tensor([2.0]))


@pytest.mark.parametrize(
    "function", [torch.nn.Linear(1, 1).forward, torch.nn.Parameter(torch.ones(1)).mul]
)
def test_methods_of_torch_hold_what_they_are_bound_to(function):
    with pytest.raises(gt.CapturedTensorError, match="an argument holds"):
        apply(leaf(3.0), function)


# Objects that are not callable count by what the rule uses of them.

used = stated(
    lambda x, o: x * o.w, lambda x, o: (x * o.w, o), lambda o, g: (10 * g * o.w, None)
)
unused = stated(
    lambda x, o: 2 * x, lambda x, o: (2 * x, o), lambda o, g: (20 * g, None)
)


def test_an_object_whose_tensor_is_used_is_refused():
    box = SimpleNamespace(w=leaf(2.0), v=leaf(1.0))
    with pytest.raises(gt.CapturedTensorError, match="argument of type SimpleNames"):
        used(leaf(3.0), box)
    x = leaf(3.0)
    assert_close(gradients(unused(x, box), x), (torch.tensor([20.0]),))


def test_an_object_that_comes_to_hold_such_a_tensor_is_refused():
    x, box = leaf(3.0), SimpleNamespace(w=torch.tensor([2.0]))
    assert_close(gradients(used(x, box), x), (torch.tensor([20.0]),))
    box.w = leaf(2.0)
    with pytest.raises(gt.CapturedTensorError, match=r"SimpleNamespace: \.w"):
        used(x, box)


# self


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))
        self.bias = torch.nn.Parameter(torch.tensor([1.0]))
        self.register_buffer("shift", torch.tensor([5.0]))

    @gt.custom_vjp
    def right(self, x, weight):
        return x * weight + self.shift

    @right.def_fwd
    def _(self, x, weight):
        return x * weight + self.shift, (x, weight)

    @right.def_bwd
    def _(self, residuals, g):
        x, weight = residuals
        return 10 * g * weight, 10 * g * x

    @gt.custom_vjp
    def wrong(self, x):
        return x * self.weight

    @wrong.def_fwd
    def _(self, x):
        return x * self.weight, ()

    @wrong.def_bwd
    def _(self, _, g):
        return (g,)


def test_self_may_hold_parameters_that_are_passed_or_unused():
    layer, x = Layer(), leaf(3.0)
    for _ in range(2):
        out = layer.right(x, layer.weight)
        assert_close(out, torch.tensor([11.0]))
        expected = (torch.tensor([20.0]), torch.tensor([30.0]))
        assert_close(gradients(out, x, layer.weight), expected)


def test_a_parameter_of_self_that_is_used_is_refused():
    layer = Layer()
    with pytest.raises(gt.CapturedTensorError, match=r"of type Layer: \.weight"):
        layer.wrong(leaf(3.0))


def test_a_parameter_of_self_unfrozen_later_is_found():
    layer, x = Layer().requires_grad_(False), leaf(3.0)
    layer.wrong(x)
    layer.bias.requires_grad_()
    layer.wrong(x)
    layer.weight.requires_grad_()
    with pytest.raises(gt.CapturedTensorError, match=r"of type Layer: \.weight"):
        layer.wrong(x)
