"""autograd.grad of autograd.grad, as a gradient penalty takes it."""

import torch

from tests.transforms.compositions import weighted


def test_double_backward(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        first = torch.autograd.grad(weighted(f(*args)), args, create_graph=True)
        penalty = sum(weighted(g * g) for g in first)
        return torch.autograd.grad(
            penalty, args, allow_unused=True, materialize_grads=True
        )

    agree(composition, trodden=True)
