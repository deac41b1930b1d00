"""torch.func.jacrev, one row at a time."""

import torch

from tests.transforms.compositions import every


def test_jacrev_in_chunks(agree):
    def composition(f, *args):
        return torch.func.jacrev(f, every(args), chunk_size=1)(*args)

    agree(composition)
