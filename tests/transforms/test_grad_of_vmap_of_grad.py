"""The gradient of a loss on per-sample gradients."""

import torch

from tests.transforms.compositions import batched, every, grad, scalar


def test_grad_of_vmap_of_grad(agree):
    def composition(f, *args):
        per_sample = torch.func.vmap(grad(scalar(f), args))
        return torch.func.grad(scalar(per_sample), every(args))(*batched(args))

    agree(composition)
