"""log(1 + e^x) and logsumexp as one writes them down, with derivatives that are finite.

Autograd differentiates the formula, and meets infinity times zero where the function
is harmless. The rule's derivative is the sigmoid, or the softmax: never above one.
"""

import torch

import gradtools as gt


@gt.custom_vjp
def log1pexp(x):
    return torch.where(x > 30, x, torch.log1p(torch.exp(x)))


@log1pexp.def_bwd
def _(residuals, g):
    (x,), _ = residuals
    return g * torch.sigmoid(x)


@gt.custom_vjp
def logsumexp(x, dim=-1):
    top = x.amax(dim, keepdim=True)
    top = torch.where(top.isinf(), 0.0, top)  # a row of -inf has the value -inf
    return (x - top).exp().sum(dim).log() + top.squeeze(dim)


@logsumexp.def_bwd
def _(residuals, g):
    (x, dim), out = residuals
    out = torch.where(out.isinf(), 0.0, out)
    return g.unsqueeze(dim) * (x - out.unsqueeze(dim)).exp(), None


x = torch.tensor([-200.0, 0.0, 50.0, 200.0])
naive = lambda x: torch.where(x > 30, x, torch.log1p(torch.exp(x)))
found = gt.vmap(gt.grad(log1pexp))(x)
by_autograd = gt.vmap(gt.grad(naive))(x)
print("log1pexp          ", log1pexp(x).tolist())
print("derivative by rule", found.tolist())
print("by autograd       ", by_autograd.tolist())
second = gt.vmap(gt.grad(gt.grad(log1pexp)))(x)
print("second derivative ", second.tolist())

rows = torch.tensor([[1000.0, 1001.0, 999.0], [-torch.inf] * 3])
naive_sum = lambda x: x.exp().sum(-1).log()
weights = gt.grad(lambda x: logsumexp(x).sum())(rows)
by_autograd_sum = gt.grad(lambda x: naive_sum(x).sum())(rows)
print("logsumexp         ", logsumexp(rows).tolist())
print("derivative by rule", weights.tolist())
print("by autograd       ", by_autograd_sum.tolist())
