"""The Jacobian of a vectorized function."""

import torch

from tests.transforms.compositions import batched, every


def test_jacrev_of_vmap(agree):
    def composition(f, *args):
        return torch.func.jacrev(torch.func.vmap(f), every(args))(*batched(args))

    agree(composition)
