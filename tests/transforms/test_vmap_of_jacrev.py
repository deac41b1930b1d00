"""A Jacobian for every element."""

import torch

from tests.transforms.compositions import batched, every


def test_vmap_of_jacrev(agree):
    def composition(f, *args):
        return torch.func.vmap(torch.func.jacrev(f, every(args)))(*batched(args))

    agree(composition)
