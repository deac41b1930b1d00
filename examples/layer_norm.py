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
x, scale, shift = torch.randn(5, 5), torch.rand(5) + 0.5, torch.randn(5)
of_torch = lambda x, scale, shift: F.layer_norm(x, (5,), scale, shift)
loss = lambda f: lambda *args: f(*args).sin().sum()
gaps = {"value": (rule(x, scale, shift) - of_torch(x, scale, shift)).abs().max().item()}
for name, derivative in (
    ("gradient", lambda f: gt.grad(loss(f), (0, 1, 2))),
    ("second derivative", lambda f: gt.grad(loss(gt.grad(loss(f))), (0, 1, 2))),
):
    pairs = zip(
        *(derivative(f)(x, scale, shift) for f in (rule, of_torch)), strict=True
    )
    gaps[name] = max((mine - theirs).abs().max().item() for mine, theirs in pairs)
for name, gap in gaps.items():
    print(f"{name:<18} off by {gap:.1e} from torch's")

# (5, 5) is the shape in which a wrong dimension fits, and torch says nothing
mistakes = {
    "lost keepdim": (0, lambda h, xhat: h - mean(h) - xhat * (h * xhat).mean(-1)),
    "sign": (0, lambda h, xhat: h - mean(h) + xhat * mean(h * xhat)),
    "missing term": (0, lambda h, xhat: h - xhat * mean(h * xhat)),
    "mean for sum": (1, lambda g, xhat: (g * xhat).mean(0)),
    "sum over features": (1, lambda g, xhat: (g * xhat).sum(1)),
}


def message(place, formula):
    """Return what the check says about a layer norm with another formula in it."""

    def mistaken(residuals, g):
        (xhat, rstd, scale), found = residuals, list(bwd(residuals, g))
        found[place] = formula(g, xhat) if place else rstd * formula(g * scale, xhat)
        return found

    wrong = gt.custom_vjp(layer_norm)
    wrong.defvjp(fwd, mistaken)
    try:
        return wrong(*(t.clone().requires_grad_() for t in (x, scale, shift)))
    except gt.GradtoolsError as error:
        return error.what


says = {name: message(*mistake) for name, mistake in mistakes.items()}
for name, text in says.items():
    print(f"{name}:\n    {text}")
