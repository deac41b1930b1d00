"""Under autocast, the backward outside it, as torch advises."""

import torch

from tests.transforms.compositions import weighted


def test_autocast(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        with torch.autocast(args[0].device.type, dtype=torch.bfloat16):
            out = f(*args)
        return torch.autograd.grad(weighted(out), args)

    agree(composition, trodden=True)


def test_double_backward_under_autocast(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        with torch.autocast(args[0].device.type, dtype=torch.bfloat16):
            first = torch.autograd.grad(weighted(f(*args)), args, create_graph=True)
            total = sum(weighted(g, 2) for g in first)
        return torch.autograd.grad(total, args, materialize_grads=True)

    agree(composition, trodden=True)
