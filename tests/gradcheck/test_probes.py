"""The numbers on which a rule is checked: the call's own, as far as they can be."""

import warnings

import pytest
import torch

import gradtools as gt

WRONG = gt.GradientMismatchError
HALF, BFLOAT16 = torch.float16, torch.bfloat16
FLOAT, DOUBLE = torch.float32, torch.float64


def stated(fun, slope, factor=1.0, **options):
    """A rule of one argument, by its slope, from the argument."""
    rule = gt.custom_vjp(fun, **options)
    rule.def_bwd(lambda residuals, g: g * (slope(residuals[0][0]) * factor))
    return rule


def v(*numbers, dtype=torch.float64):
    return torch.tensor(numbers, dtype=dtype)


def spread(*shape, dtype=torch.float64):
    count = torch.Size(shape).numel()
    return torch.cos(1.3 * torch.arange(count)).reshape(shape).to(dtype)


# Sizes.


def tanh(x):
    return torch.tanh(x)


def numpy_cube(x):
    return torch.from_numpy(x.detach().numpy() ** 3)


SIZED = {
    "tanh": (tanh, lambda x: 1 - torch.tanh(x) ** 2),
    "numpy": (numpy_cube, lambda x: 3 * x**2),
}


@pytest.mark.parametrize(
    "name", ["tanh", pytest.param("numpy", marks=pytest.mark.on_cpu)]
)
def test_the_first_check_takes_hardly_more_runs_where_the_size_grows(name):
    counts = []
    for size in (10**2, 10**4, 10**6, 10**7):
        rule = stated(*SIZED[name])
        rule(spread(size, dtype=FLOAT).requires_grad_())
        (report,) = rule.reports
        assert report.outcome == "passed"
        counts.append(report.evaluations)
    # a few more tell whether to cut the arguments, and look at all elements
    assert max(counts) <= 1.5 * min(counts)


@pytest.fixture(scope="module")
def huge():
    """2**26 numbers: too many for the memory that a check may take."""
    part = torch.cos(1.3 * torch.arange(2**16, dtype=torch.float64))
    return part.to(BFLOAT16).repeat(2**10)


def test_a_huge_argument_is_cut(huge):
    right = stated(torch.square, lambda x: 2 * x)
    right(huge.detach().requires_grad_())
    (report,) = right.reports
    assert report.outcome == "passed"
    assert report.signature.endswith(f"({2**26},) bfloat16")
    (cut,) = [e for e in report.evidence if e.question == "arguments"]
    assert "cut to" in cut.detail
    with pytest.raises(WRONG, match=r"1\.1 times what it should be"):
        stated(torch.square, lambda x: 2 * x, 1.1)(huge.detach().requires_grad_())


