"""torch.func.grad, compiled by inductor."""

import torch

from tests.transforms.compositions import every, scalar


def test_inductor_grad(agree, compiled):
    def composition(f, *args):
        return torch.func.grad(scalar(f), every(args))(*args)

    agree(compiled(composition, "inductor"), reference=composition)
