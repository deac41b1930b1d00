"""tensordict: parameters in a TensorDict, as an argument like any other.

A TensorDict is a pytree: transforms return gradients in one. bwd may answer with a
plain dict of the same keys, in which None is zero (a TensorDict cannot hold None).
"""

import torch
from tensordict import TensorDict

import gradtools as gt


@gt.custom_vjp
def affine(params, x):
    """Return ``x @ weight + bias``."""
    return x @ params["weight"] + params["bias"]


@affine.def_fwd
def _(params, x):
    return affine(params, x), (params, x)


@affine.def_bwd
def _(residuals, g):
    params, x = residuals
    of_params = {"weight": x.mT @ g, "bias": g.sum(0)}
    return of_params, g @ params["weight"].mT


def loss(params, x, y):
    """Return the mean squared error."""
    return ((affine(params, x) - y) ** 2).mean()


def main(steps=200):
    """Fit a line; return the loss, and a Hessian-vector product of the parameters."""
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    truth = TensorDict({"weight": torch.randn(3, 2), "bias": torch.randn(2)})
    y = affine(truth, x)
    params = TensorDict({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})
    for _ in range(steps):
        params = params - 0.2 * torch.func.grad(loss)(params, x, y)
    product = gt.hvp(lambda params: loss(params, x, y), (params,), (truth,))[0]
    return {"loss": float(loss(params, x, y)), "params": params, "product": product}


if __name__ == "__main__":
    for name, found in main().items():
        print(f"{name}: {found}")
