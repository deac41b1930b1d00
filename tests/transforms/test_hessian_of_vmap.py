"""The Hessian of a vectorized function."""

import torch

from tests.transforms.compositions import batched, every, scalar


def test_hessian_of_vmap(agree):
    def composition(f, *args):
        vectorized = torch.func.vmap(f)
        return torch.func.hessian(scalar(vectorized), every(args))(*batched(args))

    agree(composition)
