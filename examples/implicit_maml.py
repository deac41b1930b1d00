"""Implicit MAML: the gradient of an optimum, and not of the steps that led to it.

A task adapts parameters by a loss that is pulled towards a start. How the optimum moves
with the start follows from the equation that it solves, by one linear solve with
Hessian-vector products (A. Rajeswaran et al., 2019): the steps are not kept.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import gradtools as gt

PULL, STEPS = 1.0, 120


def network(params, x):
    return torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params, x, y):
    return F.cross_entropy(network(params, x), y)


def pulled_loss(params, start, x, y):
    gaps = ((p - start[key]).square().sum() for key, p in params.items())
    return loss(params, x, y) + PULL / 2 * sum(gaps)


def descent(init, start, x, y):
    for _ in range(STEPS):
        slope = gt.grad(pulled_loss)(init, start, x, y)
        init = {key: p - 0.2 * slope[key] for key, p in init.items()}
    return init


optimum = gt.custom_root(gt.grad(pulled_loss), solve="cg")(descent)

generator = torch.Generator().manual_seed(0)
draw = lambda *shape: 0.2 * torch.randn(*shape, generator=generator).double()
params = {"w1": draw(64, 32), "b1": draw(32), "w2": draw(32, 3), "b2": draw(3)}
images, labels = load_digits(n_class=3, return_X_y=True)
order = torch.randperm(len(labels), generator=generator)
x, y = torch.tensor(images)[order] / 16, torch.tensor(labels)[order]
support, query = (x[:15], y[:15]), (x[15:], y[15:])


def meta_loss(solve):
    return lambda start: loss(solve(params, start, *support), *query)


flat = lambda tree: torch.cat([leaf.flatten() for leaf in tree.values()])
implicit = flat(gt.grad(meta_loss(optimum))(params))
unrolled = flat(gt.grad(meta_loss(descent))(params))
found = {
    "cosine": F.cosine_similarity(implicit, unrolled, dim=0).item(),
    "loss before": meta_loss(lambda init, start, x, y: start)(params).item(),
    "loss after": meta_loss(optimum)(params).item(),
}
print(found)

for _ in range(20):  # the start learns, by the implicit gradient
    slope = gt.grad(meta_loss(optimum))(params)
    params = {key: p - 0.5 * slope[key] for key, p in params.items()}
found["loss after, from a start that has learned"] = meta_loss(optimum)(params).item()
print(found)
