"""Right rules: functions with a derivative by hand that is exactly theirs.

They are what the mutators spoil. Formulas are stated in plain torch, without gradtools,
and test_right_rules.py compares each with autograd, to second order. What rules save
varies on purpose: inputs, the output, intermediates, shapes, nothing.

A formula is called as ``formula(residuals, g, term)``; ``term(name, value)`` marks a
summand that can be left out by name, which is how a forgotten term is made.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.utils import _pytree as pytree

COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}


class Place(NamedTuple):
    """One differentiable tensor among the arguments: its path, its keys, a sample."""

    path: str
    keys: tuple[Any, ...]
    sample: torch.Tensor


class Dropped(NamedTuple):
    """A bwd without one term, and the argument whose cotangent lacks it."""

    path: str
    bwd: Callable[..., Any]


@dataclass(frozen=True)
class RightRule:
    """A function, its right derivative, arguments, and what a mutator may ask.

    Attributes:
        name: Of the rule.
        fun: The function, in plain torch.
        fwd: ``fwd(*args) -> (output, residuals)``.
        bwd: ``bwd(residuals, g)``, a tuple with one entry per argument.
        args: ``args(dtype, seed)``, the same values for every dtype.
        dropped: Variants of bwd without a term, by the name of the term.
        summed: Arguments that are broadcast, and the dimensions of the output over
            which their cotangents are summed.
        contracted: The same for the other sums, those of products of matrices.
        sizes: Other numbers of elements by which a mean differs from a sum.
    """

    name: str
    fun: Callable[..., Any]
    fwd: Callable[..., Any]
    bwd: Callable[..., Any]
    args: Callable[[torch.dtype, int], tuple[Any, ...]]
    dropped: Mapping[str, Dropped] = field(default_factory=dict)
    summed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    contracted: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    def places(self) -> list[Place]:
        """Return the differentiable tensors among the arguments."""
        args = self.args(torch.float64, 0)
        names = inspect.signature(self.fun).parameters
        found = []
        for index, (name, arg) in enumerate(zip(names, args, strict=True)):
            for path, leaf in pytree.tree_flatten_with_path(arg)[0]:
                if differentiable(leaf):
                    keys = (index, *(key.key for key in path))
                    where = f"args.{name}{pytree.keystr(path)}"
                    found.append(Place(where, keys, leaf))
        return found


def differentiable(leaf):
    return isinstance(leaf, torch.Tensor) and (
        leaf.is_floating_point() or leaf.is_complex()
    )


class Draw:
    """Random values from a seed, the same for every dtype."""

    def __init__(self, dtype, seed):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape):
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.dtype)

    def complex(self, *shape):
        parts = torch.complex(*torch.randn(
            (2, *shape), generator=self.generator, dtype=torch.float64
        ))  # fmt: skip
        return parts.to(COMPLEX[self.dtype])

    def integers(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator)


RULES: dict[str, RightRule] = {}


def _keep(name, value):
    return value


def _without(left_out):
    return lambda name, value: torch.zeros_like(value) if name == left_out else value


def _state(name, fun, fwd, formula, draw, terms=(), **facts):
    """Enter a rule into the table; ``terms`` are pairs of a term and its argument."""

    def with_terms(term):
        return lambda residuals, g: formula(residuals, g, term)

    RULES[name] = RightRule(
        name=name,
        fun=fun,
        fwd=fwd,
        bwd=with_terms(_keep),
        args=lambda dtype, seed: draw(Draw(dtype, seed)),
        dropped={
            left_out: Dropped(path, with_terms(_without(left_out)))
            for left_out, path in terms
        },
        **facts,
    )


# Elementwise, the residuals computed.


def swish(x, beta):
    return x * torch.sigmoid(beta * x)


def swish_fwd(x, beta):
    s = torch.sigmoid(beta * x)
    return x * s, (x, beta, s)


def swish_scalar_bwd(residuals, g, term):
    x, beta, s = residuals
    slope = s * (1 - s)
    dx = term("gate", s) + term("slope", x * beta * slope)
    return g * dx, (g * x * x * slope).sum()


def swish_channel_bwd(residuals, g, term):
    x, beta, s = residuals
    slope = s * (1 - s)
    dx = term("gate", s) + term("slope", x * beta * slope)
    return g * dx, (g * x * x * slope).sum(0)


_state(
    "swish_scalar",
    swish,
    swish_fwd,
    swish_scalar_bwd,
    lambda draw: (draw.normal(4, 5), draw.normal()),
    terms=[("gate", "args.x"), ("slope", "args.x")],
    summed={"args.beta": (0, 1)},
)
_state(
    "swish_channel",
    swish,
    swish_fwd,
    swish_channel_bwd,
    lambda draw: (draw.normal(4, 5), draw.normal(5)),
    terms=[("slope", "args.x")],
    summed={"args.beta": (0,)},
)

ROOT = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def gelu(x):
    return functional.gelu(x, approximate="tanh")


def gelu_fwd(x):
    t = torch.tanh(ROOT * (x + CUBIC * x**3))
    return 0.5 * x * (1 + t), (x, t)


def gelu_bwd(residuals, g, term):
    x, t = residuals
    inner = ROOT * (1 + term("cubic", 3 * CUBIC * x**2))
    return (g * (0.5 * (1 + t) + term("slope", 0.5 * x * (1 - t * t) * inner)),)


_state(
    "gelu_tanh",
    gelu,
    gelu_fwd,
    gelu_bwd,
    lambda draw: (draw.normal(5, 5),),
    terms=[("slope", "args.x"), ("cubic", "args.x")],
)


def softplus(x):
    return torch.logaddexp(x, torch.zeros_like(x))


_state(
    "softplus",
    softplus,
    lambda x: (x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())), (x,)),
    lambda residuals, g, term: (g * torch.sigmoid(residuals[0]),),
    lambda draw: (draw.normal(4, 6),),
)


def mish(x):
    return x * torch.tanh(softplus(x))


def mish_fwd(x):
    t = torch.tanh(softplus(x))
    return x * t, (x, t)


def mish_bwd(residuals, g, term):
    x, t = residuals
    return (g * (t + term("slope", x * (1 - t * t) * torch.sigmoid(x))),)


_state(
    "mish",
    mish,
    mish_fwd,
    mish_bwd,
    lambda draw: (draw.normal(5, 5),),
    terms=[("slope", "args.x")],
)


# Elementwise, the output saved.


def exponential(x):
    return torch.exp(x)


def exponential_fwd(x):
    y = torch.exp(x)
    return y, y


_state(
    "exponential",
    exponential,
    exponential_fwd,
    lambda y, g, term: (g * y,),
    lambda draw: (draw.normal(4, 6),),
)


def tanh(x):
    return torch.tanh(x)


def tanh_fwd(x):
    y = torch.tanh(x)
    return y, (y,)


_state(
    "tanh_4096",
    tanh,
    tanh_fwd,
    lambda residuals, g, term: (g * (1 - term("square", residuals[0] ** 2)),),
    lambda draw: (draw.normal(64, 64),),
    terms=[("square", "args.x")],
)


# Elementwise, of two arguments.


def angle(y, x):
    return torch.atan2(y, x)


def angle_bwd(residuals, g, term):
    y, x = residuals
    square = x * x + y * y
    return g * x / square, -g * y / square


_state(
    "angle",
    angle,
    lambda y, x: (torch.atan2(y, x), (y, x)),
    angle_bwd,
    lambda draw: (draw.normal(5, 5), draw.normal(5, 5)),
)


def scale_columns(x, b):
    return x * b


def scale_columns_bwd(residuals, g, term):
    x, b = residuals
    return g * b, (g * x).sum(0)


_state(
    "scale_columns",
    scale_columns,
    lambda x, b: (x * b, (x, b)),
    scale_columns_bwd,
    lambda draw: (draw.normal(4, 5), draw.normal(5)),
    summed={"args.b": (0,)},
)


def outer(x, y):
    return x[:, None] * y


def outer_bwd(residuals, g, term):
    x, y = residuals
    return g @ y, x @ g


_state(
    "outer",
    outer,
    lambda x, y: (x[:, None] * y, (x, y)),
    outer_bwd,
    lambda draw: (draw.normal(5), draw.normal(5)),
    summed={"args.x": (1,), "args.y": (0,)},
)


# Complex.


def complex_product(z, w):
    return z * w


def complex_product_bwd(residuals, g, term):
    z, w = residuals
    return g * w.conj(), g * z.conj()


_state(
    "complex_product",
    complex_product,
    lambda z, w: (z * w, (z, w)),
    complex_product_bwd,
    lambda draw: (draw.complex(4, 4), draw.complex(4, 4)),
)


def power(z, a):
    return a * (z.real**2 + z.imag**2)


def power_bwd(residuals, g, term):
    z, a = residuals
    return 2 * a * g * z, (g * (z.real**2 + z.imag**2)).sum(0)


_state(
    "complex_power",
    power,
    lambda z, a: (power(z, a), (z, a)),
    power_bwd,
    lambda draw: (draw.complex(4, 3), draw.normal(3)),
    summed={"args.a": (0,)},
)


# Products of matrices.


def matmul(a, b):
    return a @ b


def matmul_bwd(residuals, g, term):
    a, b = residuals
    return g @ b.mT, a.mT @ g


_state(
    "matmul",
    matmul,
    lambda a, b: (a @ b, (a, b)),
    matmul_bwd,
    lambda draw: (draw.normal(5, 5), draw.normal(5, 5)),
    contracted={"args.a": (1,), "args.b": (0,)},
)


def bmm(a, b):
    return torch.bmm(a, b)


_state(
    "bmm",
    bmm,
    lambda a, b: (torch.bmm(a, b), (a, b)),
    matmul_bwd,
    lambda draw: (draw.normal(3, 4, 4), draw.normal(3, 4, 4)),
    contracted={"args.a": (2,), "args.b": (1,)},
)


def linear(x, w, b):
    return functional.linear(x, w, b)


def linear_bwd(residuals, g, term):
    x, w = residuals
    return g @ w, g.mT @ x, g.sum(0)


_state(
    "linear",
    linear,
    lambda x, w, b: (functional.linear(x, w, b), (x, w)),
    linear_bwd,
    lambda draw: (draw.normal(5, 4), draw.normal(3, 4), draw.normal(3)),
    summed={"args.b": (0,)},
    contracted={"args.w": (0,), "args.x": (1,)},
)


def affine(params, x):
    return x @ params["w"] + params["b"]


def affine_bwd(residuals, g, term):
    w, x = residuals
    return {"w": x.mT @ g, "b": g.sum(0)}, g @ w.mT


_state(
    "affine_params",
    affine,
    lambda params, x: (affine(params, x), (params["w"], x)),
    affine_bwd,
    lambda draw: ({"w": draw.normal(4, 4), "b": draw.normal(4)}, draw.normal(5, 4)),
    summed={"args.params['b']": (0,)},
    contracted={"args.params['w']": (0,), "args.x": (1,)},
)


def contraction(a, b):
    return torch.einsum("bij,bjk->ik", a, b)


def contraction_bwd(residuals, g, term):
    return (
        torch.einsum("ik,bjk->bij", g, residuals["b"]),
        torch.einsum("ik,bij->bjk", g, residuals["a"]),
    )


_state(
    "einsum",
    contraction,
    lambda a, b: (contraction(a, b), {"a": a, "b": b}),
    contraction_bwd,
    lambda draw: (draw.normal(3, 4, 4), draw.normal(3, 4, 4)),
    contracted={"args.a": (1,), "args.b": (0,)},
)


def quadratic_form(x, a):
    return x @ a @ x


def quadratic_form_fwd(x, a):
    ax = a @ x
    return x @ ax, (x, a, ax)


def quadratic_form_bwd(residuals, g, term):
    x, a, ax = residuals
    dx = term("straight", ax) + term("transposed", x @ a)
    return g * dx, g * torch.outer(x, x)


_state(
    "quadratic_form",
    quadratic_form,
    quadratic_form_fwd,
    quadratic_form_bwd,
    lambda draw: (draw.normal(6), draw.normal(6, 6)),
    terms=[("straight", "args.x"), ("transposed", "args.x")],
)


def solve(a, b):
    return torch.linalg.solve(a, b)


def solve_fwd(a, b):
    x = torch.linalg.solve(a, b)
    return x, (a, x)


def solve_bwd(residuals, g, term):
    a, x = residuals
    db = torch.linalg.solve(a.mT, g)
    return -db @ x.mT, db


_state(
    "solve",
    solve,
    solve_fwd,
    solve_bwd,
    # Some way from singular, so that figures mean something in float32 too.
    lambda draw: (
        draw.normal(4, 4) + 4 * torch.eye(4, dtype=draw.dtype),
        draw.normal(4, 4),
    ),
)


def conv1d(x, w, b):
    return functional.conv1d(x, w, b)


def conv1d_bwd(residuals, g, term):
    x, w = residuals
    windows = x.unfold(2, w.shape[2], 1)
    dw = torch.einsum("nol,nclk->ock", g, windows)
    return functional.conv_transpose1d(g, w), dw, g.sum((0, 2))


_state(
    "conv1d",
    conv1d,
    lambda x, w, b: (functional.conv1d(x, w, b), (x, w)),
    conv1d_bwd,
    lambda draw: (draw.normal(2, 3, 7), draw.normal(4, 3, 3), draw.normal(4)),
    summed={"args.b": (0, 2)},
    contracted={"args.w": (0,), "args.x": (1,)},
)


# Norms.

EPSILON = 1e-5


def layer_norm(x, weight, bias):
    return functional.layer_norm(x, x.shape[-1:], weight, bias, EPSILON)


def layer_norm_fwd(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt((centred**2).mean(-1, keepdim=True) + EPSILON)
    hat = centred * scale
    return hat * weight + bias, (hat, scale, weight)


def layer_norm_bwd(residuals, g, term):
    hat, scale, weight = residuals
    inner = g * weight
    mean = term("mean", inner.mean(-1, keepdim=True))
    spread = term("variance", hat * (inner * hat).mean(-1, keepdim=True))
    return scale * (inner - mean - spread), (g * hat).sum(0), g.sum(0)


_state(
    "layer_norm",
    layer_norm,
    layer_norm_fwd,
    layer_norm_bwd,
    lambda draw: (draw.normal(4, 6), draw.normal(6), draw.normal(6)),
    terms=[("mean", "args.x"), ("variance", "args.x")],
    summed={"args.weight": (0,), "args.bias": (0,)},
)


def rms_norm(x, weight):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON) * weight


def rms_norm_fwd(x, weight):
    scale = torch.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON)
    return x * scale * weight, (x, weight, scale)


def rms_norm_bwd(residuals, g, term):
    x, weight, scale = residuals
    inner = g * weight
    shrink = x * scale**2 * (inner * x).mean(-1, keepdim=True)
    return scale * (inner - term("projection", shrink)), (g * x * scale).sum(0)


_state(
    "rms_norm",
    rms_norm,
    rms_norm_fwd,
    rms_norm_bwd,
    lambda draw: (draw.normal(5, 5), draw.normal(5)),
    terms=[("projection", "args.x")],
    summed={"args.weight": (0,)},
)


def normalize(x):
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def normalize_fwd(x):
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    y = x / length
    return y, (y, length)


def normalize_bwd(residuals, g, term):
    y, length = residuals
    along = y * (g * y).sum(-1, keepdim=True)
    return ((g - term("projection", along)) / length,)


_state(
    "normalize",
    normalize,
    normalize_fwd,
    normalize_bwd,
    lambda draw: (draw.normal(4, 5),),
    terms=[("projection", "args.x")],
)


# Exponentials over a dimension.


def softmax(x):
    return torch.softmax(x, -1)


def softmax_fwd(x):
    y = torch.softmax(x, -1)
    return y, y


def softmax_bwd(y, g, term):
    return (y * (g - term("mean", (g * y).sum(-1, keepdim=True))),)


_state(
    "softmax",
    softmax,
    softmax_fwd,
    softmax_bwd,
    lambda draw: (draw.normal(5, 5),),
    terms=[("mean", "args.x")],
)


def logsumexp(x):
    return torch.logsumexp(x, -1)


def logsumexp_fwd(x):
    y = torch.logsumexp(x, -1)
    return y, (x, y)


_state(
    "logsumexp",
    logsumexp,
    logsumexp_fwd,
    lambda residuals, g, term: (
        g[..., None] * torch.exp(residuals[0] - residuals[1][..., None]),
    ),
    lambda draw: (draw.normal(4, 5),),
    sizes={"args.x": 5},
)


def cross_entropy(logits, target):
    return functional.cross_entropy(logits, target)


def cross_entropy_fwd(logits, target):
    logs = torch.log_softmax(logits, -1)
    loss = -logs.gather(1, target[:, None]).mean()
    return loss, (torch.exp(logs), target)


def cross_entropy_bwd(residuals, g, term):
    p, target = residuals
    hot = functional.one_hot(target, p.shape[1]).to(p.dtype)
    return g * (term("softmax", p) - term("target", hot)) / p.shape[0], None


_state(
    "cross_entropy",
    cross_entropy,
    cross_entropy_fwd,
    cross_entropy_bwd,
    lambda draw: (draw.normal(5, 5), draw.integers(5, 5)),
    terms=[("target", "args.logits"), ("softmax", "args.logits")],
    sizes={"args.logits": 5},
)


# Sums and products over a dimension.


def sum_rows(x):
    return x.sum(0)


_state(
    "sum_rows",
    sum_rows,
    lambda x: (x.sum(0), tuple(x.shape)),
    lambda shape, g, term: (g.expand(shape),),
    lambda draw: (draw.normal(4, 5),),
    sizes={"args.x": 4},
)


def mean_columns(x):
    return x.mean(1)


_state(
    "mean_columns",
    mean_columns,
    lambda x: (x.mean(1), x.shape[1]),
    lambda size, g, term: (g[:, None].expand(-1, size) / size,),
    lambda draw: (draw.normal(5, 5),),
    sizes={"args.x": 5},
)


def variance(x):
    return x.var(1)


_state(
    "variance",
    variance,
    lambda x: (x.var(1), (x, x.mean(1))),
    lambda residuals, g, term: (
        g[:, None]
        * (residuals[0] - term("mean", residuals[1][:, None]))
        * (2 / (residuals[0].shape[1] - 1)),
    ),
    lambda draw: (draw.normal(5, 5),),
    terms=[("mean", "args.x")],
    sizes={"args.x": 5},
)


def backwards_cumsum(g):
    return g.flip(1).cumsum(1).flip(1)


def cumsum(x):
    return x.cumsum(1)


_state(
    "cumsum",
    cumsum,
    lambda x: (x.cumsum(1), ()),
    lambda residuals, g, term: (backwards_cumsum(g),),
    lambda draw: (draw.normal(5, 5),),
)


def cumprod(x):
    return x.cumprod(1)


def cumprod_fwd(x):
    y = x.cumprod(1)
    return y, (x, y)


_state(
    "cumprod",
    cumprod,
    cumprod_fwd,
    lambda residuals, g, term: (backwards_cumsum(g * residuals[1]) / residuals[0],),
    lambda draw: (draw.normal(4, 4),),
)


# Indices.


def gather(x, index):
    return x.gather(1, index)


def gather_bwd(residuals, g, term):
    index, shape = residuals
    return g.new_zeros(shape).scatter_add(1, index, g), None


_state(
    "gather",
    gather,
    lambda x, index: (x.gather(1, index), (index, tuple(x.shape))),
    gather_bwd,
    lambda draw: (draw.normal(5, 5), draw.integers(5, 5, 3)),
)


def scatter_add(base, index, src):
    return base.scatter_add(0, index, src)


_state(
    "scatter_add",
    scatter_add,
    lambda base, index, src: (base.scatter_add(0, index, src), index),
    # The first cotangent is g itself, as people write it.
    lambda index, g, term: (g, None, g.gather(0, index)),
    lambda draw: (draw.normal(5, 5), draw.integers(5, 5, 5), draw.normal(5, 5)),
)


# Several outputs.


def waves(x):
    return torch.sin(x), torch.cos(x), x.sum()


def waves_fwd(x):
    s, c = torch.sin(x), torch.cos(x)
    return (s, c, x.sum()), (s, c)


def waves_bwd(residuals, g, term):
    s, c = residuals
    g_sin, g_cos, g_sum = g
    rest = term("sine", g_sin * c) - term("cosine", g_cos * s)
    return (rest + term("total", g_sum.expand_as(s)),)


_state(
    "waves",
    waves,
    waves_fwd,
    waves_bwd,
    lambda draw: (draw.normal(4, 4),),
    terms=[("sine", "args.x"), ("cosine", "args.x"), ("total", "args.x")],
)
