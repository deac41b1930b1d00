"""Nested vmap, each level over other arguments."""

import torch

from tests.transforms.compositions import batched


def test_vmap_of_vmap_over_different_arguments(agree):
    def composition(f, *args):
        first = (0,) + (None,) * (len(args) - 1)
        inner = (
            torch.func.vmap(f, in_dims=tuple(0 if d is None else None for d in first))
            if len(args) > 1
            else f
        )
        outer = torch.func.vmap(inner, in_dims=first)
        return outer(batched(args)[0], *batched(args)[1:])

    agree(composition)
