"""Handwritten digits, classified by a network whose layers are custom rules.

Two are stated, a swish with a learnable slope and a layer norm. Each is checked the
first time it is used, in milliseconds, and says what was found.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import gradtools as gt


@gt.custom_vjp
def swish(x, beta):
    return x * torch.sigmoid(beta * x)


@swish.def_fwd
def _(x, beta):
    s = torch.sigmoid(beta * x)
    return x * s, (x, beta, s)  # the output, and whatever bwd wants to have


@swish.def_bwd
def _(residuals, g):
    x, beta, s = residuals
    ds = s * (1 - s)
    return g * (s + x * beta * ds), (g * x * x * ds).sum()


def normalized(x):
    rstd = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)
    return (x - x.mean(-1, keepdim=True)) * rstd, rstd


@gt.custom_vjp
def layer_norm(x, scale, shift):
    return normalized(x)[0] * scale + shift


@layer_norm.def_fwd
def _(x, scale, shift):
    xhat, rstd = normalized(x)
    return xhat * scale + shift, (xhat, rstd, scale)


@layer_norm.def_bwd
def _(residuals, g):
    xhat, rstd, scale = residuals
    h = g * scale
    along = (h * xhat).mean(-1, keepdim=True)
    dx = rstd * (h - h.mean(-1, keepdim=True) - xhat * along)
    return dx, (g * xhat).sum_to_size(scale.shape), g.sum_to_size(scale.shape)


torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
test, train = torch.randperm(len(y)).split([397, 1400])
inner, outer = torch.randn(64, 64) / 8, torch.randn(64, 10) / 8
params = [inner, torch.ones(64), torch.zeros(64), torch.tensor(1.0), outer]
optimizer = torch.optim.Adam([p.requires_grad_() for p in params], lr=3e-3)


def network(x):
    inner, scale, shift, beta, outer = params
    return swish(layer_norm(x @ inner, scale, shift), beta) @ outer


for _ in range(15):
    for rows in train.split(64):
        optimizer.zero_grad()
        F.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
accuracy = (network(x[test]).argmax(-1) == y[test]).double().mean().item()
print(f"test accuracy {accuracy:.1%}")
for report in (*swish.reports, *layer_norm.reports):
    print(report)
