"""torch.func.hessian, forward over reverse."""

import torch

from tests.transforms.compositions import every, scalar


def test_hessian(agree):
    def composition(f, *args):
        return torch.func.hessian(scalar(f), every(args))(*args)

    agree(composition)
