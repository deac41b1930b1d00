"""What the error says of a mistake: which argument, where, and what it looks like."""

import inspect
import pickle
import re
import types

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


X, W, SQUARE, BIAS = numbers(4, 5), numbers(4, 5, seed=1), numbers(5, 5), numbers(5)
Z = torch.complex(numbers(6), numbers(6, seed=1))


def elementwise(x, w):
    return torch.sin(x) * w**2


def right(x, w, g):
    return g * x.cos() * w**2, g * x.sin() * 2 * w


def spoilt(change_x=lambda c: c, change_w=lambda c: c):
    """Return bwd of ``elementwise`` with changed cotangents."""

    def bwd(residuals, g):
        c, d = right(*residuals[0], g)
        return change_x(c), change_w(d)

    return bwd


def one_of_many(c):
    c = c.clone()
    c[1, 3] *= 1.5
    return c


TABLE = {
    # name: (fun, bwd, args, kind, sentence, argument)
    "sign": (
        elementwise,
        spoilt(torch.neg),
        (X, W),
        "sign",
        "it has the wrong sign",
        "args.x",
    ),
    "factor": (
        elementwise,
        spoilt(lambda c: 2 * c),
        (X, W),
        "factor",
        "it is 2 times what it should be",
        "args.x",
    ),
    "one per cent": (
        elementwise,
        spoilt(change_w=lambda c: 1.01 * c),
        (X, W),
        "factor",
        "it is 1.01 times",
        "args.w",
    ),
    "zero": (
        elementwise,
        spoilt(torch.zeros_like),
        (X, W),
        "zero",
        "it is zero, and should not be",
        "args.x",
    ),
    "none": (
        elementwise,
        spoilt(lambda c: None),
        (X, W),
        "zero",
        "it is zero, and should not be",
        "args.x",
    ),
    "should be zero": (
        lambda x: torch.floor(x) * 0 + 1,
        lambda r, g: g,
        (X + 0.3,),
        "zero",
        "it should be zero",
        "args.x",
    ),
    "mean for sum": (
        lambda x, b: x + b,
        lambda r, g: (g, g.mean(0)),
        (X, BIAS),
        "mean for sum",
        "a mean over 4 numbers",
        "args.b",
    ),
    "missing sum": (
        lambda x, b: x * b,
        lambda r, g: (g * r[0][1], (g * r[0][0])[0]),
        (X, BIAS),
        "missing sum",
        "lacks the sum over dimension 0 of the output, of size 4",
        "args.b",
    ),
    "missing sums": (
        lambda x, b: x * b,
        lambda r, g: (g * r[0][1], (g * r[0][0])[0, 0]),
        (X, torch.tensor(1.5).double()),
        "missing sum",
        "lacks the sum over dimensions 0, 1",
        "args.b",
    ),
    "transpose": (
        lambda a: (a @ a).sum(0),
        lambda r, g: ((g.expand(5, 5) @ r[0][0].mT) + r[0][0].mT @ g.expand(5, 5)).mT,
        (SQUARE,),
        "transpose",
        "it is transposed",
        "args.a",
    ),
    "swapped": (
        elementwise,
        lambda r, g: right(*r[0], g)[::-1],
        (X, W),
        "swapped",
        "it is what args.[wx] should get",
        "args.",
    ),
    "one element": (
        elementwise,
        spoilt(one_of_many),
        (numbers(12, 5), numbers(12, 5, seed=1)),
        "element",
        r"1 of 60 elements is wrong, such as args.x\[1, 3\]",
        "args.x[1, 3]",
    ),
    "negative": (
        torch.sin,
        lambda r, g: g * r[0][0].cos() * torch.where(r[0][0] < 0, 1.5, 1),
        (X,),
        "region",
        "it is wrong only where args\\[0\\] < 0",
        "args.args[0]",
    ),
    "large": (
        torch.sin,
        lambda r, g: g * r[0][0].cos() * torch.where(r[0][0].abs() > 5, 1.5, 1),
        (X,),
        "large",
        r"wrong only where \|args\[0\]\| is large",
        "args.args[0]",
    ),
    "positive": (
        torch.sin,
        lambda r, g: g * r[0][0].cos() * torch.where(r[0][0] > 0, 1.5, 1),
        (X,),
        "region",
        "it is wrong only where args\\[0\\] > 0",
        "args.args[0]",
    ),
    "large, within the arguments": (
        torch.sin,
        lambda r, g: g * r[0][0].cos() * torch.where(r[0][0].abs() > 1, 1.5, 1),
        (X,),
        "large",
        r"wrong only where \|args\[0\]\| is large, 1\.\d+ or more",
        "args.args[0]",
    ),
    "one of thirty": (
        elementwise,
        spoilt(one_of_many),
        (numbers(6, 5), numbers(6, 5, seed=1)),
        "element",
        r"1 of 30 elements is wrong, such as args.x\[1, 3\]",
        "args.x[1, 3]",
    ),
    "a term like w": (
        lambda x, w: torch.sin(x) + 0.3 * x * w,
        lambda r, g: (g * r[0][0].cos(), 0.3 * g * r[0][0]),
        (X, W),
        "term",
        r"that is proportional to the cotangent times args\.w$",
        "args.x",
    ),
    "shift": (
        elementwise,
        spoilt(lambda c: c.roll(1, -1)),
        (X, W),
        "shift",
        "shifted by one, along the last dim",
        "args.x",
    ),
    "conjugate": (
        lambda z: z**3,
        lambda r, g: 3 * g.conj() * r[0][0] ** 2,
        (Z,),
        "conjugate",
        "the complex conjugate",
        "args.z",
    ),
    "not finite": (
        elementwise,
        spoilt(lambda c: c / 0 * 0),
        (X, W),
        "not finite",
        "20 of its numbers are NaN",
        "args.x",
    ),
    "softmax without its sum": (
        lambda x: torch.softmax(x, 0),
        lambda r, g: g * r[1],
        (X,),
        "term",
        "along dimension 0 it is proportional to the output$",
        "args.x",
    ),
    "log_softmax summed over the wrong dimension": (
        lambda x: torch.log_softmax(x, 1),
        lambda r, g: g - r[1].exp() * g.sum(0, keepdim=True),
        (numbers(5, 5),),
        "term",
        "a term is missing, or there is one too many$",
        "args.x",
    ),
    "centred with the wrong sign": (
        lambda x: x - x.mean(1, keepdim=True),
        lambda r, g: g + g.mean(1, keepdim=True),
        (numbers(5, 6),),
        "term",
        "along dimension 1 it is constant, as a mean or a sum is$",
        "args.x",
    ),
    "a term like the argument": (
        lambda x: (x**2).sum(),
        lambda r, g: g * (2 * r[0][0] + 0.7 * r[0][0].abs().sqrt() * r[0][0].sign()),
        (X,),
        "term",
        "a term is missing, or there is one too many",
        "args.x",
    ),
}


