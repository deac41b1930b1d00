"""Only one argument requires a gradient."""

import torch

from tests.transforms.compositions import weighted


def test_partial_gradients(agree):
    def composition(f, *args):
        found = []
        for place in range(len(args)):
            given = [a.clone().requires_grad_(i == place) for i, a in enumerate(args)]
            found += torch.autograd.grad(weighted(f(*given)), given[place])
        return found

    agree(composition, trodden=True)
