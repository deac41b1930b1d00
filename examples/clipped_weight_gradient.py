"""A linear layer whose weight gradient is clipped to [-1, 1], in two ways.

The first leaves the rule exact and clips on the way to the weight. The second states
the clipped rule itself, and hands over the unclipped one to be checked.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes

import gradtools as gt


@gt.custom_vjp
def linear(x, w, b):
    return x @ w.T + b


@linear.def_bwd
def linear_bwd(residuals, g):
    (x, w, _), _ = residuals
    return g @ w, g.T @ x, g.sum(0)


def clipped_around(x, w, b):
    return linear(x, gt.clip_grad(w, -1, 1), b)


@gt.custom_vjp(contract=gt.Surrogate(reference=linear_bwd))
def clipped_inside(x, w, b):
    return x @ w.T + b


@clipped_inside.def_bwd
def _(residuals, g):
    dx, dw, db = linear_bwd(residuals, g)
    return dx, dw.clamp(-1, 1), db


data, target = load_diabetes(return_X_y=True, scaled=False)
x = torch.tensor(data, dtype=torch.float32)
x, y = (x - x.mean(0)) / x.std(0), torch.tensor(target, dtype=torch.float32)[:, None]


def gradients(layer):
    torch.manual_seed(0)
    w, b = torch.randn(1, 10, requires_grad=True), torch.zeros(1, requires_grad=True)
    return torch.autograd.grad(F.mse_loss(layer(x, w, b), y), (w, b))


plain = gradients(F.linear)
around, inside = gradients(clipped_around), gradients(clipped_inside)
print("weight gradient", plain[0][0, :4].tolist())
print("clipped around ", around[0][0, :4].tolist())
print("clipped inside ", inside[0][0, :4].tolist())
for rule in (linear, clipped_inside):
    print(rule.reports[0], "\n")
