"""Two backwards through one graph, with different cotangents."""

import torch

from tests.transforms.compositions import weighted


def test_retain_graph(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        out = f(*args)
        return [
            torch.autograd.grad(weighted(out, seed), args, retain_graph=seed == 1)
            for seed in (1, 2)
        ]

    agree(composition, trodden=True)