def opaque(fun):
    def hidden(*args):
        with torch.no_grad():
            return fun(*(x.detach() for x in args)).detach()

    if isinstance(fun, types.FunctionType):
        hidden.__signature__ = inspect.signature(fun)
    return hidden


def caught(fun, bwd, args):
    rule = gt.custom_vjp(fun)
    rule.def_bwd(bwd)
    with pytest.raises(gt.GradientMismatchError) as error:
        rule(*(x.clone().requires_grad_() for x in args))
    return error.value, rule


@pytest.mark.parametrize("is_opaque", [False, True], ids=["autograd", "differences"])
@pytest.mark.parametrize("name", TABLE)
def test_the_mistake_is_named(name, is_opaque):
    fun, bwd, args, kind, words, where = TABLE[name]
    error, _ = caught(opaque(fun) if is_opaque else fun, bwd, args)
    assert error.kind == kind
    assert error.what.startswith(f"{error.rule.split(' ')[0]}: ")
    assert re.search(words, error.what), error.what
    assert error.violations[0].where.startswith(where)
    by = "differences" if is_opaque else "autograd"
    assert f"by {by}" in error.violations[0].expected


def test_the_worst_element_has_its_index_and_both_values():
    closed = []

    def bwd(residuals, g):
        closed.append(float(right(*residuals[0], g)[0][1, 3]))
        return spoilt(one_of_many)(residuals, g)

    error, _ = caught(elementwise, bwd, (X, W))
    worst = error.violations[0]
    assert worst.where == "args.x[1, 3]"
    expected, got = float(worst.expected.split(",")[0]), float(worst.got.split(",")[0])
    assert_close(got, 1.5 * expected, rtol=1e-4, atol=0)
    assert min(abs(value / expected - 1) for value in closed) < 1e-5


def test_an_argument_inside_a_pytree_has_its_path():
    error, _ = caught_with_tree()
    assert error.violations[0].where.startswith("args.params['w']")


def caught_with_tree():
    rule = gt.custom_vjp(lambda params, x: x @ params["w"] + params["b"])

    @rule.def_bwd
    def _(residuals, g):
        (params, x), _ = residuals
        return {"params": {"w": -x.T @ g, "b": g.sum(0)}, "x": g @ params["w"].T}

    with pytest.raises(gt.GradientMismatchError, match="wrong sign") as error:
        rule.gradcheck({"w": numbers(5, 2), "b": numbers(2)}, X)
    return error.value, rule


