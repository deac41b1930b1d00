"""vmap in which each argument in turn is not batched."""

import torch

from tests.transforms.compositions import batched


def test_vmap_with_unbatched_arguments(agree):
    def composition(f, *args):
        found = []
        for place in range(len(args) if len(args) > 1 else 0):
            in_dims = tuple(None if i == place else 0 for i in range(len(args)))
            given = [
                a if i == place else b
                for i, (a, b) in enumerate(zip(args, batched(args), strict=True))
            ]
            found.append(torch.func.vmap(f, in_dims)(*given))
        return found

    agree(composition)
