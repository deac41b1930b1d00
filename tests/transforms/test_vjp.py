"""torch.func.vjp, its pullback called after the transform has ended."""

import torch

from tests.transforms.compositions import weights


def test_vjp(agree):
    def composition(f, *args):
        out, pull_back = torch.func.vjp(f, *args)
        return out, pull_back(weights(out)), pull_back(weights(out, 2))

    agree(composition)
