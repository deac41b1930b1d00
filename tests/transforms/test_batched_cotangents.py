"""autograd.grad with is_grads_batched."""

import torch


def test_batched_cotangents(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        out = f(*args)
        basis = torch.eye(out.numel())
        return torch.autograd.grad(out, args, basis, is_grads_batched=True)

    agree(composition, trodden=True)
