"""Per-sample gradients."""

import torch

from tests.transforms.compositions import batched, every, scalar


def test_vmap_of_grad(agree):
    def composition(f, *args):
        return torch.func.vmap(torch.func.grad(scalar(f), every(args)))(*batched(args))

    agree(composition)
