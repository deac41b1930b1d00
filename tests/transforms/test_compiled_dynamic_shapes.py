"""A compiled training step and a compiled gradient on shapes that change."""

import torch

from tests.transforms.compositions import batched, every, scalar, weighted


def test_compiled_training_step_with_dynamic_shapes(agree):
    def composition(f, *args, compile=True):
        def loss(*args):
            return weighted(torch.func.vmap(f)(*args))

        if compile:
            loss = torch.compile(
                loss, fullgraph=True, backend="aot_eager", dynamic=True
            )
        found = []
        for size in (3, 5, 7):
            given = [arg.requires_grad_() for arg in batched(args, size)]
            found.append(torch.autograd.grad(loss(*given), given))
        return found

    agree(composition, reference=lambda *a: composition(*a, compile=False))


def test_compiled_grad_with_dynamic_shapes(agree):
    def composition(f, *args, compile=True):
        per_sample = torch.func.vmap(torch.func.grad(scalar(f), every(args)))
        if compile:
            per_sample = torch.compile(
                per_sample, fullgraph=True, backend="aot_eager", dynamic=True
            )
        return [per_sample(*batched(args, size)) for size in (3, 5, 7)]

    agree(composition, reference=lambda *a: composition(*a, compile=False))
