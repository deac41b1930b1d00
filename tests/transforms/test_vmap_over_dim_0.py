"""vmap over the first dimension of every argument."""

import torch

from tests.transforms.compositions import batched


def test_vmap_over_dim_0(agree):
    def composition(f, *args):
        return torch.func.vmap(f)(*batched(args))

    agree(composition)
