"""Forward over forward, which hand-written Functions get wrong."""

import torch

from tests.transforms.compositions import every


def test_jacfwd_of_jacfwd(agree):
    def composition(f, *args):
        inner = torch.func.jacfwd(f, every(args))
        return torch.func.jacfwd(inner, every(args))(*args)

    agree(composition)
