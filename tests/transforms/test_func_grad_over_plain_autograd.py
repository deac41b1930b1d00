"""torch.func.grad inside a graph of plain autograd."""

import torch

from tests.transforms.compositions import every, scalar, weighted


def test_func_grad_over_plain_autograd(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        gradient = torch.func.grad(scalar(f), every(args))(*args)
        total = sum(weighted(g * g) for g in gradient)
        return torch.autograd.grad(total, args, materialize_grads=True)

    agree(composition, trodden=True)
