"""The derivative of a vectorized function along a direction."""

import torch

from tests.transforms.compositions import batched, jvp


def test_jvp_of_vmap(agree):
    def composition(f, *args):
        vectorized = torch.func.vmap(f)
        return jvp(vectorized, args)(*batched(args))

    agree(composition)
