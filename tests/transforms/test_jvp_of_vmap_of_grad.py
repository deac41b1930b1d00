"""The derivative of per-sample gradients along a direction."""

import torch

from tests.transforms.compositions import batched, grad, jvp, scalar


def test_jvp_of_vmap_of_grad(agree):
    def composition(f, *args):
        per_sample = torch.func.vmap(grad(scalar(f), args))
        return jvp(per_sample, args)(*batched(args))

    agree(composition)
