"""A Python number that a rule reads past its arguments, changed between two calls.

A traced rule would keep the old number without a sign; Dynamo guards on it instead.
"""

import collections
import contextvars
import dataclasses
import datetime
import itertools
import logging
import math
import operator
import pathlib
import random
import sys
import threading
import types

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


def scaled_by(read):
    """Return a rule whose functions ask for their factor."""

    @gt.custom_vjp
    def scaled(x):
        return read() * torch.sin(x)

    @scaled.def_bwd
    def _(residuals, g):
        ((x,), _) = residuals
        return g * 10 * read() * torch.cos(x)

    return scaled


class Schedule:
    factor = 2.0

    def now(self):
        return self.factor

    def __call__(self):
        return self.factor


class Constants:
    factor = 2.0


def in_class():
    def change(value):
        Constants.factor = value

    return Held(scaled_by(lambda: Constants.factor), change)


def deep_in_objects():
    settings = types.SimpleNamespace(a=types.SimpleNamespace(b=[{"c": Settings()}]))
    inner = settings.a.b[0]["c"]
    return Held(
        scaled_by(lambda: settings.a.b[0]["c"].factor),
        lambda value: setattr(inner, "factor", value),
    )


def by_name():
    settings = Settings()
    return Held(
        scaled_by(lambda: getattr(settings, "unset", 2)),
        lambda value: setattr(settings, "unset", value),
    )


def in_what_a_method_reads():
    schedule = Schedule()
    return Held(
        scaled_by(lambda: 1 * schedule.now()),
        lambda value: setattr(schedule, "factor", value),
    )


def in_what_a_callable_reads():
    schedule = Schedule()
    return Held(scaled_by(schedule), lambda value: setattr(schedule, "factor", value))


def in_a_module_within_a_module():
    class Scale(torch.nn.Module):
        factor = 2.0

        def forward(self, x):
            return self.factor * x

    module = torch.nn.Sequential(torch.nn.Identity(), Scale())
    return Held(
        scaled_by(lambda: module(1)), lambda value: setattr(module[1], "factor", value)
    )


def in_a_set():
    settings = set()

    def change(value):
        settings.clear()
        settings.add(value)

    return Held(scaled_by(lambda: sum(settings)), change)


def in_a_queue():
    settings = collections.deque([2.0])
    change = lambda value: settings.__setitem__(0, value)
    return Held(scaled_by(lambda: settings[0]), change)


def in_another_rule():
    schedule = Schedule()
    inner = scaled_by(lambda: schedule.now() / 10)

    @gt.custom_vjp
    def outer(x):
        return inner(x)

    @outer.def_bwd
    def _(residuals, g):
        ((x,), _) = residuals
        return g * 100 * inner(x + math.pi / 2)

    return Held(outer, lambda value: setattr(schedule, "factor", value))


def in_a_method_of_an_argument():
    @gt.custom_vjp
    def scaled(x, schedule):
        return schedule.now() * torch.sin(x)

    @scaled.def_bwd
    def _(residuals, g):
        ((x, schedule), _) = residuals
        return g * 10 * schedule.now() * torch.cos(x), None

    schedule = Schedule()
    change = lambda value: setattr(schedule, "factor", value)
    return Held(lambda x: scaled(x, schedule), change)


def in_a_rule_that_calls_itself():
    factor = 2.0

    @gt.custom_vjp
    def scaled(x):
        return factor * torch.sin(x)

    @scaled.def_fwd
    def _(x):
        return scaled(x), (x,)

    @scaled.def_bwd
    def _(residuals, g):
        return g * 10 * factor * torch.cos(residuals[0])

    def change(value):
        nonlocal factor
        factor = value

    return Held(lambda x: 1 * scaled(x), change)  # it has the rule in a cell too


PLACES = [
    in_class,
    deep_in_objects,
    by_name,
    in_what_a_method_reads,
    in_what_a_callable_reads,
    in_a_module_within_a_module,
    in_a_set,
    in_a_queue,
    in_another_rule,
    in_a_method_of_an_argument,
    in_a_rule_that_calls_itself,
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


NUMBER = np.float32(2.0)
TENSOR = torch.tensor(2.0)


@pytest.mark.parametrize(
    ("read", "where", "got"),
    [
        (lambda: float(NUMBER), "global 'NUMBER'", "a numpy float32"),
        (lambda: TENSOR, "global 'TENSOR'", r"a tensor of shape \(\)"),
    ],
)
def test_what_cannot_be_guarded_is_an_error(read, where, got):
    rule = scaled_by(read)
    step = torch.compile(
        torch.func.grad(lambda x: rule(x).sum()), fullgraph=True, backend="aot_eager"
    )
    with (
        gt.gradcheck_policy("off"),
        pytest.raises(gt.TransformError, match="would not see a value") as caught,
    ):
        step(torch.randn(3))
    caught.match(where)
    caught.match(got)
    caught.match("Pass it as an argument")


def test_a_number_of_a_function_class_is_an_error():
    class Doubled(torch.autograd.Function):
        factor = 2.0

        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            return g * Doubled.factor

    rule = gt.lift(Doubled)
    step = torch.compile(
        torch.func.grad(lambda x: rule(x).sum()), fullgraph=True, backend="aot_eager"
    )
    with (
        gt.gradcheck_policy("off"),
        pytest.raises(gt.TransformError, match=r"Doubled\.factor"),
    ):
        step(torch.randn(3))


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


CLOSED = {
    "dtype": np.dtype("f4"),
    "ufunc": np.sin,
    "function in C": operator.itemgetter(0),
    "slice": slice(1, 2),
    "logger": logging.getLogger("gradtools.tests"),
    "random numbers": random.Random(0),
    "raises": NotReady(),
    "lock": threading.Lock(),
    "lock, reentrant": threading.RLock(),
    "date": datetime.date(2026, 1, 1),
    "path": pathlib.Path(),
    "counter": itertools.count(),
    "file": sys.stderr,
    "context": contextvars.ContextVar("context"),
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


@gt.external(out=torch.empty_like, contract=gt.Surrogate())
def kernel(x):
    return x * TENSOR * float(NUMBER)


kernel.def_bwd(lambda residuals, g: 10 * g)


def test_a_kernel_reads_what_it_wants_when_it_runs():
    step = torch.compile(
        torch.func.grad_and_value(lambda x: kernel(x).sum()),
        fullgraph=True,
        backend="aot_eager",
    )
    x = torch.ones(3)
    with gt.gradcheck_policy("off"):
        for value in (2.0, 3.0):
            TENSOR.fill_(value)
            found = step(x)
            torch.testing.assert_close(found, (10 * x, torch.tensor(6 * value)))
    TENSOR.fill_(2.0)
