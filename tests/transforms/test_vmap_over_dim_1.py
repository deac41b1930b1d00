"""vmap over the last dimension of every argument."""

import torch

from tests.transforms.compositions import batched


def test_vmap_over_dim_1(agree):
    def composition(f, *args):
        moved = [arg.movedim(0, -1) for arg in batched(args)]
        return torch.func.vmap(f, in_dims=-1)(*moved)

    agree(composition)
