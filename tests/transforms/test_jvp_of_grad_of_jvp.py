"""Jvp of grad of jvp."""

from tests.transforms.compositions import grad, jvp, scalar


def test_jvp_of_grad_of_jvp(agree):
    def composition(f, *args):
        h = scalar(f)
        h = jvp(h, args, seed=2)
        h = grad(h, args)
        h = jvp(h, args, seed=4)
        return h(*args)

    agree(composition)
