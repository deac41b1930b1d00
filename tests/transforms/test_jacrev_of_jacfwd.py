"""Reverse over forward."""

import torch

from tests.transforms.compositions import every, scalar


def test_jacrev_of_jacfwd(agree):
    def composition(f, *args):
        inner = torch.func.jacfwd(scalar(f), every(args))
        return torch.func.jacrev(inner, every(args))(*args)

    agree(composition)
