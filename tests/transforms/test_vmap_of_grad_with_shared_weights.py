"""Per-sample gradients in shared arguments."""

import torch

from tests.transforms.compositions import batched, every, scalar


def test_vmap_of_grad_with_shared_weights(agree):
    def composition(f, *args):
        if len(args) == 1:
            return []
        per_sample = torch.func.vmap(
            torch.func.grad(scalar(f), every(args)),
            in_dims=(0,) + (None,) * (len(args) - 1),
        )
        return per_sample(batched(args)[0], *args[1:])

    agree(composition)
