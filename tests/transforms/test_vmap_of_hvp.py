"""Hessian-vector products for every element."""

import torch

from tests.transforms.compositions import batched, grad, jvp, scalar


def test_vmap_of_hvp(agree):
    def composition(f, *args):
        return torch.func.vmap(jvp(grad(scalar(f), args), args))(*batched(args))

    agree(composition)
