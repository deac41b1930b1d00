"""Nested vmap over different dimensions."""

import torch

from tests.transforms.compositions import batched


def test_vmap_of_vmap(agree):
    def composition(f, *args):
        twice = [torch.stack([b, 0.5 * b], dim=-1) for b in batched(args)]
        return torch.func.vmap(torch.func.vmap(f), in_dims=-1)(*twice)

    agree(composition)
