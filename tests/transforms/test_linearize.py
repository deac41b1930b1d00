"""torch.func.linearize, its result called twice."""

import torch

from tests.transforms.compositions import directions


def test_linearize(agree):
    def composition(f, *args):
        out, push = torch.func.linearize(f, *args)
        return out, push(*directions(args)), push(*directions(args, 5))

    agree(composition)
