"""torch.func.grad."""

import torch

from tests.transforms.compositions import every, scalar


def test_grad(agree):
    def composition(f, *args):
        return torch.func.grad(scalar(f), every(args))(*args)

    agree(composition, trodden=True)
