"""The pullback of a gradient, called after every transform has ended."""

import torch

from tests.transforms.compositions import directions, every, scalar


def test_vjp_of_grad(agree):
    def composition(f, *args):
        gradient = torch.func.grad(scalar(f), every(args))
        out, pull_back = torch.func.vjp(gradient, *args)
        return out, pull_back(directions(out)), pull_back(directions(out, 5))

    agree(composition)
