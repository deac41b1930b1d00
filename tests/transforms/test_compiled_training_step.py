"""A compiled loss, its backward called outside: the usual training step."""

import pytest
import torch

from tests.transforms.compositions import weighted


@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "eager"])
def test_compiled_training_step(agree, backend):
    def composition(f, *args, compile=True):
        args = [arg.requires_grad_() for arg in args]

        def loss(*args):
            return weighted(torch.sin(f(*args)))

        if compile:
            loss = torch.compile(loss, fullgraph=True, backend=backend)
        loss(*args).backward()
        first = [arg.grad.clone() for arg in args]
        loss(*args).backward()
        return first, [arg.grad for arg in args]

    agree(composition, reference=lambda *a: composition(*a, compile=False))
