"""torch.func.jvp where only one argument moves."""

import torch

from tests.transforms.compositions import weights


def test_jvp_in_one_argument(agree):
    def composition(f, *args):
        return [
            torch.func.jvp(
                lambda x, i=i: f(*args[:i], x, *args[i + 1 :]),
                (args[i],),
                (weights(args[i]),),
            )[1]
            for i in range(len(args))
        ]

    agree(composition)
