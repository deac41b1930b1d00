"""Reverse over reverse."""

import torch

from tests.transforms.compositions import every, scalar


def test_jacrev_of_jacrev(agree):
    def composition(f, *args):
        inner = torch.func.jacrev(scalar(f), every(args))
        return torch.func.jacrev(inner, every(args))(*args)

    agree(composition)
