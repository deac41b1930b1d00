"""Hessian-vector products, forward over reverse, compiled."""

import torch

from tests.transforms.compositions import every, jvp, scalar


def test_compiled_hvp(agree, compiled):
    def composition(f, *args):
        return jvp(torch.func.grad(scalar(f), every(args)), args)(*args)

    agree(compiled(composition), reference=composition)
