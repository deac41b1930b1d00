"""A backward within a dual level: forward over reverse."""

import torch
from torch.autograd import forward_ad

from tests.transforms.compositions import directions, weighted


def test_dual_numbers_over_backward(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        with forward_ad.dual_level():
            duals = list(map(forward_ad.make_dual, args, directions(args)))
            grads = torch.autograd.grad(
                weighted(f(*duals)), duals, materialize_grads=True
            )
            pairs = [forward_ad.unpack_dual(g) for g in grads]
            return [
                (
                    p.primal,
                    torch.zeros_like(p.primal) if p.tangent is None else p.tangent,
                )
                for p in pairs
            ]

    agree(composition, trodden=True)
