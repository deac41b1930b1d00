"""A Hessian for every element."""

import torch

from tests.transforms.compositions import batched, every, scalar


def test_vmap_of_hessian(agree):
    def composition(f, *args):
        return torch.func.vmap(torch.func.hessian(scalar(f), every(args)))(
            *batched(args)
        )

    agree(composition)
