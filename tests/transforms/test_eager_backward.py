"""y.backward()."""

from tests.transforms.compositions import weighted


def test_eager_backward(agree):
    def composition(f, *args):
        args = [arg.requires_grad_() for arg in args]
        weighted(f(*args)).backward()
        return [arg.grad for arg in args]

    agree(composition, trodden=True)
