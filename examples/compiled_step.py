"""A training step with a custom rule in it, compiled as one graph.

The rule goes into the graph: forward, backward and all, with nothing left to Python.
Without a C++ compiler ``backend="aot_eager"`` shows the same, but for the speed.
"""

import os
import shutil
import statistics
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import gradtools as gt


@gt.custom_vjp
def swish(x, beta):
    return x * torch.sigmoid(beta * x)


@swish.def_bwd
def _(residuals, g):
    (x, beta), _ = residuals
    s = torch.sigmoid(beta * x)
    h = g * x * s * (1 - s)
    return g * s + beta * h, (h * x).sum()


def loss(params, x, y):
    inner, beta, outer = params
    return F.cross_entropy(swish(x @ inner, beta) @ outer, y)


torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
params = [torch.randn(64, 64) / 8, torch.tensor(1.0), torch.randn(64, 10) / 8]
for p in params:
    p.requires_grad_()

backend = "inductor" if shutil.which(os.environ.get("CXX", "g++")) else "aot_eager"
compiled = torch.compile(loss, fullgraph=True, backend=backend)
step = lambda loss: torch.autograd.grad(loss(params, x, y), params)
difference = max(map(torch.dist, step(loss), step(compiled))).item()
print(f"gradients off by {difference:.1e}, compiled by {backend}")

times = {"eager": [], "compiled": []}
for _ in range(50):
    for name, function in (("eager", loss), ("compiled", compiled)):
        start = time.perf_counter()
        step(function)
        times[name].append(1e6 * (time.perf_counter() - start))
took = {name: statistics.median(found) for name, found in times.items()}
print(*(f"{name} step {us:.0f} us" for name, us in took.items()), sep=", ")
