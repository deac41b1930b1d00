"""A Python number that a rule reads past its arguments, changed between two calls.

A traced rule would keep the old number without a sign; Dynamo guards on it instead.
"""

import dataclasses
import logging
import operator
import random

import numpy as np
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


def in_a_rule_that_bwd_calls():
    factor = 2.0

    @gt.custom_vjp
    def inner(x):
        return factor * x

    inner.def_bwd(lambda residuals, g: (factor * g,))

    @gt.custom_vjp
    def outer(x):
        return torch.sin(x)

    @outer.def_bwd
    def _(residuals, g):
        ((x,), _) = residuals
        return 10 * inner(g * torch.cos(x))

    def change(value):
        nonlocal factor
        factor = value

    return Held(outer, change)


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
    in_a_rule_that_bwd_calls,
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


def test_what_the_rule_and_the_compiled_function_both_name():
    """One cell for both: Dynamo does not read it as an attribute of the other."""
    factor = 2.0

    @gt.custom_vjp
    def scaled(x):
        return factor * x

    scaled.def_bwd(lambda residuals, g: (5 * scaled(g),))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x):
        return torch.func.grad(lambda x: factor * scaled(x).sum())(x)

    with gt.gradcheck_policy("off"):
        for factor in (2.0, 3.0, 2.5):
            torch.testing.assert_close(
                step(torch.ones(2)), 5 * factor**2 * torch.ones(2)
            )


class NotReady:
    """Like a library that looks its functions up, or a lazy attribute."""

    def __getattr__(self, name):
        raise RuntimeError(name)


class Holding:
    def __init__(self):
        self.factor = np.float64(2.0)


CLOSED = {
    "array": np.ones(2),
    "arrays in a list": [np.ones(2)],
    "array in an object": Holding(),
    "number of numpy's": np.float64(2.0),
    "dtype": np.dtype("f4"),
    "ufunc": np.sin,
    "function in C": operator.itemgetter(0),
    "slice": slice(1, 2),
    "logger": logging.getLogger("gradtools.tests"),
    "random numbers": random.Random(0),
    "raises": NotReady(),
}


@pytest.mark.parametrize("value", CLOSED.values(), ids=CLOSED.keys())
def test_what_dynamo_cannot_look_into_is_left_alone(value):
    @gt.custom_vjp
    def scaled(x):
        _ = value
        return 2 * x

    @scaled.def_bwd
    def _(residuals, g):
        if value is None:
            return value.factor
        return 10 * g

    step = torch.compile(
        lambda x: by_func_grad(scaled, x), fullgraph=True, backend="aot_eager"
    )
    with gt.gradcheck_policy("off"):
        torch.testing.assert_close(step(torch.ones(2)), 10 * torch.ones(2))


class Table:
    """An array and a number, which one rule reads."""

    def __init__(self):
        self.table = np.array([2.0, 3.0])
        self.factor = 1.0

    @gt.custom_vjp
    def scaled(self, x):
        return self.factor * torch.as_tensor(self.table) * x

    @scaled.def_bwd
    def _(self, residuals, g):
        return None, 10 * self.factor * torch.as_tensor(self.table) * g


def test_a_number_is_seen_beside_an_array():
    layer, x = Table(), torch.ones(2, dtype=torch.float64)
    step = torch.compile(
        lambda x: by_func_grad(layer.scaled, x), fullgraph=True, backend="aot_eager"
    )
    with gt.gradcheck_policy("off"):
        for layer.factor in (1.0, 2.0, 4.0):
            expected = 10 * layer.factor * torch.from_numpy(layer.table)
            torch.testing.assert_close(step(x), expected)