CLIPS = {
    "clipped at 0.1": lambda c: c.clamp(-0.1, 0.1),
    "clipped at 20": lambda c: c.clamp(-20, 20),
    "not linear in the cotangent": torch.abs,
    "multiples of one disagree": lambda c: c + 1.0,
}


@pytest.mark.parametrize("is_opaque", [False, True], ids=["autograd", "differences"])
@pytest.mark.parametrize("words", CLIPS)
def test_a_bwd_that_is_not_linear_is_named(words, is_opaque):
    fun = opaque(elementwise) if is_opaque else elementwise
    error, _ = caught(fun, spoilt(CLIPS[words]), (X, W))
    assert error.kind == "not linear"
    assert words in error.what
    assert "args.x" in error.what
    assert "Surrogate" in error.fix


FWDS = {
    "a value that differs by 1.0e-02": lambda x: x.sin() * 1.01,
    "a value that differs by inf": lambda x: torch.where(x > 1, torch.nan, x.sin()),
    "shape (1, 4, 5)": lambda x: x.sin()[None],
    "torch.float32": lambda x: x.sin().float(),
    "2 tensors": lambda x: (x.sin(), x),
}


@pytest.mark.parametrize("is_opaque", [False, True], ids=["autograd", "differences"])
@pytest.mark.parametrize("words", FWDS)
def test_a_fwd_that_is_not_the_function_is_named(words, is_opaque):
    rule = gt.custom_vjp(opaque(torch.sin) if is_opaque else torch.sin)
    rule.defvjp(lambda x: (FWDS[words](x), x), lambda x, g: g * x.cos())
    with pytest.raises(gt.GradientMismatchError, match="fwd does not return") as error:
        rule(X.clone().requires_grad_())
    (violation,) = error.value.violations
    assert (error.value.kind, violation.where) == ("fwd", "output 0")
    assert words in violation.got


def test_a_second_derivative_that_a_detach_spoils_is_named():
    rule = gt.custom_vjp(lambda x: x**3 / 3)
    rule.defvjp(lambda x: (x**3 / 3, x), lambda x, g: g * x * x.detach())
    x = X.clone().requires_grad_()
    out = rule(x).sum()
    (first,) = torch.autograd.grad(out, x, retain_graph=True)
    assert_close(first, X**2)
    with pytest.raises(gt.GradientMismatchError, match="second derivative in") as error:
        torch.autograd.grad(out, x, create_graph=True)
    assert error.value.kind == "second derivative"
    assert error.value.violations[0].where == "second derivative in args.x"
    assert rule.reports[0].outcome == "failed"


@pytest.mark.parametrize("is_opaque", [False, True], ids=["autograd", "differences"])
def test_of_several_wrong_arguments_one_is_named(is_opaque):
    fun = opaque(elementwise) if is_opaque else elementwise
    error, _ = caught(fun, spoilt(torch.neg, torch.neg), (X, W))
    (named,) = re.findall(r"args\.\w+", error.what)
    assert named in {"args.x", "args.w"}
    assert error.kind == "sign"
    assert all(item.where.startswith(named) for item in error.violations)


def test_the_error_survives_pickling_with_its_kind():
    error, _ = caught(elementwise, spoilt(torch.neg), (X, W))
    again = pickle.loads(pickle.dumps(error))
    assert (again.kind, str(again)) == ("sign", str(error))


def test_a_failure_leaves_its_report_and_the_pictures_data():
    _, rule = caught(elementwise, spoilt(torch.neg), (X, W))
    (report,) = rule.reports
    assert report.outcome == "failed"
    assert "failed" in {item.outcome for item in report.evidence}
    assert isinstance(report.failure, gt.GradientMismatchError)
    assert report.figures == ()
    with pytest.raises(gt.GradientMismatchError, match="wrong sign"):
        rule.gradcheck(X, W)
    first, second = rule.reports[0].figures
    assert (first.where, first.shape, first.source) == ("args.x", (4, 5), "autograd")
    assert_close(first.analytic, -first.reference)
    assert_close(second.analytic, second.reference)
    assert second.errors.min() < 1e-8


def test_the_pictures_data_of_a_right_rule_agree():
    rule = gt.custom_vjp(elementwise)
    rule.def_bwd(spoilt())
    first, second = rule.gradcheck(X, W).figures
    assert [first.where, second.where] == ["args.x", "args.w"]
    for item in (first, second):
        assert item.shape == (4, 5)
        assert item.places.tolist() == list(range(20))
        assert_close(item.analytic, item.reference)


def test_half_of_a_derivative_of_two_numbers_is_no_mean():
    error, _ = caught(lambda x: 2 * x, lambda r, g: g, (numbers(2),))
    assert error.what.endswith("it is 0.5 times what it should be")
