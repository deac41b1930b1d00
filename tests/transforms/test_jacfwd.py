"""torch.func.jacfwd."""

import torch

from tests.transforms.compositions import every


def test_jacfwd(agree):
    def composition(f, *args):
        return torch.func.jacfwd(f, every(args))(*args)

    agree(composition)
