"""A derivative along a direction for every element."""

import torch

from tests.transforms.compositions import batched, jvp


def test_vmap_of_jvp(agree):
    def composition(f, *args):
        return torch.func.vmap(jvp(f, args))(*batched(args))

    agree(composition)
