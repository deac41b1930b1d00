"""Tangents flow under no_grad."""

import torch
from torch.autograd import forward_ad

from tests.transforms.compositions import directions


def test_dual_numbers_under_no_grad(agree):
    def composition(f, *args):
        with torch.no_grad(), forward_ad.dual_level():
            duals = map(forward_ad.make_dual, args, directions(args))
            return tuple(forward_ad.unpack_dual(f(*duals)))

    agree(composition)
