"""Under inference_mode the function runs."""

import torch


def test_inference_mode(agree):
    def composition(f, *args):
        with torch.inference_mode():
            out = f(*[arg.clone() for arg in args])
            assert out.is_inference()
            return out * 1

    agree(composition, trodden=True)
