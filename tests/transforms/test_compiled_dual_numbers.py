"""Dual numbers inside a compiled region, with and without gradients."""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad

from tests.transforms.compositions import directions


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad])
def test_compiled_dual_numbers(agree, compiled, mode):
    def composition(f, *args):
        with mode(), forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(*pair)
                for pair in zip(args, directions(args), strict=True)
            ]
            return forward_ad.unpack_dual(f(*duals)).tangent

    agree(compiled(composition), reference=composition)
