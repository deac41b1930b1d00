"""A sort with its integer positions: an output that has no cotangent.

bwd gets None for the positions, and sends each cotangent back to where its value came
from. A differentiable rank-based loss follows: the trimmed mean of squared errors.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes

import gradtools as gt


@gt.custom_vjp
def sort(x):
    return tuple(torch.sort(x, dim=-1))


@sort.def_bwd
def _(residuals, g):
    _, (_, places) = residuals
    of_values, of_places = g
    assert of_places is None  # integers have no cotangent
    return torch.zeros_like(of_values).scatter(-1, places, of_values)


data, target = load_diabetes(return_X_y=True, scaled=False)
x = torch.tensor(data, dtype=torch.float32)
x, y = (x - x.mean(0)) / x.std(0), torch.tensor(target, dtype=torch.float32)
y = (y - y.mean()) / y.std()
spoilt = y.clone()
spoilt[::10] += 30  # every tenth target is wrong


def trimmed(errors):
    values, _ = sort(errors)
    return values[: int(0.85 * len(values))].mean()


def fitted(reduce, targets):
    w = torch.zeros(11, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        reduce((x @ w[:-1] + w[-1] - targets).square()).backward()
        optimizer.step()
    return F.mse_loss(x @ w[:-1] + w[-1], y).item()


clean, plain = fitted(torch.mean, y), fitted(torch.mean, spoilt)
robust = fitted(trimmed, spoilt)
print(f"error of a fit to clean targets       {clean:.3f}")
print(f"to spoilt ones, by the mean           {plain:.3f}")
print(f"to spoilt ones, by the trimmed mean   {robust:.3f}")
values, places = sort(torch.tensor([3.0, 1.0, 2.0]))
print(values.tolist(), places.tolist())
