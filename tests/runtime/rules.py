"""Rules at module level, where a pickle finds them."""

import torch

import gradtools as gt


@gt.custom_vjp
def swish(x, beta):
    """Return x * sigmoid(beta * x)."""
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


class Scaled(torch.nn.Module):
    """A module that holds rules: as a method, and as an attribute."""

    def __init__(self, factor=3.0):
        super().__init__()
        self.factor = factor
        self.activation = swish
        self.beta = torch.nn.Parameter(torch.tensor(1.5))

    @gt.custom_vjp
    def scaled(self, x):
        return self.factor * x

    @scaled.def_bwd
    def _(self, residuals, g):
        return self.factor * g

    def forward(self, x):
        return self.activation(self.scaled(x), self.beta)


def native(x, beta):
    """Return the swish by torch's own operations."""
    return x * torch.sigmoid(beta * x)


def malformed():
    """Call a rule whose bwd returns one cotangent too many."""
    rule = gt.custom_vjp(native)
    rule.def_bwd(lambda residuals, g: (g, None, None))
    x = torch.ones(2, requires_grad=True)
    with gt.gradcheck_policy("off"):
        rule(x, torch.tensor(1.5)).sum().backward()


def gradients(f=swish):
    """Return the gradients of a fixed loss as lists."""
    x = torch.linspace(-2, 2, 5, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    return [g.tolist() for g in torch.autograd.grad(f(x, beta).sum(), (x, beta))]
