"""Grad of jvp of jvp."""

from tests.transforms.compositions import grad, jvp, scalar


def test_grad_of_jvp_of_jvp(agree):
    def composition(f, *args):
        h = scalar(f)
        h = jvp(h, args, seed=2)
        h = jvp(h, args, seed=3)
        h = grad(h, args)
        return h(*args)

    agree(composition)
