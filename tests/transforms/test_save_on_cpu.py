"""saved tensors offloaded, with a second derivative."""

import torch

from tests.transforms.compositions import weighted


def test_save_on_cpu(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        with torch.autograd.graph.save_on_cpu():
            out = weighted(f(*args))
            grads = torch.autograd.grad(
                out, args, create_graph=True, materialize_grads=True
            )
            total = sum(weighted(g * g) for g in grads)
        return torch.autograd.grad(total, args, materialize_grads=True)

    agree(composition, trodden=True)
