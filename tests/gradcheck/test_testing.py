"""gradtools.testing: derivatives and transforms of any function, for test suites."""

import pytest
import torch

import gradtools as gt
from gradtools.testing import check_grads, check_transforms


def numbers(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


class Wrong(torch.autograd.Function):
    """Twice the sine's derivative, in one mode each."""

    @staticmethod
    def forward(x, factor, tangent_factor):
        return torch.sin(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor, ctx.tangent_factor = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, g):
        return ctx.factor * g * ctx.saved_tensors[0].cos(), None, None

    @staticmethod
    def jvp(ctx, t, *_):
        return ctx.tangent_factor * t * ctx.saved_tensors[0].cos()


class Detached(torch.autograd.Function):
    """A cube whose second derivative is half of the right one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x * x.detach()


RIGHT = {
    "sine": (torch.sin, (numbers(4),), {}),
    "matmul": (torch.matmul, (numbers(3, 4), numbers(4, 2)), {}),
    "pytree": (
        lambda p, x: {"out": p["w"] * x, "n": 3},
        ({"w": numbers(3)}, numbers(3)),
        {},
    ),
    "keywords": (lambda x, *, w: x * w, (numbers(3),), {"w": numbers(3)}),
    "complex": (torch.square, (torch.complex(numbers(3), numbers(3).flip(0)),), {}),
    "indices": (torch.gather, (numbers(5), 0, torch.tensor([1, 3])), {}),
    "several outputs": (lambda x: (x.sin(), x.argmax(), x.sum()), (numbers(3),), {}),
}


@pytest.mark.parametrize("modes", [("rev",), "fwd", ("rev", "fwd")])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", RIGHT)
def test_right_functions_pass(name, order, modes):
    f, args, kwargs = RIGHT[name]
    report = check_grads(f, args, kwargs, order=order, modes=modes)
    assert report.outcome == "passed"
    orders = {e.question.rpartition(" (order ")[2] for e in report.evidence}
    assert orders >= {f"{n})" for n in range(2, order + 1)}


def test_both_modes_are_checked():
    report = check_grads(torch.sin, (numbers(3),), modes=("rev", "fwd"))
    assert {e.capability for e in report.evidence} == {"reverse", "forward mode"}
    report = check_grads(torch.sin, (numbers(3),), modes="fwd")
    assert {e.capability for e in report.evidence} == {"forward mode"}


@pytest.mark.parametrize(
    ("factors", "mode", "words"),
    [
        ((2.0, 1.0), "rev", "it is 2 times what it should be"),
        ((1.0, 2.0), "fwd", "the tangent that the jvp rule gives output 0"),
    ],
)
def test_a_wrong_function_is_found_in_the_mode_that_is_wrong(factors, mode, words):
    def f(x):
        return Wrong.apply(x, *factors)

    with pytest.raises(gt.GradientMismatchError, match=words):
        check_grads(f, (numbers(4),), modes=(mode,))
    other = "fwd" if mode == "rev" else "rev"
    assert check_grads(f, (numbers(4),), modes=(other,)).outcome == "passed"


def test_a_wrong_second_derivative_is_found_at_order_two():
    assert check_grads(Detached.apply, (numbers(4),)).outcome == "passed"
    with pytest.raises(gt.GradientMismatchError, match=r"0\.5 times"):
        check_grads(Detached.apply, (numbers(4),), order=2)


def cube(factor=1.0, detach=False):
    rule = gt.custom_vjp(lambda x: x**3)
    rule.defvjp(
        lambda x: (x**3, x),
        lambda x, g: 3 * factor * g * x * (x.detach() if detach else x),
    )
    return rule


def test_rules_are_checked_as_rules():
    report = check_grads(cube(), (numbers(4),), order=2, modes=("rev", "fwd"))
    questions = [item.question for item in report.evidence]
    assert "linear in the cotangent" in questions
    assert "second derivative by differences" in questions
    with pytest.raises(gt.GradientMismatchError, match="it is 2 times"):
        check_grads(cube(2.0), (numbers(4),))
    assert check_grads(cube(detach=True), (numbers(4),)).outcome == "passed"
    with pytest.raises(gt.GradientMismatchError, match="second derivative"):
        check_grads(cube(detach=True), (numbers(4),), order=2)


def test_rtol_widens_the_check():
    with pytest.raises(gt.GradientMismatchError, match=r"1\.001 times"):
        check_grads(cube(1.001), (numbers(4),))
    assert check_grads(cube(1.001), (numbers(4),), rtol=1e-2).outcome == "passed"


def test_methods_are_checked_on_their_instance():
    class Scaled:
        scale, factor = 3.0, 1.0

        @gt.custom_vjp
        def times(self, x):
            return self.scale * x

        @times.def_bwd
        def _(self, residuals, g):
            return None, self.factor * self.scale * g

    assert check_grads(Scaled().times, (numbers(3),)).outcome == "passed"
    wrong = Scaled()
    wrong.factor = 2.0
    with pytest.raises(gt.GradientMismatchError, match=r"args\.x.*it is 2 times"):
        check_grads(wrong.times, (numbers(3),))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modes": ("reverse",)}, "'reverse', which is none of 'rev', 'fwd'"),
        ({"modes": ()}, "order 1 in the modes"),
        ({"order": 0}, "order 0 in the modes"),
        ({"order": True}, "order True"),
        ({"order": 1.5}, "order 1.5"),
    ],
)
def test_what_means_nothing_is_an_error(options, words):
    with pytest.raises(gt.DefinitionError, match=words):
        check_grads(torch.sin, (numbers(3),), **options)


def test_transforms_of_right_functions_pass():
    report = check_transforms(
        lambda x, w: torch.tanh(x @ w), (numbers(3, 4), numbers(4))
    )
    assert len(report.evidence) == 9
    assert report.outcome == "passed"
    assert check_transforms(cube(), (numbers(3),)).outcome == "passed"


def mixing():
    rule = gt.custom_vjp(lambda x: 2 * x, vmap="broadcast_all")
    rule.def_bwd(lambda r, g: 2 * g + (0.1 * g.mean(0) if g.dim() > 1 else 0))
    return rule


def test_a_rule_that_mixes_the_batch_is_found_by_the_transform_that_shows_it():
    with gt.gradcheck_policy("off"):
        report = check_transforms(mixing(), (numbers(3),), transforms=["vjp", "vmap"])
        assert [item.question for item in report.evidence] == ["vjp", "vmap"]
        with pytest.raises(gt.GradientMismatchError, match="vmap of vjp does not give"):
            check_transforms(mixing(), (numbers(3),), transforms=["vmap of vjp"])


def test_a_detached_second_derivative_is_found_by_the_transform_that_shows_it():
    with gt.gradcheck_policy("off"):
        rule = cube(detach=True)
        assert check_transforms(rule, (numbers(3),), transforms=["vjp"]).evidence
        with pytest.raises(gt.GradientMismatchError, match="jvp of vjp does not give"):
            check_transforms(rule, (numbers(3),), transforms=["jvp of vjp"])


def test_what_torch_refuses_is_an_error_of_torch():
    assert not Wrong.generate_vmap_rule

    def f(x):
        return Wrong.apply(x, 1.0, 1.0)

    passing = check_transforms(f, (numbers(3),), transforms=["vjp", "jvp"])
    assert [item.question for item in passing.evidence] == ["vjp", "jvp"]
    with pytest.raises(RuntimeError, match="does not have vmap support"):
        check_transforms(f, (numbers(3),), transforms=["vmap"])


def test_an_unknown_transform_is_an_error():
    with pytest.raises(
        gt.DefinitionError, match="'pmap', which is none of 'vjp', 'jvp'"
    ):
        check_transforms(torch.sin, (numbers(3),), transforms=["pmap"])
