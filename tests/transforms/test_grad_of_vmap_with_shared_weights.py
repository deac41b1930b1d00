"""Shared arguments get the sum over the batch."""

import torch

from tests.transforms.compositions import batched, every, scalar


def test_grad_of_vmap_with_shared_weights(agree):
    def composition(f, *args):
        if len(args) == 1:
            return []
        vectorized = torch.func.vmap(f, in_dims=(0,) + (None,) * (len(args) - 1))
        return torch.func.grad(scalar(vectorized), every(args))(
            batched(args)[0], *args[1:]
        )

    agree(composition)
