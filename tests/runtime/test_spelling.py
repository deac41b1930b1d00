"""A misspelled keyword argument is an error that names the right one.

The cases are read off the signatures: a new keyword argument is covered by being there.
"""

import inspect
import re

import pytest
import torch

import gradtools as gt
import gradtools.testing
from gradtools.__main__ import main
from gradtools.gradcheck.report import Report
from gradtools.rules.custom_jvp import CustomJVP
from gradtools.rules.custom_vjp import CustomVJP, StatedRule
from gradtools.second_order.operators import CurvatureOperator
from gradtools.spelling import suggestion

CALLABLES = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (gt, gradtools.testing)
    for name in module.__all__
}
MACHINERY = {"run_entries", "plan_for_check", "before_trace", "write_for_trace"}
MACHINERY |= {"at", "apart", "with_more"}
METHODS = {
    f"{cls.__name__}.{name}": function
    for cls in (CustomVJP, CustomJVP, CurvatureOperator, Report)
    for name, function in inspect.getmembers(cls, inspect.isfunction)
    if name[0] != "_" and name not in MACHINERY
}


def keywords(function):
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in kinds and name != "self"
    ]


def typos(name, known):
    """Return what slips of the finger make of a name: a letter twice, lost, swapped."""
    found = {name + name[-1], name.upper()}
    for i in range(len(name) - 1):
        found.add(name[:i] + name[i + 1] + name[i] + name[i + 2 :])
    if len(name) > 3:
        found |= {name[:i] + name[i + 1 :] for i in range(len(name))}
    return sorted(found - set(known) - {name})


CASES = [
    (where, name)
    for where, function in (CALLABLES | METHODS).items()
    for name in keywords(function)
]


@pytest.mark.parametrize(("where", "name"), CASES)
def test_a_misspelled_keyword_argument_names_the_right_one(where, name):
    function = (CALLABLES | METHODS)[where]
    known = keywords(function)
    first = [object()] if where in METHODS else []
    for typo in typos(name, known):
        with pytest.raises(
            gt.DefinitionError, match="unexpected keyword arg"
        ) as caught:
            function(*first, **{typo: None})
        assert repr(typo) in caught.value.what
        assert repr(name) in caught.value.fix, typo
        assert isinstance(caught.value, TypeError)


def test_the_cases_are_the_surface():
    for expected in (
        ("gradtools.hvp", "mode"),
        ("gradtools.vmap", "in_dims"),
        ("gradtools.clip_grad", "max"),  # a rule
        ("gradtools.Approximate", "rel"),
        ("gradtools.GradtoolsError", "violations"),
        ("gradtools.testing.check_grads", "order"),
        ("gradtools.testing.check_transforms", "rtol"),
        ("CustomVJP.defvjp", "bwd"),
        ("CurvatureOperator.block", "chunk"),
        ("Report.to_html", "path"),
    ):
        assert expected in CASES


@gt.custom_vjp
def swish(x, beta, *, scale=1.0):
    return scale * x * torch.sigmoid(beta * x)


class Layer:
    @gt.custom_vjp
    def scaled(self, x, factor=2.0):
        return factor * x


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("typo", ["bta", "betaa", "scal"])
def test_so_does_a_call_of_a_rule(typo, requires_grad):
    right = {"bta": "beta", "betaa": "beta", "scal": "scale"}[typo]
    x = torch.ones(2, requires_grad=requires_grad)
    for call in (swish, swish.gradcheck):
        with pytest.raises(gt.DefinitionError) as caught:
            call(x, **{typo: 1.0})
        assert str(caught.value) == (
            f"swish() got an unexpected keyword argument {typo!r}\n"
            f"  fix       Did you mean {right!r}?"
        )


def test_so_does_a_call_of_a_method():
    with pytest.raises(gt.DefinitionError, match="Did you mean 'factor'"):
        Layer().scaled(torch.ones(2), fctor=1.0)
    with pytest.raises(gt.DefinitionError, match="Did you mean 'factor'"):
        Layer().scaled.gradcheck(torch.ones(2), fctor=1.0)


def test_so_does_a_name_in_what_bwd_returns():
    @gt.custom_vjp
    def affine(weight, bias):
        return weight * 2 + bias

    affine.def_bwd(lambda residuals, g: {"wieght": 2 * g, "bias": g})
    leaf = torch.ones(2, requires_grad=True)
    with pytest.raises(gt.BackwardContractError) as caught:
        affine(leaf, leaf).sum().backward()
    assert "Did you mean 'weight'?" in str(caught.value)


def test_so_does_a_name_of_a_nondiff_argument():
    with pytest.raises(gt.DefinitionError, match="Did you mean 'beta'") as caught:
        gt.custom_vjp(nondiff_argnames="bteta")(lambda x, beta: x)
    assert "'bteta'" in caught.value.what


@pytest.mark.parametrize(
    ("typo", "right"), [("--htlm", "--html"), ("--hml=x", "--html")]
)
def test_so_does_an_option_of_the_command_line(typo, right, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["check", "tests.runtime.rules", typo])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"unrecognized arguments: {typo}" in error
    assert f"Did you mean '{right}'?" in error


def test_so_does_a_rule_or_a_command_of_the_command_line(capsys):
    assert main(["check", "tests.runtime.test_spelling:swihs"]) == 2
    assert "Did you mean 'swish'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["chek", "tests.runtime.test_spelling"])
    assert re.search(r"invalid choice: 'chek' .*check", capsys.readouterr().err)


def test_without_a_near_name_all_are_named():
    with pytest.raises(gt.DefinitionError, match="Use one of 'f', 'primals', "):
        gt.hvp(zzz=1)
    assert suggestion("tol", ["rtol", "atol"]) == "Did you mean 'rtol' or 'atol'?"
    assert suggestion("x", []) == "There is none."


@pytest.mark.parametrize("name", gt.__all__)
def test_what_is_public_keeps_its_signature(name):
    public = getattr(gt, name)
    parameters = inspect.signature(public).parameters
    assert "kwargs" not in parameters or name in ("args", "parts")
    if inspect.isfunction(public):
        private = inspect.unwrap(public)
        assert inspect.signature(public) == inspect.signature(private)
        assert public.__doc__ == private.__doc__
        assert public.__qualname__ == private.__qualname__


def test_compiled_code_goes_through():
    x = torch.tensor([0.3, 0.7])

    def product(x):
        return gt.vmap(lambda x: gt.stop_gradient(x=x) * x, in_dims=0)(x)

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), x * x)


def test_a_rule_pays_nothing():
    """No Python function lies between the caller and a rule's own __call__."""
    assert type(gt.clip_grad).__call__ is StatedRule.__call__
    assert not hasattr(StatedRule.__call__, "__wrapped__")
    assert not hasattr(CurvatureOperator.__call__, "__wrapped__")


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad])
def test_a_rule_in_compiled_code_names_it_too(transform):
    @gt.custom_vjp
    def scaled(x, *, factor=1.0):
        return x * factor

    scaled.def_bwd(lambda residuals, g: (g * residuals[0][1], None))
    step = torch.compile(
        transform(lambda x: scaled(x, facotr=2.0).sum()), backend="aot_eager"
    )
    with pytest.raises(TypeError, match=r"argument 'facotr'\n.*Did you mean 'factor'"):
        step(torch.ones(3))
