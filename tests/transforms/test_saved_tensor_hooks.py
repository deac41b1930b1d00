"""Hooks that move saved tensors away and back."""

import torch

from tests.transforms.compositions import weighted


def test_saved_tensor_hooks(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.clone(), lambda t: t * 1
        )
        with hooks:
            out = f(*args)
        return torch.autograd.grad(weighted(out), args)

    agree(composition, trodden=True)
