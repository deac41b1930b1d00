"""einops: the derivative of an attention projection, written as it is read.

fwd and bwd are torch code, so einops' patterns work in both, under vmap and
torch.compile too.
"""

import torch
from einops import einsum, rearrange

import gradtools as gt

HEADS = 2


@gt.custom_vjp
def project(x, weight):
    """Return ``(batch, heads, tokens, width)`` from ``(batch, tokens, channels)``."""
    return rearrange(x @ weight, "b n (h k) -> b h n k", h=HEADS)


@project.def_fwd
def _(x, weight):
    return project(x, weight), (x, weight)


@project.def_bwd
def _(residuals, g):
    x, weight = residuals
    g = rearrange(g, "b h n k -> b n (h k)")
    return einsum(g, weight, "b n k, c k -> b n c"), einsum(x, g, "b n c, b n k -> c k")


def loss(x, weight):
    """Return a scalar that depends on every number."""
    return project(x, weight).sin().sum()


def main():
    """Return the gradient in the weight: eager, of each sample, compiled."""
    x, weight = torch.randn(3, 5, 4), torch.randn(4, 6)
    gradient = torch.func.grad(loss, 1)
    of_samples = torch.func.vmap(gradient, (0, None))(x[:, None], weight)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    return gradient(x, weight), of_samples.sum(0), compiled(x, weight)


if __name__ == "__main__":
    for found in main():
        print(found.norm())
