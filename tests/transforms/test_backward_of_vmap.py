"""Plain backward through a vectorized function."""

import torch

from tests.transforms.compositions import batched, weighted


def test_backward_of_vmap(agree):
    def composition(f, *args):
        given = [b.requires_grad_() for b in batched(args)]
        return torch.autograd.grad(weighted(torch.func.vmap(f)(*given)), given)

    agree(composition, trodden=True)
