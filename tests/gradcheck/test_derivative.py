"""What the check finds in a rule, right or wrong."""

import numpy as np
import pytest
import torch

import gradtools as gt


def stated(fun, bwd, *, fwd=None, **options):
    rule = gt.custom_vjp(fun, **options)
    if fwd is not None:
        rule.def_fwd(fwd)
    rule.def_bwd(bwd)
    return rule


def v(*numbers, dtype=torch.float32):
    return torch.tensor(numbers, dtype=dtype)


def spread(count=5, dtype=torch.float32):
    return torch.cos(1.3 * torch.arange(count, dtype=torch.float64)).to(dtype)


def topk_bwd(residuals, cotangents):
    (x, _), (_, places) = residuals
    return torch.zeros_like(x).scatter(0, places, cotangents[0]), None


def dropout(x):
    return x * (torch.rand_like(x) > 0.5)


def dropout_fwd(x):
    mask = torch.rand_like(x) > 0.5
    return x * mask, mask


RIGHT = {
    "smooth": (torch.sin, lambda r, g: g * r[0][0].cos(), (spread(),)),
    "relu at its kink": (
        torch.relu,
        lambda r, g: g * (r[0][0] > 0),
        (torch.zeros(5),),
    ),
    "abs on both sides": (torch.abs, lambda r, g: g * r[0][0].sign(), (v(0, 1, -1),)),
    "max at a tie": (torch.max, lambda r, g: g * (r[0][0] == r[1]), (v(1, 1, 0),)),
    "log near its edge": (torch.log, lambda r, g: g / r[0][0], (v(1e-8, 1, 2),)),
    "sqrt at its edge": (torch.sqrt, lambda r, g: g / 2 / r[1], (v(0, 1, 2),)),
    "float16": (torch.sin, lambda r, g: g * r[0][0].cos(), (spread(3, torch.half),)),
    "complex": (
        torch.square,
        lambda r, g: g * 2 * r[0][0].conj(),
        (torch.complex(spread(3), spread(3).flip(0)),),
    ),
    "no elements": (torch.sin, lambda r, g: g * r[0][0].cos(), (torch.zeros(0, 3),)),
    "integer output": (lambda x, k: tuple(x.topk(k)), topk_bwd, (spread(), 2)),
    "broadcast": (lambda x, b: x + b, lambda r, g: (g, g.sum(0)), (v([1, 2]), v(1, 2))),
    "steep": (lambda x: 1e6 * x**3, lambda r, g: 3e6 * g * r[0][0] ** 2, (spread(),)),
    "float32 inside": (
        lambda x: x.float().sin(),
        lambda r, g: (g * r[0][0].cos()).to(r[0][0].dtype),
        (spread(),),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_rule_passes(name):
    fun, bwd, args = RIGHT[name]
    assert stated(fun, bwd).gradcheck(*args).outcome == "passed"


@pytest.mark.parametrize("name", RIGHT)
def test_the_first_call_costs_a_bounded_number_of_evaluations(name):
    fun, bwd, args = RIGHT[name]
    rule = stated(fun, bwd)
    rule(*(x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in args))
    (report,) = rule.reports
    assert report.outcome == "passed"
    assert report.evaluations <= 40


WRONG = {
    "a factor": (lambda x, w: x**3 * w, lambda x, w, g: (6 * g * x**2 * w, g * x**3)),
    "a sign": (lambda x, w: x - w, lambda x, w, g: (g, g)),
    "zero": (lambda x, w: x * w, lambda x, w, g: (g * w, None)),
    "swapped": (lambda x, w: x**2 * w, lambda x, w, g: (g * x**2, 2 * g * x * w)),
    "one element in a thousand": (
        lambda x, w: torch.sin(x) * w,
        lambda x, w, g: (
            g * x.cos() * w * (1 + 0.1 * (torch.arange(len(x)) == 3)),
            g * x.sin(),
        ),
    ),
    "a tenth of a per mille": (
        lambda x, w: torch.sin(x) * w,
        lambda x, w, g: (g * x.cos() * w, 1.0001 * g * x.sin()),
    ),
}
BLAMED = {"a sign": "w", "zero": "w", "a tenth of a per mille": "w"}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_told_which_argument(name):
    fun, bwd = WRONG[name]
    rule = stated(fun, lambda r, g: bwd(*r[0], g))
    count = 1000 if name == "one element in a thousand" else 5
    with pytest.raises(gt.GradientMismatchError, match="not the derivative") as caught:
        rule.gradcheck(spread(count), spread(count).flip(0))
    violation, direction = caught.value.violations
    assert "by differences" in direction.expected
    assert violation.where.startswith(f"args.{BLAMED.get(name, 'x')}[")
    assert "by autograd" in violation.expected
    assert "off by" in violation.got


def test_a_missing_conjugate_is_found():
    rule = stated(lambda z: z**2, lambda r, g: g * 2 * r[0][0])
    with pytest.raises(gt.GradientMismatchError, match=r"for args\.z is not the deriv"):
        rule.gradcheck(torch.complex(spread(3), spread(3).flip(0)))


@pytest.mark.parametrize(
    ("fwd", "expected"),
    [
        (lambda x: (x.sin() * 1.01, x), "differs by 1"),
        (lambda x: (x.sin()[None], x), r"shape \(1, 5\)"),
        (lambda x: (x.sin().float(), x), "float32"),
        (lambda x: ((x.sin(), x), x), "2 tensors"),
    ],
)
def test_a_fwd_that_is_not_the_function_is_found(fwd, expected):
    rule = stated(torch.sin, lambda x, g: g * x.cos(), fwd=fwd)
    with pytest.raises(gt.GradientMismatchError, match="fwd does not return") as caught:
        rule.gradcheck(spread(dtype=torch.float64))
    assert caught.match(expected)


def test_random_numbers_are_the_same_in_every_evaluation():
    rule = stated(dropout, lambda mask, g: g * mask, fwd=dropout_fwd)
    before = torch.get_rng_state()
    assert rule.gradcheck(spread(100)).outcome == "passed"
    assert torch.equal(torch.get_rng_state(), before)


def test_a_surrogate_is_compared_with_its_reference_only():
    def clipped(residuals, g):
        return (g * residuals[0][0].cos()).clamp(-0.1, 0.1)

    def exact(residuals, g):
        return g * residuals[0][0].cos()

    def wrong(residuals, g):
        return g * residuals[0][0].sin()

    def check(**contract):
        return stated(torch.sin, clipped, contract=gt.Surrogate(**contract)).gradcheck(
            spread()
        )

    assert check().outcome == "passed"
    assert check(reference=exact).outcome == "passed"
    with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
        check(reference=wrong)


def test_an_approximation_must_stay_inside_its_budget():
    def check(factor, **budget):
        return stated(
            torch.sin,
            lambda r, g: g * r[0][0].cos() * factor,
            contract=gt.Approximate(**budget),
        ).gradcheck(spread())

    *_, evidence = check(1.005, rel=1e-2).evidence[:3]
    assert 1e-3 < evidence.error < 1e-2
    assert check(1.05, rel=0, abs=1.0).outcome == "passed"
    with pytest.raises(gt.GradientMismatchError, match="outside the budget"):
        check(1.05, rel=1e-2)


@pytest.mark.parametrize("shape", [(), (50,)])
@pytest.mark.parametrize("factor", [100, 1.9, 1.05, 0.95, 0.5, 0, -1])
def test_the_error_of_an_approximation_is_in_parts_of_the_derivative(factor, shape):
    """Of a function that autograd does not see, so that differences alone tell."""

    def check(rel):
        sine = gt.external(
            np.sin,
            out=torch.empty_like,
            numpy=True,
            contract=gt.Approximate(rel=rel),
        )
        sine.def_bwd(lambda r, g: factor * g * r[0][0].cos())
        return sine.gradcheck(torch.linspace(0.1, 1, 50)[-1] * torch.ones(shape))

    right = abs(factor - 1)
    found = [e.error for e in check(1.02 * right).evidence if "error" in e.question]
    assert found == [pytest.approx(right, rel=1e-3)]
    with pytest.raises(gt.GradientMismatchError, match="outside the budget") as caught:
        check(0.98 * right)
    excess = caught.value.violations[-1]
    assert excess.expected.startswith(f"an error of at most {0.98 * right:.1e} of its")
    assert excess.got.startswith(f"an error of {right:.1e} of its size")
    assert "declare the error that it has" in caught.value.fix


def test_wider_tolerances_of_an_exact_contract_hold():
    def bwd(residuals, g):
        return g * residuals[0][0].cos() * 1.001

    assert stated(torch.sin, bwd, contract=gt.Exact(rtol=1e-2)).gradcheck(spread())
    with pytest.raises(gt.GradientMismatchError, match=r"1\.001 times what it sh"):
        stated(torch.sin, bwd).gradcheck(spread())


def root_where_positive(x, w):
    return torch.where(x > 0, torch.sqrt(x), 0.0) * w


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_nan_in_both_derivatives_is_named_with_its_place(factor):
    def bwd(residuals, g):  # 0 * inf where x is negative, as in autograd's own
        (x, w), _ = residuals
        inside = torch.where(x > 0, g * w, 0.0)
        return inside / (2 * torch.sqrt(x)), factor * g * root_where_positive(x, 1)

    rule = stated(root_where_positive, bwd)
    args = [v(1.0, 2.0, -1.0).requires_grad_() for _ in range(2)]
    if factor == 1:
        message = (
            r"derivative in x: bwd and autograd both give NaN at args\.x\[2\] "
            r"\(1 of 3 numbers\)"
        )
        with pytest.warns(UserWarning, match=message):
            rule(*args)
        assert rule.reports[0].outcome == "not checked"
    else:  # and does not hide what is wrong in the other argument
        with pytest.raises(gt.GradientMismatchError, match=r"args\.w.*it is 2 times"):
            rule(*args)


def test_an_infinite_argument_is_no_news():
    rule = stated(lambda x: x.exp(), lambda residuals, g: g * residuals[1])
    rule(v(1.0, -torch.inf).requires_grad_())  # a warning would be an error here
    assert rule.reports[0].outcome == "passed"


def test_infinity_is_named_where_autograd_has_no_number_either():
    def bwd(residuals, g):
        (x,), root = residuals
        return torch.where(x > 0, g / (2 * root), torch.inf)

    rule = stated(lambda x: root_where_positive(x, 1.0), bwd)
    with pytest.warns(UserWarning, match=r"both give infinity at args\.x\[1\]"):
        rule(v(2.0, -1.0).requires_grad_())


def test_infinity_that_is_right_passes():
    rule = stated(lambda x: x * torch.inf, lambda residuals, g: g * torch.inf)
    rule(v(1.0, 2.0).requires_grad_())
    assert rule.reports[0].outcome == "passed"


def test_jvp_rules_are_checked_too():
    @gt.custom_jvp
    def sine(x):
        return torch.sin(x)

    @sine.defjvp
    def _(primals, tangents):
        return torch.sin(primals[0]), tangents[0] * torch.cos(primals[0]) * 2

    with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
        sine.gradcheck(spread())


def test_probe_replaces_the_arguments_of_the_call():
    seen = []

    def bwd(residuals, g):
        seen.append(tuple(g.shape))
        return g * residuals[0][0].cos()

    rule = stated(torch.sin, bwd, probe=lambda: (spread(2),))
    rule.gradcheck(spread(1000))
    assert set(seen) == {(2,)}
