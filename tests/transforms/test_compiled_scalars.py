"""A Python number that a rule reads past its arguments, changed between two calls.

A traced rule would keep the old number without a sign; Dynamo guards on it instead.
"""

import dataclasses

import pytest
import torch

import gradtools as gt

GLOBAL = 2.0


class Settings:
    factor = 2.0


@gt.custom_vjp
def scaled_by_global(x):
    return GLOBAL * torch.sin(x)


@scaled_by_global.def_bwd
def _(residuals, g):
    ((x,), _) = residuals
    return g * 10 * GLOBAL * torch.cos(x)


class Layer:
    def __init__(self):
        self.factor = 2.0

    @gt.custom_vjp
    def scaled(self, x):
        return self.factor * torch.sin(x)

    @scaled.def_bwd
    def _(self, residuals, g):
        _, x = residuals[0]
        return g * 10 * self.factor * torch.cos(x)


@dataclasses.dataclass
class Held:
    """A rule that reads a number, and how to change the number."""

    rule: object
    change: object


def in_global():
    def change(value):
        global GLOBAL
        GLOBAL = value

    return Held(scaled_by_global, change)


def in_attribute_of_self():
    layer = Layer()
    return Held(layer.scaled, lambda value: setattr(layer, "factor", value))


def in_closure():
    factor = 2.0

    @gt.custom_vjp
    def scaled(x):
        return factor * torch.sin(x)

    @scaled.def_fwd
    def _(x):
        return factor * torch.sin(x), (x, factor)

    @scaled.def_bwd
    def _(residuals, g):
        x, k = residuals
        return g * 10 * k * torch.cos(x)

    def change(value):
        nonlocal factor
        factor = value

    return Held(scaled, change)


def in_object():
    settings = Settings()

    @gt.custom_vjp
    def scaled(x):
        return settings.factor * torch.sin(x)

    @scaled.def_bwd
    def _(residuals, g):
        ((x,), _) = residuals
        return g * 10 * settings.factor * torch.cos(x)

    return Held(scaled, lambda value: setattr(settings, "factor", value))


def in_dictionary():
    settings = {"factor": 2.0}

    @gt.custom_vjp
    def scaled(x):
        return settings["factor"] * torch.sin(x)

    @scaled.def_bwd
    def _(residuals, g):
        ((x,), _) = residuals
        return g * 10 * settings["factor"] * torch.cos(x)

    return Held(scaled, lambda value: settings.update(factor=value))


def in_argument():
    @gt.custom_vjp
    def scaled(x, factor):
        return factor * torch.sin(x)

    @scaled.def_bwd
    def _(residuals, g):
        ((x, factor), _) = residuals
        return g * 10 * factor * torch.cos(x), None

    factor = 2.0

    def change(value):
        nonlocal factor
        factor = value

    return Held(lambda x: scaled(x, factor), change)


PLACES = [
    in_global,
    in_attribute_of_self,
    in_closure,
    in_object,
    in_dictionary,
    in_argument,
]


def by_backward(f, x):
    (grad,) = torch.autograd.grad(f(x).sum(), x)
    return grad


def by_func_grad(f, x):
    return torch.func.grad(lambda x: f(x).sum())(x)


def by_jvp(f, x):
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("derivative", [by_backward, by_func_grad, by_jvp])
@pytest.mark.parametrize("values", [(2.0, 3.0, 2.5), (2, 3, 4)], ids=["float", "int"])
@pytest.mark.parametrize("place", PLACES)
def test_a_changed_number_is_seen(place, values, derivative):
    held = place()
    x = torch.randn(3)
    if derivative is by_backward:
        x.requires_grad_()
        step = torch.compile(held.rule, fullgraph=True, backend="aot_eager")
        run = lambda x: by_backward(step, x)
    else:
        run = torch.compile(
            lambda x: derivative(held.rule, x), fullgraph=True, backend="aot_eager"
        )
    with gt.gradcheck_policy("off"):
        for value in values:
            held.change(value)
            torch.testing.assert_close(run(x), 10 * value * torch.cos(x))
