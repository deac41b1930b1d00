"""Handwritten digits, classified by a network whose activations are custom rules.

Two rules are stated, a swish with a learnable slope and a layer norm. Then the network
is trained, differentiated per sample, differentiated twice, and compiled. Run it with
``make demo``, or ``python examples/digits.py`` where the extra ``demo`` is installed.
"""

import functools
import os
import shutil

import torch
from instruments import draw, medians, power_iteration
from rich.progress import track
from sklearn.datasets import load_digits
from torch.func import grad, jvp, vjp, vmap
from torch.nn import functional as F

import gradtools as gt


@gt.custom_vjp
def swish(x, beta):
    return x * torch.sigmoid(beta * x)


@swish.def_fwd
def _(x, beta):
    s = torch.sigmoid(beta * x)
    return x * s, (x, beta, s)


@swish.def_bwd
def _(residuals, g):
    x, beta, s = residuals
    ds = s * (1 - s)
    return g * (s + x * beta * ds), (g * x * x * ds).sum()


@gt.custom_vjp
def layer_norm(x, scale, shift, eps=1e-5):
    return normalized(x, eps)[0] * scale + shift


@layer_norm.def_fwd
def _(x, scale, shift, eps=1e-5):
    xhat, rstd = normalized(x, eps)
    return xhat * scale + shift, (xhat, rstd, scale)


@layer_norm.def_bwd
def _(residuals, g):
    xhat, rstd, scale = residuals
    gx = g * scale
    along = (gx * xhat).mean(-1, keepdim=True)
    gx = rstd * (gx - gx.mean(-1, keepdim=True) - xhat * along)
    return gx, (g * xhat).sum_to_size(scale.shape), g.sum_to_size(scale.shape), None


def normalized(x, eps):
    rstd = torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + eps)
    return (x - x.mean(-1, keepdim=True)) * rstd, rstd


def network(params, x, norm=layer_norm, activation=swish):
    h = norm(x @ params["inner"], params["scale"], params["shift"])
    return activation(h, params["beta"]) @ params["outer"]


def loss(params, x, y, **operations):
    return F.cross_entropy(network(params, x, **operations), y)


loss_by_torch = functools.partial(
    loss,
    norm=lambda x, scale, shift: F.layer_norm(x, scale.shape, scale, shift),
    activation=lambda x, beta: x * torch.sigmoid(beta * x),
)


def initial():
    return {
        "inner": torch.randn(64, 64) / 8,
        "scale": torch.ones(64),
        "shift": torch.zeros(64),
        "beta": torch.tensor(1.0),
        "outer": torch.randn(64, 10) / 8,
    }


def train(params, batches, epochs):
    """Train by Adam; yield the mean loss of each epoch."""
    optimizer = torch.optim.Adam(params.values(), lr=3e-3)
    for _ in track(range(epochs), "training"):
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            losses.append(loss(params, *batch))
            losses[-1].backward()
            optimizer.step()
        yield torch.stack(losses).mean().item()


def main(epochs=40, steps=30, repeats=200, path="build/digits.png"):
    """Run everything; return the figures that are printed."""
    torch.manual_seed(0)
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    x, order = x.to(torch.get_default_dtype()) / 16, torch.randperm(len(y))
    test_set, train_set = ((x[part], y[part]) for part in order.split([397, 1400]))
    batches = [(x[part], y[part]) for part in order[397:].split(64)]
    params = initial()
    for param in params.values():
        param.requires_grad_()

    history = []
    for mean in train(params, batches, epochs):
        right = network(params, test_set[0]).argmax(-1) == test_set[1]
        history.append((mean, right.double().mean().item()))
    print(f"test accuracy            {history[-1][1]:.1%}")
    for report in (*swish.reports, *layer_norm.reports):
        print(f"checked on first call    {report}")

    fixed = {name: param.detach() for name, param in params.items()}
    gradients = vmap(grad(loss), (None, 0, 0))(fixed, *test_set)
    alone = [
        torch.autograd.grad(loss_by_torch(params, *sample), params.values())
        for sample in zip(*test_set, strict=True)
    ]
    loop = dict(zip(params, map(torch.stack, zip(*alone, strict=True)), strict=True))
    difference = max((gradients[k] - loop[k]).abs().max().item() for k in params)
    print(f"gradients of one sample  vmap(grad) - a loop of autograd: {difference:.1e}")

    first = grad(lambda params: loss(params, *train_set))
    quotients = power_iteration(lambda v: jvp(first, (fixed,), (v,))[1], fixed, steps)
    by_torch = vjp(grad(lambda params: loss_by_torch(params, *train_set)), fixed)[1]
    expected = power_iteration(lambda v: by_torch(v)[0], fixed, steps)
    print(f"top Hessian eigenvalue   {quotients[-1]:.6g} by forward over reverse")
    print(f"                         {expected[-1]:.6g} by torch, reverse over reverse")

    if shutil.which(os.environ.get("CXX", "g++")):
        compiled = torch.compile(loss, fullgraph=True)
        eager, fast = medians(
            repeats,
            lambda: loss(params, *batches[0]).backward(),
            lambda: compiled(params, *batches[0]).backward(),
        )
        print(
            f"training step            {eager:.0f} us eager, {fast:.0f} us compiled: "
            f"{eager / fast:.2f} times as fast"
        )
    else:
        print("training step            not compiled: no C++ compiler (g++ or $CXX)")

    draw(path, history, test_set, gradients, quotients)
    print(f"figure                   {path}")
    return {
        "accuracy": history[-1][1],
        "difference": difference,
        "eigenvalues": (quotients[-1], expected[-1]),
    }


if __name__ == "__main__":
    main()
