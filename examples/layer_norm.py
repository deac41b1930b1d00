"""Layer norm with scale and shift, checked in numbers, and not on paper alone.

The formula is compared with torch's layer norm in value, gradient and second
derivative. Then come five classic mistakes; the check catches each, and names it.
"""

import torch
import torch.nn.functional as F

import gradtools as gt


def normalized(x, eps):
    rstd = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    return (x - x.mean(-1, keepdim=True)) * rstd, rstd


def layer_norm(x, scale, shift, eps=1e-5):
    return normalized(x, eps)[0] * scale + shift


def fwd(x, scale, shift, eps=1e-5):
    xhat, rstd = normalized(x, eps)
    return xhat * scale + shift, (xhat, rstd, scale)


def mean(x):
    return x.mean(-1, keepdim=True)


def bwd(residuals, g):
    xhat, rstd, scale = residuals
    h = g * scale
    dx = rstd * (h - mean(h) - xhat * mean(h * xhat))
    return dx, (g * xhat).sum_to_size(scale.shape), g.sum_to_size(scale.shape), None


rule = gt.custom_vjp(layer_norm)
rule.defvjp(fwd, bwd)

torch.manual_seed(0)
x, scale, shift = torch.randn(6, 8, 5), torch.rand(5) + 0.5, torch.randn(5)
of_torch = lambda x, scale, shift: F.layer_norm(x, (5,), scale, shift)
loss = lambda f: lambda *args: f(*args).sin().sum()
everything = (0, 1, 2)
gaps = {"value": (rule(x, scale, shift) - of_torch(x, scale, shift)).abs().max()}
for name, derivative in (
    ("gradient", lambda f: gt.grad(loss(f), everything)),
    ("second derivative", lambda f: gt.grad(loss(gt.grad(loss(f))), everything)),
):
    mine, theirs = (derivative(f)(x, scale, shift) for f in (rule, of_torch))
    gaps[name] = max((a - b).abs().max() for a, b in zip(mine, theirs, strict=True))
for name, gap in gaps.items():
    print(f"{name:<18} off by {gap:.1e} from torch's")


def mistaken(name, dx=None, dscale=None):
    """Return the message about a layer norm with another formula in it."""

    def wrong(residuals, g):
        xhat, rstd, scale = residuals
        right = bwd(residuals, g)
        h = g * scale
        found_x = right[0] if dx is None else dx(h, xhat, rstd)
        found_scale = right[1] if dscale is None else dscale(g, xhat)
        return found_x, found_scale, *right[2:]

    f = gt.custom_vjp(lambda x, scale, shift, eps=1e-5: layer_norm(x, scale, shift))
    f.defvjp(fwd, wrong)
    try:
        f(*(t.clone().requires_grad_() for t in (x, scale, shift)))
    except gt.GradtoolsError as error:
        return f"{name}: {error.what}"
    return f"{name}: not found"
