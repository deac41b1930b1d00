"""torch.func.grad, compiled."""

import torch

from tests.transforms.compositions import every, scalar


def test_compiled_grad(agree, compiled):
    def composition(f, *args):
        return torch.func.grad(scalar(f), every(args))(*args)

    agree(compiled(composition), reference=composition)
