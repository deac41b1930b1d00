"""Reverse over forward with dual numbers."""

import torch
from torch.autograd import forward_ad

from tests.transforms.compositions import directions, weighted


def test_backward_through_a_tangent(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, args, directions(args))
            tangent = forward_ad.unpack_dual(f(*duals)).tangent
            return torch.autograd.grad(weighted(tangent), args, materialize_grads=True)

    agree(composition)
