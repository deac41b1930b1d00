"""Jvp of jvp."""

from tests.transforms.compositions import jvp, scalar


def test_jvp_of_jvp(agree):
    def composition(f, *args):
        h = scalar(f)
        h = jvp(h, args, seed=2)
        h = jvp(h, args, seed=3)
        return h(*args)

    agree(composition)
