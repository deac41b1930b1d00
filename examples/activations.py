"""Five activations with derivatives of their own: one module, five rules.

Each is checked at its first call; ``python -m gradtools check`` prints a table of all.
"""

import torch
import torch.nn.functional as F

import gradtools as gt

ALPHA, SCALE = 1.6732632423543772, 1.0507009873554805
SLOPE, CUBIC = (2 / torch.pi) ** 0.5, 0.044715
probe = lambda: (torch.linspace(-3.0, 3.0, 24),)


@gt.custom_vjp(probe=lambda: (*probe(), torch.tensor(1.5)))
def swish(x, beta):
    return x * torch.sigmoid(beta * x)


@swish.def_bwd
def _(residuals, g):
    (x, beta), _ = residuals
    s = torch.sigmoid(beta * x)
    h = g * x * s * (1 - s)
    return g * s + beta * h, (h * x).sum_to_size(beta.shape)


@gt.custom_vjp(probe=probe)
def mish(x):
    return x * torch.tanh(F.softplus(x))


@mish.def_bwd
def _(residuals, g):
    (x,), _ = residuals
    t = torch.tanh(F.softplus(x))
    return g * (t + x * torch.sigmoid(x) * (1 - t * t))


@gt.custom_vjp(probe=probe)
def gelu(x):
    return 0.5 * x * (1 + torch.tanh(SLOPE * (x + CUBIC * x**3)))


@gelu.def_bwd
def _(residuals, g):
    (x,), _ = residuals
    t = torch.tanh(SLOPE * (x + CUBIC * x**3))
    return g * 0.5 * (1 + t + x * (1 - t * t) * SLOPE * (1 + 3 * CUBIC * x**2))


@gt.custom_vjp(probe=probe)
def elu(x):
    return torch.where(x > 0, x, torch.expm1(x.clamp(max=0)))


@elu.def_bwd
def _(residuals, g):
    (x,), _ = residuals
    return g * torch.exp(x.clamp(max=0))


@gt.custom_vjp(probe=probe)
def selu(x):
    return SCALE * torch.where(x > 0, x, ALPHA * torch.expm1(x.clamp(max=0)))


@selu.def_bwd
def _(residuals, g):
    (x,), _ = residuals
    return g * SCALE * torch.where(x > 0, 1.0, ALPHA * torch.exp(x.clamp(max=0)))


for rule in (swish, mish, gelu, elu, selu):
    try:
        print(rule.gradcheck().headline)
    except gt.GradientMismatchError as error:  # the others go on
        print(error.what)
