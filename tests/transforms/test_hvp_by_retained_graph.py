"""Hessian-vector products from one retained gradient graph."""

import torch

from tests.transforms.compositions import directions, weighted


def test_hvp_by_retained_graph(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        grads = torch.autograd.grad(
            weighted(f(*args)), args, create_graph=True, materialize_grads=True
        )
        total = sum((g * v).sum() for g, v in zip(grads, directions(args), strict=True))
        return [
            torch.autograd.grad(total, args, retain_graph=True, materialize_grads=True)
            for _ in range(2)
        ]

    agree(composition, trodden=True)
