"""Hessian-vector products, forward over reverse, compiled by inductor."""

import torch

from tests.transforms.compositions import every, jvp, scalar


def test_inductor_hvp(agree, compiled):
    def composition(f, *args):
        return jvp(torch.func.grad(scalar(f), every(args)), args)(*args)

    agree(compiled(composition, "inductor"), reference=composition)
