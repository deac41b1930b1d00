"""vmap with chunk_size."""

import torch

from tests.transforms.compositions import batched


def test_vmap_in_chunks(agree):
    def composition(f, *args):
        return torch.func.vmap(f, chunk_size=2)(*batched(args))

    agree(composition)