def test_where_cutting_breaks_the_function_nothing_is_checked(huge):
    def fun(x):
        return x.reshape(2**20, 64).square().sum(1)

    def bwd(residuals, g):
        ((x,), _) = residuals
        return (g[:, None].expand(-1, 64).flatten() * x).mul_(3)  # wrong

    rule = gt.custom_vjp(fun)
    rule.def_bwd(bwd)
    with pytest.warns(UserWarning, match=r"did not check the rule fun .*with probe="):
        rule(huge.detach().requires_grad_())
    assert [report.outcome for report in rule.reports] == ["not checked"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule(huge.detach().requires_grad_())  # said once


def test_a_large_output_of_a_small_argument_is_cut_too():
    def outer(x):
        return x[:, None] * x

    def made(factor):
        rule = gt.custom_vjp(outer)
        rule.def_bwd(lambda r, g: factor * ((g + g.mT) @ r[0][0]))
        return rule

    right = made(1.0)
    right(spread(5000, dtype=FLOAT).requires_grad_())
    (report,) = right.reports
    assert report.outcome == "passed"
    assert any(
        e.question == "arguments" and "cut to" in e.detail for e in report.evidence
    )
    with pytest.raises(WRONG, match=r"1\.1 times what it should be"):
        made(1.1)(spread(5000, dtype=FLOAT).requires_grad_())


# Domains, dtypes, layouts and kinks: right rules pass, wrong ones do not.


def only(fits):
    def fun(x):
        if not fits(x):
            raise RuntimeError("this is no such tensor")
        return torch.sin(x)

    return fun


def only_dtype(dtype):
    return only(lambda x: x.dtype == dtype)


def step(x):
    return (x > 0).to(x.dtype)


def at_max(x):
    return (x == x.max()).to(x.dtype)


LOGIT = (lambda p: p.log() + torch.log1p(-p), lambda p: 1 / p - 1 / (1 - p))
COS, TINY = torch.cos, v(1e-12, 3e-12, 1e-10)
CASES = {
    "log": (torch.log, torch.reciprocal, v(1e-8, 0.5, 2)),
    "log of tiny numbers": (torch.log, torch.reciprocal, TINY),
    "sqrt": (torch.sqrt, lambda x: 0.5 / x.sqrt(), v(1e-6, 1, 4)),
    "a power of tiny numbers": (lambda x: x**0.5, lambda x: 0.5 * x**-0.5, TINY),
    "acos": (torch.acos, lambda x: -((1 - x * x) ** -0.5), v(-0.999, 0, 0.5, 0.99)),
    "probabilities": (*LOGIT, v(0.001, 0.2, 0.9, 0.999)),
    "sure probabilities": (*LOGIT, v(1e-7, 0.3, 1 - 1e-7)),
    "probabilities in float32": (*LOGIT, v(0.001, 0.2, 0.9, 0.999, dtype=FLOAT)),
    "no float64": (only(lambda x: x.dtype != DOUBLE), COS, spread(20, dtype=FLOAT)),
    "float32 only": (only_dtype(FLOAT), COS, spread(20, dtype=FLOAT)),
    "float16 only": (only_dtype(HALF), COS, spread(20, dtype=HALF)),
    "bfloat16 only": (only_dtype(BFLOAT16), COS, spread(20, dtype=BFLOAT16)),
    "contiguous only": (only(torch.Tensor.is_contiguous), COS, spread(4, 5)),
    "0-d": (torch.sin, COS, v(0.5).sum()),
    "transposed": (torch.sin, COS, spread(3, 4).t()),
    "strided": (torch.sin, COS, spread(10)[::3]),
    "permuted": (torch.sin, COS, spread(2, 3, 4, 5).permute(0, 3, 1, 2)),
    "expanded": (torch.sin, COS, spread(3, 1).expand(3, 4)),
    "expanded scalar": (torch.sin, COS, v(0.5).sum().expand(5)),
    "relu at zeros": (torch.relu, step, torch.zeros(5)),
    "relu in float32": (torch.relu, step, torch.zeros(5, dtype=FLOAT)),
    "abs": (torch.abs, torch.sign, v(0, 0, 1, -1)),
    "max at ties": (torch.max, at_max, v(1, 1, 1, 0)),
    "max of zeros": (torch.max, at_max, torch.zeros(4)),
    "clamp at its edges": (
        lambda x: x.clamp(0, 1),
        lambda x: ((x >= 0) & (x <= 1)).to(x.dtype),
        v(0, 0.5, 1, 2),
    ),
}


def of_case(name):
    fun, slope, arg = CASES[name]
    return fun, slope, arg.detach().requires_grad_()


@pytest.mark.parametrize("name", CASES)
def test_a_right_rule_passes_at_its_first_call(name):
    fun, slope, arg = of_case(name)
    rule = stated(fun, slope)
    rule(arg)
    assert [report.outcome for report in rule.reports] == ["passed"]


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_factor_is_found_at_the_first_call(name):
    fun, slope, arg = of_case(name)
    factor = 1.5 if arg.dtype in {HALF, BFLOAT16} else 1.1
    rule = stated(fun, slope, factor)
    with pytest.raises(WRONG, match="not the derivative"):
        rule(arg)


def gathered(x, index):
    return x.gather(0, index)


def gathered_bwd(x, index, g):
    return torch.zeros_like(x).scatter_add(0, index, g)


def embedded(x, index):
    return torch.nn.functional.embedding(index, x)


def embedded_bwd(x, index, g):
    return torch.zeros_like(x).index_add(0, index.flatten(), g.flatten(0, -2))


INDEXED = {
    "gather": (gathered, gathered_bwd, spread(5), torch.tensor([0, 4, 4, 2])),
    "embedding": (embedded, embedded_bwd, spread(5, 3), torch.tensor([[0, 4], [4, 2]])),
    "int32": (embedded, embedded_bwd, spread(5, 3), torch.tensor([0, 4]).int()),
    "no index": (gathered, gathered_bwd, spread(5), torch.zeros(0).long()),
    "no numbers": (gathered, gathered_bwd, spread(0), torch.zeros(0).long()),
    "no words": (embedded, embedded_bwd, spread(5, 3), torch.zeros(2, 0).long()),
}


@pytest.mark.parametrize("name", INDEXED)
def test_integer_arguments_stay_as_they_are(name):
    fun, bwd, x, index = INDEXED[name]
    for factor in (1, 2):
        rule = gt.custom_vjp(fun)
        rule.def_bwd(lambda r, g: (factor * bwd(*r[0], g), None))
        arg = x.detach().requires_grad_()
        if factor == 1 or index.numel() == 0:
            rule(arg, index)
            (report,) = rule.reports
            assert report.outcome == "passed"
            assert report.signature.startswith(f"x: {tuple(x.shape)} float64")
        else:
            with pytest.raises(WRONG, match="2 times what it should be"):
                rule(arg, index)


# probe=


def test_a_probe_is_used_in_the_place_of_the_arguments():
    shapes = set()

    def fun(x, w):
        if gt.is_checking():
            shapes.add((tuple(x.shape), tuple(w.shape)))
        return x * w

    rule = gt.custom_vjp(fun, probe=lambda: (spread(2), spread(1)))
    rule.def_bwd(lambda r, g: (g * r[0][1], (g * r[0][0]).sum_to_size(r[0][1].shape)))
    rule(spread(7).requires_grad_(), spread(7).requires_grad_())
    (report,) = rule.reports
    assert report.outcome == "passed"
    assert report.signature == "x: (7,) float64, w: (7,) float64"
    assert (7,) not in {shape for pair in shapes for shape in pair}
    assert ((2,), (1,)) in shapes


def test_a_bare_tensor_is_one_argument():
    right, wrong = (
        stated(tanh, lambda x: 1 - torch.tanh(x) ** 2, factor, probe=lambda: spread(3))
        for factor in (1, 2)
    )
    right(torch.full((4,), 1e3).requires_grad_())  # where the slope is zero
    assert [report.outcome for report in right.reports] == ["passed"]
    with pytest.raises(WRONG, match="2 times what it should be"):
        wrong(torch.full((4,), 1e3).requires_grad_())


@pytest.mark.parametrize("values", [(), (1.0, 2.0), (1.0, 2.0, 3.0)])
def test_a_probe_of_another_number_of_arguments_is_an_error(values):
    rule = stated(tanh, COS, probe=lambda: tuple(map(v, values)))
    match = r"tanh: probe= does not return the arguments of the function"
    with pytest.raises(gt.DefinitionError, match=match) as caught:
        rule(spread(3).requires_grad_())
    assert caught.value.violations[0].where == "probe()"
    with pytest.raises(gt.DefinitionError, match=match):
        rule.gradcheck(spread(3))


def test_gradcheck_without_arguments_takes_those_of_the_probe():
    rule = stated(tanh, COS, probe=lambda: torch.full((3,), 0.5))
    with pytest.raises(gt.GradientMismatchError):
        rule.gradcheck()
    rule = stated(tanh, lambda x: 1 - torch.tanh(x) ** 2, probe=lambda: spread(3))
    report = rule.gradcheck()
    assert (report.outcome, report.signature) == ("passed", "x: (3,) float64")
