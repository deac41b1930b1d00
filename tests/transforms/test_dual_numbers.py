"""Forward mode with dual numbers, without torch.func."""

from torch.autograd import forward_ad

from tests.transforms.compositions import directions


def test_dual_numbers(agree):
    def composition(f, *args):
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, args, directions(args))
            return tuple(forward_ad.unpack_dual(f(*duals)))

    agree(composition)
