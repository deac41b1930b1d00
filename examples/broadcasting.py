"""Arithmetic that broadcasts, products with batch dimensions, reductions.

An argument that was broadcast gets the sum over what it was broadcast along, and
``sum_to_size`` takes it. One that was reduced gets its cotangent spread out again.
"""

import torch

import gradtools as gt


@gt.custom_vjp
def add(a, b):
    return a + b


@add.def_bwd
def _(residuals, g):
    (a, b), _ = residuals
    return g.sum_to_size(a.shape), g.sum_to_size(b.shape)


@gt.custom_vjp
def mul(a, b):
    return a * b


@mul.def_bwd
def _(residuals, g):
    (a, b), _ = residuals
    return (g * b).sum_to_size(a.shape), (g * a).sum_to_size(b.shape)


@gt.custom_vjp
def matmul(a, b):
    return a @ b


@matmul.def_bwd
def _(residuals, g):
    (a, b), _ = residuals
    return (g @ b.mT).sum_to_size(a.shape), (a.mT @ g).sum_to_size(b.shape)


@gt.custom_vjp
def mean(x, dim, keepdim=False):
    return x.mean(dim, keepdim)


@mean.def_bwd
def _(residuals, g):
    (x, dim, keepdim), _ = residuals
    g = g if keepdim else g.unsqueeze(dim)
    return g.expand(x.shape) / x.shape[dim], None, None


@gt.custom_vjp
def amax(x, dim):
    return x.amax(dim)


@amax.def_bwd
def _(residuals, g):
    (x, dim), out = residuals
    here = x == out.unsqueeze(dim)  # ties share, as in torch.amax
    return here * (g / here.sum(dim)).unsqueeze(dim), None


torch.manual_seed(0)
draw = torch.randn
cases = {
    "add (4, 3) + (3,)": (add, torch.add, (draw(4, 3), draw(3))),
    "mul (4, 1) * (1, 3)": (mul, torch.mul, (draw(4, 1), draw(1, 3))),
    "mul (2, 4, 3) * ()": (mul, torch.mul, (draw(2, 4, 3), draw(()))),
    "matmul (2, 5, 4, 3) @ (5, 3, 2)": (
        matmul,
        torch.matmul,
        (draw(2, 5, 4, 3), draw(5, 3, 2)),
    ),
}
