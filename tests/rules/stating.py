"""Rules stated in one line, and what the tests ask of them."""

import torch

import gradtools as gt


def stated(fun, fwd=None, bwd=None, **options):
    """Return a rule with the given functions."""
    rule = gt.custom_vjp(fun, **options)
    if fwd is not None:
        rule.def_fwd(fwd)
    if bwd is not None:
        rule.def_bwd(bwd)
    return rule


def leaf(*values, **options):
    """Return a vector that needs a gradient."""
    return torch.tensor(values, requires_grad=True, **options)


def gradients(out, *inputs, **options):
    """Return the gradients of the sum of ``out``."""
    return torch.autograd.grad(out.sum(), inputs, allow_unused=True, **options)


def summed(function):
    """Return ``function`` followed by a sum."""
    return lambda *args: function(*args).sum()


def derivative(function):
    """Return the elementwise derivative of an elementwise function."""
    return torch.func.grad(summed(function))


def twice_backward(function, x):
    """Return the second derivative of an elementwise function by plain autograd."""
    x = x.detach().requires_grad_()
    (first,) = gradients(function(x), x, create_graph=True)
    return gradients(first, x)[0]


def backward(rule, *args):
    """Use a rule in plain reverse mode."""
    rule(*args).sum().backward()


def functional(rule, *args):
    """Use a rule under torch.func.grad, in the arguments that need a gradient."""
    places = [i for i, a in enumerate(args) if getattr(a, "requires_grad", False)]
    bare = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    torch.func.grad(lambda *args: rule(*args).sum(), tuple(places))(*bare)
