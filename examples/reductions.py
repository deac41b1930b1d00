"""Reductions: a mean, a maximum and a norm, over one dimension or several.

The cotangent has lost the dimensions that were reduced; it gets them back, and is
spread out. Dimensions and ``keepdim`` are integers and bools, and need no ceremony.
"""

import math

import torch

import gradtools as gt


def spread(g, dim, keepdim):
    """Give a tensor its reduced dimensions back, of size 1."""
    for d in () if keepdim else sorted(dim):
        g = g.unsqueeze(d)
    return g


@gt.custom_vjp
def mean(x, dim, keepdim=False):
    return x.mean(dim, keepdim)


@mean.def_bwd
def _(residuals, g):
    (x, dim, keepdim), _ = residuals
    count = math.prod(x.shape[d] for d in dim)
    return spread(g, dim, keepdim).expand(x.shape) / count


@gt.custom_vjp
def amax(x, dim, keepdim=False):
    return x.amax(dim, keepdim)


@amax.def_bwd
def _(residuals, g):
    (x, dim, keepdim), out = residuals
    here = x == spread(out, dim, keepdim)
    share = spread(g, dim, keepdim) / here.sum(dim, keepdim=True)
    return here * share  # where several are the largest, they share


@gt.custom_vjp
def norm(x, dim, keepdim=False):
    return x.square().sum(dim, keepdim).sqrt()


@norm.def_bwd
def _(residuals, g):
    (x, dim, keepdim), out = residuals
    out = spread(out, dim, keepdim)
    return spread(g, dim, keepdim) * torch.where(out > 0, x / out, 0.0)  # 0 at 0


torch.manual_seed(0)
x = torch.randn(4, 3, 5).mul(3).round()  # with ties
x[0, :, 0] = 0  # and a column of zeros
vector_norm = lambda x, dim, keepdim: torch.linalg.vector_norm(x, 2, dim, keepdim)
loss = lambda f: lambda *args: f(*args).sin().sum()
gaps = {}
for rule, theirs in ((mean, torch.mean), (amax, torch.amax), (norm, vector_norm)):
    for dim, keepdim in (((1,), False), ((0, 2), False), ((0, 1, 2), True)):
        gap = gt.grad(loss(rule))(x, dim, keepdim) - gt.grad(loss(theirs))(
            x, dim, keepdim
        )
        gaps[rule.__name__, dim] = gap.abs().max().item()
for (name, dim), gap in gaps.items():
    print(f"{name} over {dim}: gradient off by {gap:.1e} from torch's")
