"""torch.func.jacrev."""

import torch

from tests.transforms.compositions import every


def test_jacrev(agree):
    def composition(f, *args):
        return torch.func.jacrev(f, every(args))(*args)

    agree(composition)
