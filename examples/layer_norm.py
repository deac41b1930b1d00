"""Layer norm with scale and shift, checked in numbers, and not on paper alone.

It is compared with torch's to second order. Five classic mistakes are then caught.
"""

import torch

import gradtools as gt

mean = lambda x: x.mean(-1, keepdim=True)


def normalized(x, eps):
    rstd = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    return (x - mean(x)) * rstd, rstd


@gt.custom_vjp
def layer_norm(x, scale, shift, eps=1e-5):
    return normalized(x, eps)[0] * scale + shift


@layer_norm.def_fwd
def fwd(x, scale, shift, eps=1e-5):
    xhat, rstd = normalized(x, eps)
    return xhat * scale + shift, (xhat, rstd, scale)


@layer_norm.def_bwd
def bwd(residuals, g):
    xhat, rstd, scale = residuals
    h = g * scale
    dx = rstd * (h - mean(h) - xhat * mean(h * xhat))
    return dx, (g * xhat).sum_to_size(scale.shape), g.sum_to_size(scale.shape), None


torch.manual_seed(0)
x, scale, shift = torch.randn(5, 5), torch.rand(5) + 0.5, torch.randn(5)
of_torch = lambda x, *affine: torch.nn.functional.layer_norm(x, (5,), *affine)
loss = lambda f: lambda *args: f(*args).sin().sum()
derivatives = {
    "value": lambda f: lambda *args: (f(*args),),
    "gradient": lambda f: gt.grad(loss(f), (0, 1, 2)),
    "second derivative": lambda f: gt.grad(loss(gt.grad(loss(f))), (0, 1, 2)),
}
gaps = {}
for name, derivative in derivatives.items():
    mine, theirs = (derivative(f)(x, scale, shift) for f in (layer_norm, of_torch))
    gaps[name] = max(map(torch.dist, mine, theirs)).item()
    print(f"{name:<18} off by {gaps[name]:.1e} from torch's")

# (5, 5) is the shape in which a wrong dimension fits, and torch says nothing
mistakes = {
    "lost keepdim": (0, lambda h, xhat: h - mean(h) - xhat * (h * xhat).mean(-1)),
    "sign": (0, lambda h, xhat: h - mean(h) + xhat * mean(h * xhat)),
    "missing term": (0, lambda h, xhat: h - xhat * mean(h * xhat)),
    "mean for sum": (1, lambda g, xhat: (g * xhat).mean(0)),
    "sum over features": (1, lambda g, xhat: (g * xhat).sum(1)),
}


def message(place, formula):
    @layer_norm.def_bwd
    def _(residuals, g):
        (xhat, rstd, scale), found = residuals, list(bwd(residuals, g))
        found[place] = formula(g, xhat) if place else rstd * formula(g * scale, xhat)
        return found

    try:
        return layer_norm(*(t.clone().requires_grad_() for t in (x, scale, shift)))
    except gt.GradtoolsError as error:
        return error.what


says = {name: message(*mistake) for name, mistake in mistakes.items()}
layer_norm.def_bwd(bwd)  # the right one again
print(*(f"{name}: {text}" for name, text in says.items()), sep="\n")
