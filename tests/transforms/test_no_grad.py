"""Under no_grad the function runs, and nothing is recorded."""

import torch


def test_no_grad(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        with torch.no_grad():
            out = f(*args)
        assert not out.requires_grad
        return out

    agree(composition, trodden=True)
