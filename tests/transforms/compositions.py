"""Small pieces that the compositions of transforms share."""

import torch


def weights(like, seed=1):
    """Return fixed weights in the shape of a tensor."""
    return torch.cos(1.3 * torch.arange(1, like.numel() + 1) + seed).reshape(like.shape)


def weighted(out, seed=1):
    """Return a scalar in which every element of ``out`` counts differently."""
    return (out * weights(out, seed)).sum()


def scalar(f, seed=1):
    """Return ``f`` followed by a weighted sum."""
    return lambda *args: weighted(f(*args), seed)


def directions(args, seed=2):
    """Return one fixed tangent per argument."""
    return tuple(weights(arg, seed + i) for i, arg in enumerate(args))


def every(args):
    """Return the argnums of all arguments."""
    return tuple(range(len(args)))


def grad(f, args):
    """Return the gradient function of ``f`` in all arguments, weighted to a scalar."""
    gradient = torch.func.grad(f, argnums=every(args))
    return lambda *args: sum(weighted(g, 3 + i) for i, g in enumerate(gradient(*args)))


def jvp(f, args, seed=2):
    """Return the derivative of ``f`` along fixed directions, as a function."""
    return lambda *args: torch.func.jvp(f, args, directions(args, seed))[1]


def batched(args, size=3):
    """Return every argument with a batch dimension in front, no two elements alike."""
    return tuple(
        torch.stack([arg * (1 + 0.3 * b) + 0.05 * b for b in range(size)])
        for arg in args
    )
