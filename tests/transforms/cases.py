"""One table of rules, each with a reference that does not use gradtools.

Most rules here are *markers*: their derivative is deliberately not that of the
function, but ten times it, say. A transform that dropped the rule and differentiated
the function would be off by that factor; only a marker can show it.

A reference is native torch whose value is the function's and whose derivatives, of
every order, are the rule's. Where the rule's derivative is that of some function ``h``,
this is :func:`marked`. Where the rule saves its output y and returns ``10 * phi(y) *
g`` for a function with f' = phi(f), the rule applies again at each order, and the
reference is f(10 x - 9 stop(x)).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

import gradtools as gt

M = 10.0


def marked(value, h):
    """Return a tensor with this value and the derivatives of ``h``."""
    return value.detach() + h - h.detach()


@dataclasses.dataclass(frozen=True)
class Case:
    """A rule, its reference and inputs for both.

    Attributes:
        name: What is special about the rule.
        rule: From differentiable real tensors to one flat real tensor, by gradtools.
        reference: The same, by native torch.
        inputs: Returns the tensors.
    """

    name: str
    rule: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    inputs: Callable[[], tuple[torch.Tensor, ...]]

    def __str__(self) -> str:
        return self.name


def flat(*outputs):
    """Return real and complex tensors as one flat real tensor."""
    parts = [torch.view_as_real(o) if o.is_complex() else o for o in outputs]
    return torch.cat([part.reshape(-1) for part in parts])


def numbers(*shape, seed=0):
    """Return numbers between -1 and 1, away from zero."""
    count = torch.Size(shape).numel()
    values = torch.sin(1.7 * torch.arange(1, count + 1) + seed)
    return (values + 0.1 * values.sign()).reshape(shape)


# Computed residual.


@gt.custom_vjp
def swish(x, beta):
    return x * torch.sigmoid(beta * x)


@swish.def_fwd
def _(x, beta):
    s = torch.sigmoid(beta * x)
    return x * s, (x, beta, s)


@swish.def_bwd
def _(residuals, g):
    x, beta, s = residuals
    ds = s * (1 - s)
    return M * g * (s + x * beta * ds), M * (g * x * x * ds).sum()


def swish_reference(x, beta):
    y = x * torch.sigmoid(beta * x)
    return marked(y, M * y)


# The residual is an input; the derivative is that of another function altogether.


@gt.custom_vjp
def cube(x):
    return x**3


cube.defvjp(lambda x: (x**3, x), lambda x, g: g * torch.cos(x))


# The residual is the output.


@gt.custom_vjp
def exponential(x):
    return x.exp()


@exponential.def_fwd
def _(x):
    y = x.exp()
    return y, (y,)


@exponential.def_bwd
def _(residuals, g):
    (y,) = residuals
    return (M * g * y,)


# Residuals repeat.


@gt.custom_vjp
def tanh(x):
    return x.tanh()


@tanh.def_fwd
def _(x):
    y = x.tanh()
    return y, {"again": [y, x, y], "and": (x, y)}


@tanh.def_bwd
def _(residuals, g):
    first, _, again = residuals["again"]
    _, y = residuals["and"]
    return M * g * (1 - first * (again + y) / 2)


# Residuals of any kind; an integer argument and a callable one.


class Scaler:
    def __init__(self, factor):
        self.factor = factor


half = Scaler(0.5)


@gt.custom_vjp
def power(x, n, scaler, activation=torch.sin):
    return scaler.factor * activation(x**n)


@power.def_fwd
def _(x, n, scaler, activation=torch.sin):
    return scaler.factor * activation(x**n), (x, n, scaler, "a text", torch.cos, None)


@power.def_bwd
def _(residuals, g):
    x, n, scaler, text, slope, nothing = residuals
    assert text == "a text"
    assert nothing is None
    return M * g * scaler.factor * slope(x**n) * n * x ** (n - 1), None, None, None


# Several outputs, one of them integer and one unused.


@gt.custom_vjp
def sorted_and_sum(x, w):
    values, indices = x.sort()
    return values, indices, (x * w).sum(), {"unused": x * w}


@sorted_and_sum.def_fwd
def _(x, w):
    values, indices = x.sort()
    return (values, indices, (x * w).sum(), {"unused": x * w}), (x, w, indices)


@sorted_and_sum.def_bwd
def _(residuals, g):
    x, w, indices = residuals
    g_values, g_indices, g_sum, g_rest = g
    assert g_indices is None
    total = g_sum + g_rest["unused"]
    gx = M * torch.zeros_like(x).scatter(0, indices, g_values) + M * total * w
    return gx, M * total * x


def sorted_reference(x, w):
    y, total = x.sort().values, (x * w).sum()
    return flat(marked(y, M * y), marked(total, M * total))


# Pytrees in, out and between; a registered dataclass and a namedtuple.


@dataclasses.dataclass
class Params:
    w: Any
    b: Any


pytree.register_dataclass(Params)


class Saved(NamedTuple):
    x: torch.Tensor
    rest: dict


@gt.custom_vjp
def affine(params, inputs):
    return {"y": torch.sin(params.w * inputs["x"][0] + params.b)}


@affine.def_fwd
def _(params, inputs):
    x = inputs["x"][0]
    z = params.w * x + params.b
    return {"y": torch.sin(z)}, Saved(x, {"w": params.w, "z": z})


@affine.def_bwd
def _(residuals, g):
    gz = M * g["y"] * torch.cos(residuals.rest["z"])
    gw = gz * residuals.x
    return Params(gw, gz), {"x": (gz * residuals.rest["w"],), "scale": None}


def affine_reference(w, x, b):
    y = torch.sin(w * x + b)
    return marked(y, M * y)


# Keyword-only parameters, defaults, cotangents as a dict by name.


@gt.custom_vjp
def scaled(x, /, scale=2.0, *rest, shift, mode="plus", **extra):
    return scale * torch.exp(x) + shift**2 + rest[0] * extra["last"]


@scaled.def_fwd
def _(x, /, scale=2.0, *rest, shift, mode="plus", **extra):
    out = scale * torch.exp(x) + shift**2 + rest[0] * extra["last"]
    return out, (x, scale, shift, rest[0], extra["last"])


@scaled.def_bwd
def _(residuals, g):
    x, scale, shift, other, last = residuals
    return {
        "x": M * g * scale * torch.exp(x),
        "shift": M * g * 2 * shift,
        "rest": (M * g * last,),
        "extra": {"last": M * g * other},
    }


def scaled_reference(x, shift, other, last):
    y = 3.0 * torch.exp(x) + shift**2 + other * last
    return marked(y, M * y)


# Broadcasting.


@gt.custom_vjp
def outer_sum(x, b):
    return x * x * b


@outer_sum.def_fwd
def _(x, b):
    return x * x * b, (x, b)


@outer_sum.def_bwd
def _(residuals, g):
    x, b = residuals
    return M * g * 2 * x * b, M * (g * x * x).sum(0)


def outer_sum_reference(x, b):
    y = x * x * b
    return flat(marked(y, M * y))


# Complex numbers.


@gt.custom_vjp
def complex_product(z, w):
    return z * z * w.conj()


@complex_product.def_fwd
def _(z, w):
    return z * z * w.conj(), (z, w)


@complex_product.def_bwd
def _(residuals, g):
    z, w = residuals
    return M * g * (2 * z).conj() * w, M * g.conj() * z * z


def complex_reference(a, b):
    y = (a + 1j * b) ** 2 * (b - 2j * a)
    return flat(marked(y, M * y))


# A method.


class Oscillator:
    def __init__(self, frequency):
        self.frequency = frequency

    @gt.custom_vjp
    def wave(self, x, amplitude):
        return amplitude * torch.sin(self.frequency * x)

    @wave.def_fwd
    def _(self, x, amplitude):
        return amplitude * torch.sin(self.frequency * x), (x, amplitude)

    @wave.def_bwd
    def _(self, residuals, g):
        x, amplitude = residuals
        k = self.frequency
        return M * g * amplitude * k * torch.cos(k * x), M * g * torch.sin(k * x)


oscillator = Oscillator(1.5)


def wave_reference(x, amplitude):
    y = amplitude * torch.sin(1.5 * x)
    return marked(y, M * y)


# needs, in fwd and bwd.


@gt.custom_vjp
def linear(x, weight, bias=None):
    return x @ weight.T if bias is None else x @ weight.T + bias


@linear.def_fwd
def _(x, weight, bias=None, *, needs):
    keep_x, keep_weight = needs[1], needs[0]
    out = x @ weight.T if bias is None else x @ weight.T + bias
    return out, (x if keep_x else None, weight if keep_weight else None, bias is None)


@linear.def_bwd
def _(residuals, g, *, needs):
    x, weight, no_bias = residuals
    return (
        M * g @ weight if needs[0] else None,
        M * torch.outer(g, x) if needs[1] else None,
        None if no_bias or not needs[2] else M * g,
    )


def linear_reference(x, weight, bias):
    y = x @ weight.T + bias
    return marked(y, M * y)


# No fwd: residuals are ((arg, ...), output).


@gt.custom_vjp
def softplus(x, k):
    return torch.log1p(torch.exp(k * x)) / k


@softplus.def_bwd
def _(residuals, g):
    (x, k), _ = residuals
    return (M * g * torch.sigmoid(k * x), None)


def softplus_reference(x):
    y = torch.log1p(torch.exp(2.0 * x)) / 2.0
    return marked(y, M * y)


# Outputs that are the input, again the input, and a view of it; a view as a residual.


@gt.custom_vjp
def handed_through(x):
    return x, x[1:], x


@handed_through.def_fwd
def _(x):
    return (x, x[1:], x), (x, x[1:])


@handed_through.def_bwd
def _(residuals, g):
    x, tail = residuals
    g_first, g_tail, g_last = g
    return (g_first * x + torch.nn.functional.pad(g_tail * tail, (1, 0)) + M * g_last,)


def handed_through_reference(x):
    tail = x[1:]
    return flat(marked(x, x * x / 2), marked(tail, tail * tail / 2), marked(x, M * x))


# Forward rules.


@gt.custom_jvp
def sine(x, k):
    return torch.sin(k * x)


@sine.defjvp
def _(primals, tangents):
    x, k = primals
    tx, tk = tangents
    return torch.sin(k * x), M * torch.cos(k * x) * (k * tx + x * tk)


def sine_reference(x, k):
    y = torch.sin(k * x)
    return marked(y, M * y)


@gt.custom_vjp
def both_ways(x):
    return torch.sin(x)


both_ways.defvjp(lambda x: (torch.sin(x), x), lambda x, g: M * g * torch.cos(x))


@both_ways.def_jvp
def _(primals, tangents):
    (x,), (t,) = primals, tangents
    return torch.sin(x), M * t * torch.cos(x)


# A rule that calls another one, and keeps what it returned.


@gt.custom_vjp
def caller(x):
    return 2 * cube(x)


@caller.def_fwd
def _(x):
    y = cube(x)
    return 2 * y, y


@caller.def_bwd
def _(y, g):
    return (g * y,)


def caller_reference(x):
    # The first derivative is y = x^3, whose own derivatives are those of cube's rule.
    here = x.detach()
    return marked(2 * x**3, (here**3 - here.sin()) * x - x.cos())


# Vectorized by other means than torch's vmap.


def product_rule(mode):
    @gt.custom_vjp(vmap=mode)
    def product(x, w):
        return (x * w).sum(-1, keepdim=True) * x

    @product.def_fwd
    def _(x, w):
        s = (x * w).sum(-1, keepdim=True)
        return s * x, (x, w, s)

    @product.def_bwd
    def _(residuals, g):
        x, w, s = residuals
        inner = (g * x).sum(-1, keepdim=True)
        return M * (g * s + inner * w), M * inner * x

    return product


def product_reference(x, w):
    y = (x * w).sum() * x
    return marked(y, M * y)


def _v(count=4, seed=0):
    return numbers(count, seed=seed)


CASES = [
    Case(
        "computed residual",
        swish,
        swish_reference,
        lambda: (_v(), torch.tensor(1.3)),
    ),
    Case(
        "input residual",
        cube,
        lambda x: marked(x**3, x.sin()),
        lambda: (_v(),),
    ),
    Case(
        "output residual",
        exponential,
        lambda x: torch.exp(M * x - (M - 1) * x.detach()),
        lambda: (_v(),),
    ),
    Case(
        "repeated residuals",
        tanh,
        lambda x: torch.tanh(M * x - (M - 1) * x.detach()),
        lambda: (_v(),),
    ),
    Case(
        "objects as arguments and residuals",
        lambda x: power(x, 3, half),
        lambda x: marked(0.5 * torch.sin(x**3), M * 0.5 * torch.sin(x**3)),
        lambda: (_v(),),
    ),
    Case(
        "several outputs",
        lambda x, w: flat(*(sorted_and_sum(x, w)[i] for i in (0, 2))),
        sorted_reference,
        lambda: (_v(), _v(seed=1)),
    ),
    Case(
        "pytrees",
        lambda w, x, b: affine(Params(w, b), {"x": (x,), "scale": 7})["y"],
        affine_reference,
        lambda: (_v(), _v(seed=1), _v(seed=2)),
    ),
    Case(
        "keywords and defaults",
        lambda x, s, o, e: scaled(x, 3.0, o, shift=s, last=e),
        scaled_reference,
        lambda: (_v(), _v(seed=1), _v(seed=2), _v(seed=3)),
    ),
    Case(
        "broadcasting",
        lambda x, b: flat(outer_sum(x, b)),
        outer_sum_reference,
        lambda: (numbers(2, 3), numbers(3, seed=1)),
    ),
    Case(
        "complex",
        lambda a, b: flat(
            complex_product(torch.complex(a, b), torch.complex(b, a * 2))
        ),
        complex_reference,
        lambda: (_v(3), _v(3, seed=1)),
    ),
    Case(
        "method",
        oscillator.wave,
        wave_reference,
        lambda: (_v(), _v(seed=1)),
    ),
    Case(
        "needs",
        linear,
        linear_reference,
        lambda: (_v(3), numbers(2, 3, seed=1), _v(2, seed=2)),
    ),
    Case("no fwd", lambda x: softplus(x, 2.0), softplus_reference, lambda: (_v(),)),
    Case(
        "outputs that are inputs",
        lambda x: flat(*handed_through(x)),
        handed_through_reference,
        lambda: (_v(),),
    ),
    Case("a rule in a rule", caller, caller_reference, lambda: (_v(),)),
    *(
        Case(
            f"vmap={mode}",
            product_rule(mode),
            product_reference,
            lambda: (_v(3), _v(3, seed=1)),
        )
        for mode in ("sequential", "expand_dims", "broadcast_all")
    ),
    Case(
        "custom_jvp",
        sine,
        sine_reference,
        lambda: (_v(), torch.tensor(0.7)),
    ),
    Case(
        "bwd and jvp",
        both_ways,
        lambda x: marked(torch.sin(x), M * torch.sin(x)),
        lambda: (_v(),),
    ),
]
