"""A Jacobian by forward mode for every element."""

import torch

from tests.transforms.compositions import batched, every


def test_vmap_of_jacfwd(agree):
    def composition(f, *args):
        return torch.func.vmap(torch.func.jacfwd(f, every(args)))(*batched(args))

    agree(composition)
