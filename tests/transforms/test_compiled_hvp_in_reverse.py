"""Hessian-vector products, reverse over reverse, compiled."""

import torch

from tests.transforms.compositions import every, grad, scalar


def test_compiled_hvp_in_reverse(agree, compiled):
    def composition(f, *args):
        return torch.func.grad(grad(scalar(f), args), every(args))(*args)

    agree(compiled(composition), reference=composition)
