"""Plain second derivatives of a vectorized function."""

import torch

from tests.transforms.compositions import batched, weighted


def test_double_backward_of_vmap(agree):
    def composition(f, *args):
        given = [b.requires_grad_() for b in batched(args)]
        out = weighted(torch.func.vmap(f)(*given))
        grads = torch.autograd.grad(
            out, given, create_graph=True, materialize_grads=True
        )
        total = sum(weighted(g * g) for g in grads)
        return torch.autograd.grad(total, given, materialize_grads=True)

    agree(composition)
