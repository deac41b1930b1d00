"""Grad of grad."""

from tests.transforms.compositions import grad, scalar


def test_grad_of_grad(agree):
    def composition(f, *args):
        h = scalar(f)
        h = grad(h, args)
        h = grad(h, args)
        return h(*args)

    agree(composition)
