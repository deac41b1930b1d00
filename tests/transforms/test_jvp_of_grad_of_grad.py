"""Jvp of grad of grad."""

from tests.transforms.compositions import grad, jvp, scalar


def test_jvp_of_grad_of_grad(agree):
    def composition(f, *args):
        h = scalar(f)
        h = grad(h, args)
        h = grad(h, args)
        h = jvp(h, args, seed=4)
        return h(*args)

    agree(composition)
