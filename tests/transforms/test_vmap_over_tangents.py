"""Several directions at one point."""

import torch

from tests.transforms.compositions import batched, directions


def test_vmap_over_tangents(agree):
    def composition(f, *args):
        def push(*tangents):
            return torch.func.jvp(f, args, tangents)[1]

        return torch.func.vmap(push)(*batched(directions(args)))

    agree(composition)
