"""conv2d by hand, with an integer stride, an optional bias, and a log of statistics.

Integers and None are arguments like any other. What is logged is logged once per real
call: when gradtools runs the rule to check it, ``gt.is_checking()`` says so.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.nn import grad as convolutions

import gradtools as gt

log = []


def note(name, tensor):
    if not gt.is_checking():
        log.append((name, tensor.mean().item(), tensor.std().item()))


@gt.custom_vjp
def conv2d(x, weight, bias=None, stride=1):
    return F.conv2d(x, weight, bias, stride)


@conv2d.def_fwd
def _(x, weight, bias=None, stride=1):
    out = F.conv2d(x, weight, bias, stride)
    note("output", out)
    return out, {"x": x, "weight": weight, "stride": stride}  # any pytree


@conv2d.def_bwd
def _(kept, g, *, needs):
    note("gradient", g)
    x, weight, stride = kept["x"], kept["weight"], kept["stride"]
    found = {}  # by name; what is left out is zero, and stride has no gradient
    if needs[0]:
        found["x"] = convolutions.conv2d_input(x.shape, weight, g, stride)
    if needs[1]:
        found["weight"] = convolutions.conv2d_weight(x, weight.shape, g, stride)
    if needs[2]:
        found["bias"] = g.sum((0, 2, 3))
    return found


torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
y = torch.tensor(labels)
first = (0.3 * torch.randn(12, 1, 3, 3)).requires_grad_()
second = (0.2 * torch.randn(24, 12, 2, 2)).requires_grad_()
bias = torch.zeros(24, requires_grad=True)
head = (0.1 * torch.randn(10, 24 * 4)).requires_grad_()


def network(x):
    h = conv2d(x, first, None, 2).relu()
    return conv2d(h, second, bias).relu().flatten(1) @ head.T


optimizer = torch.optim.Adam([first, second, bias, head], lr=1e-2)
steps = 0
for _ in range(15):
    for rows in torch.randperm(1400).split(100):
        optimizer.zero_grad()
        F.cross_entropy(network(x[rows]), y[rows]).backward()
        optimizer.step()
        steps += 1

with torch.no_grad():
    accuracy = (network(x[1400:]).argmax(1) == y[1400:]).double().mean().item()
print(f"test accuracy {accuracy:.1%}; {len(log)} lines of log for {steps} steps")
for name, mean, std in log[:4]:
    print(f"  {name:<8}  mean {mean:9.2e}  std {std:8.2e}")
