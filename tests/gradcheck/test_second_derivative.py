"""A first derivative may be right and its derivative wrong: then there is no second."""

import pytest
import torch

import gradtools as gt


def x():
    return torch.linspace(0.2, 1.0, 4)


def stated(fun, fwd, bwd, **options):
    rule = gt.custom_vjp(fun, **options)
    rule.defvjp(fwd, bwd)
    return rule


def half_detached_bwd():
    return stated(
        lambda x: x**3,
        lambda x: (x**3, x),
        lambda x, g: 3 * g * x * x.detach(),
    )


def half_detached_fwd():
    return stated(
        lambda x: x**3,
        lambda x: (x**3, 3 * x * x.detach()),
        lambda slope, g: g * slope,
    )


def double_backward(f):
    arg = x().requires_grad_()
    (first,) = torch.autograd.grad(f(arg).sum(), arg, create_graph=True)
    return torch.autograd.grad(first.sum(), arg)


SECOND = {
    "double backward": double_backward,
    "grad of grad": lambda f: torch.func.grad(
        lambda x: torch.func.grad(lambda x: f(x).sum())(x).sum()
    )(x()),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum())(x()),
    "jacfwd of jacfwd": lambda f: torch.func.jacfwd(torch.func.jacfwd(f))(x()),
}


@pytest.mark.parametrize("use", SECOND)
@pytest.mark.parametrize("made", [half_detached_bwd, half_detached_fwd])
def test_it_is_refused_where_it_is_asked_for(made, use):
    with pytest.raises(
        gt.GradientMismatchError, match=r"the second derivative in args\.x"
    ) as e:
        SECOND[use](made())
    assert "detach" in e.value.fix


@pytest.mark.parametrize("made", [half_detached_bwd, half_detached_fwd])
def test_the_first_derivative_is_not_touched(made):
    rule, arg = made(), x().requires_grad_()
    (grad,) = torch.autograd.grad(rule(arg).sum(), arg)
    torch.testing.assert_close(grad, 3 * arg**2)
    per_sample = torch.func.vmap(torch.func.grad(rule))(x())
    torch.testing.assert_close(per_sample, 3 * x() ** 2)
    (report,) = {id(r): r for r in rule.reports if "(4,)" in r.signature}.values()
    assert report.outcome == "passed"
    assert all(item.capability != "second order" for item in report.evidence)


def test_the_error_of_each_use_is_its_own():
    rule, errors = half_detached_bwd(), []
    for _ in range(2):
        with pytest.raises(
            gt.GradientMismatchError, match="by differentiating bwd"
        ) as e:
            double_backward(rule)
        errors.append(e.value)
    assert errors[0] is not errors[1]


def sigmoid_fwd(x):
    s = torch.sigmoid(x)
    return s, s * (1 - s)


def product_fwd(x):
    e = torch.exp(x)
    return x * e, (x, e, x * e)


RIGHT = {
    "residual is the output": (
        torch.exp,
        lambda x: (torch.exp(x),) * 2,
        lambda y, g: g * y,
    ),
    "residual is the input": (
        lambda x: x**3,
        lambda x: (x**3, x),
        lambda x, g: 3 * g * x * x,
    ),
    "residual is computed": (
        torch.sigmoid,
        sigmoid_fwd,
        lambda slope, g: g * slope,
    ),
    "residual is all of them": (
        lambda x: x * torch.exp(x),
        product_fwd,
        lambda r, g: g * (r[1] + r[2]),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_one_passes(name):
    rule = stated(*RIGHT[name])
    double_backward(rule)
    (report,) = rule.reports
    second = [e for e in report.evidence if e.capability == "second order"]
    assert [item.outcome for item in second] == ["passed"] * 2
    assert second[-1].question == "second derivative by differences"


@pytest.mark.parametrize(
    "options",
    [
        {"once_differentiable": True},
        {"contract": gt.Surrogate()},
        {"contract": gt.Approximate(rel=0.5)},
    ],
)
def test_it_is_not_asked_of_rules_that_claim_none(options):
    rule = half_detached_bwd()
    other = stated(rule.rule.fun, rule.rule.fwd, rule.rule.bwd, **options)
    report = other.gradcheck(x())
    assert report.outcome == "passed"


def float32_only(bwd):
    kernel = gt.external(
        lambda g, x: g * x, out=lambda g, x: x, dtypes=torch.float32, numpy=True
    )
    kernel.def_bwd(bwd)
    return kernel


def second_in_g(kernel):
    g, y = torch.ones(4, dtype=torch.float32), torch.linspace(1, 2, 4).float()
    grad = torch.func.grad(lambda g: kernel(g, y).sum())
    return torch.func.grad(lambda g: grad(g).sum())(g)


def test_a_second_derivative_of_zero_is_checked_in_single_precision():
    """Differences of float32 find none, and no warning says that nobody looked."""
    kernel = float32_only(lambda r, c: (c * r[0][1], c * r[0][0]))
    assert second_in_g(kernel).tolist() == [0, 0, 0, 0]
    evidence = kernel.reports[0].evidence
    (found,) = [e for e in evidence if e.question.startswith("second derivative")]
    assert found.outcome == "passed"
    assert "zero, and differences find none" in found.detail
    assert 0 < found.error < 1e-4


def test_a_second_derivative_that_is_zero_by_mistake_is_found_in_single_precision():
    square = gt.external(
        lambda x: x * x, out=lambda x: x, dtypes=torch.float32, numpy=True
    )
    square.def_bwd(lambda r, g: 2 * g * r[0][0].detach() + 0 * r[0][0])
    grad = torch.func.grad(lambda x: square(x).sum())
    with pytest.raises(gt.GradientMismatchError, match=r"second derivative in args\.x"):
        torch.func.grad(lambda x: grad(x).sum())(torch.linspace(1, 2, 4).float())
