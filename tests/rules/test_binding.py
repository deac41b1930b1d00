"""Arguments reach fwd and bwd as Python binds them."""

import functools

import pytest
import torch
from torch.testing import assert_close

from tests.rules.stating import gradients, leaf, stated

A, B, C, D = (torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.7, 1.1, 1.9))


def formula(a, /, b=B, *rest, c, d=2.0, **extra):
    return (a * b**2 + sum(rest) * c + d * sum(extra.values())).sin()


def entries_of(function):
    """Return a rule of ``function`` that shows what it was called with."""
    return stated(function, bwd=lambda residuals, g: seen.append(residuals[0]) or {})


seen = []


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((A,), {"c": C}, (A, B, C, 2.0, {})),
        ((A, D), {"c": C, "d": 3}, (A, D, C, 3, {})),
        ((A,), {"b": D, "c": C}, (A, D, C, 2.0, {})),
        ((A, D, 4.0, B), {"c": C}, (A, D, 4.0, B, C, 2.0, {})),
        ((A,), {"c": C, "u": D, "v": 5}, (A, B, C, 2.0, {"u": D, "v": 5})),
        ((A,), {"c": C, "a": D}, (A, B, C, 2.0, {"a": D})),
    ],
)
def test_default_residuals_hold_one_entry_per_parameter(
    unchecked, args, kwargs, expected
):
    args = (args[0].clone().requires_grad_(), *args[1:])
    seen.clear()
    out = entries_of(formula)(*args, **kwargs)
    assert_close(out, formula(*args, **kwargs))
    out.backward()
    assert_close(seen[0], expected)


CALLS = {
    "positional": lambda f, a, b, c, d: f(a, b, c=c, d=d),
    "by name": lambda f, a, b, c, d: f(a, d=d, c=c, b=b),
    "default": lambda f, a, b, c, d: f(a, c=c, u=b, v=d),
    "variadic": lambda f, a, b, c, d: f(a, b, d, c, a, c=c),
    "repeated": lambda f, a, b, c, d: f(a, a, b, c=a, d=d, e=d),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_gradients_find_their_argument_however_it_was_passed(call):
    def bwd(residuals, g):
        (entries, _) = residuals
        a, b, *rest, c, d, extra = entries
        inner = a * b**2 + sum(rest) * c + d * sum(extra.values())
        g = g * inner.cos()
        floats = {key: v for key, v in extra.items() if isinstance(v, torch.Tensor)}
        return {
            "a": g * b**2,
            "b": g * 2 * a * b,
            "rest": tuple(g * c for _ in rest),
            "c": g * torch.as_tensor(sum(rest)),
            "d": g * sum(extra.values()) if isinstance(d, torch.Tensor) else None,
            "extra": {key: g * d if key in floats else None for key in extra},
        }

    values = [t.clone().requires_grad_() for t in (A, B, C, D)]
    actual = gradients(call(stated(formula, bwd=bwd), *values), *values)
    assert_close(actual, gradients(call(formula, *values), *values))


@pytest.mark.parametrize("grad_enabled", [True, False])
@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {"c": 1}, "missing"),
        ((A,), {}, "missing.*'c'"),
        ((), {"a": A, "c": 1}, "'a'"),
    ],
)
def test_a_call_that_python_refuses_is_refused_alike(
    args, kwargs, message, grad_enabled
):
    with torch.set_grad_enabled(grad_enabled), pytest.raises(TypeError, match=message):
        entries_of(formula)(*args, **kwargs)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((A, B, C), {}, r"simple\(\) too many positional arguments"),
        ((A,), {"z": 1}, r"simple\(\) got an unexpected keyword argument 'z'"),
        ((A, B), {"x": 1}, r"simple\(\) multiple values for argument 'x'"),
        ((), {}, r"simple\(\) missing a required argument: 'x'"),
    ],
)
def test_an_error_of_binding_names_the_function(args, kwargs, message):
    def simple(x, y=1):
        return x

    with pytest.raises(TypeError, match=message):
        entries_of(simple)(*args, **kwargs)


def test_a_tensor_that_is_a_default_gets_its_gradient(unchecked):
    weight = leaf(3.0)

    def fun(x, w=weight):
        return x * w

    rule = stated(fun, lambda x, w: (x * w, x), lambda x, g: (None, 10 * g * x))
    assert_close(gradients(rule(torch.tensor([2.0])), weight), (torch.tensor([20.0]),))


def test_fwd_may_state_defaults_of_its_own_and_gets_those_of_the_function(unchecked):
    def fun(x, k=2.0):
        return k * x

    rule = stated(fun, lambda x, k=5.0: (k * x, k), lambda k, g: (10 * g * k, None))
    x = leaf(1.0)
    assert_close(gradients(rule(x), x), (torch.tensor([20.0]),))


def test_a_partial_is_a_function_with_the_rest_of_the_parameters(unchecked):
    def fun(x, w, k):
        return k * x * w

    rule = stated(
        functools.partial(fun, k=3.0),
        lambda x, w, *, k: (k * x * w, (x, w, k)),
        lambda r, g: {"x": 10 * g * r[1] * r[2], "w": 10 * g * r[0] * r[2]},
    )
    x, w = leaf(2.0), leaf(5.0)
    expected = (torch.tensor([150.0]), torch.tensor([60.0]))
    assert_close(gradients(rule(x, w), x, w), expected)
    assert_close(gradients(rule(x, w, k=1.0), x, w), tuple(e / 3 for e in expected))


def test_a_builtin_takes_positional_arguments(unchecked):
    rule = stated(torch.mul, lambda x, y: (x * y, (x, y)), lambda r, g: (g * r[0], g))
    x, y = leaf(2.0), leaf(5.0)
    assert_close(gradients(rule(x, y), x, y), (x.detach(), torch.ones(1)))
