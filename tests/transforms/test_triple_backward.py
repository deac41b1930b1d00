"""Three times autograd.grad."""

import torch

from tests.transforms.compositions import weighted


def test_triple_backward(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        value = weighted(f(*args))
        for _ in range(2):
            grads = torch.autograd.grad(
                value, args, create_graph=True, materialize_grads=True
            )
            value = sum(weighted(g * g * g) for g in grads)
        return torch.autograd.grad(value, args, materialize_grads=True)

    agree(composition, trodden=True)
