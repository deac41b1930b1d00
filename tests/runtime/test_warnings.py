"""Every warning of gradtools points at the line of the user that brought it about."""

import ast
import inspect
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gradtools as gt

PACKAGE = Path(gt.__file__).parent


def test_one_place_issues_all_of_them():
    users = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("warnings.warn", "warnings.warn_explicit")
    }
    assert users == {"warning.py"}


def here():
    """Return the line of the caller."""
    return inspect.currentframe().f_back.f_lineno


def sparse():
    """Return an argument that no check can move, and that is no reason to fail."""
    return torch.eye(2).to_sparse().requires_grad_()


def fresh():
    """Return a rule that has not warned yet."""

    @gt.custom_vjp
    def double(x):
        return x * 2

    double.def_bwd(lambda residuals, g: g * 2)
    return double


def model():
    class Fresh:
        double = fresh_method()

    return Fresh()


def fresh_method():
    @gt.custom_vjp
    def double(self, x):
        return x * 2

    double.def_bwd(lambda residuals, g: (None, g * 2))
    return double


def direct():
    rule, x = fresh(), sparse()
    return here(), rule(x)


def by_keyword():
    rule, x = fresh(), sparse()
    return here(), rule(x=x)


def method():
    owner, x = model(), sparse()
    return here(), owner.double(x)


def nested():
    rule, x, lines = fresh(), sparse(), []

    def inner(x):
        lines.append(here() + 1)
        return rule(x)

    checkpoint(inner, x, use_reentrant=False)
    return lines[0], None


def full_check():
    rule, x = fresh(), sparse()
    report = rule.gradcheck(x)
    assert report.outcome == "not checked"
    return here(), rule(x)


def in_a_thread():
    rule, x, lines = fresh(), sparse(), []

    def work():
        lines.append(here() + 1)
        rule(x)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return lines[0], None


def meta_in_vmap():
    rule, x = fresh(), torch.ones(3, 2, device="meta", requires_grad=True)
    return here(), torch.func.vmap(rule)(x)


def meta_in_grad():
    rule, x = fresh(), torch.ones(2, device="meta")
    return here(), torch.func.grad(lambda x: rule(x).sum())(x)


def in_backward():
    """A second derivative is checked on what is left of a large argument."""

    @gt.custom_vjp
    def cube(x):
        if x.flatten()[-1] < 1.5:
            raise ValueError("not these numbers")
        return x**3

    cube.def_bwd(lambda residuals, g: 3 * g * residuals[0][0] ** 2)
    x = torch.linspace(1.0, 2.0, 2**17).requires_grad_()
    out = cube(x).sum()
    return here(), torch.autograd.grad(out, x, create_graph=True)


def compiled():
    @gt.custom_vjp
    def rule(x):
        if gt.is_checking():
            raise ValueError("not what was made up")
        return x * 2

    rule.def_bwd(lambda residuals, g: g * 2)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x):
        return rule(x).sum()

    x = torch.eye(2).requires_grad_()
    return here(), step(x)


def exported():
    rule = fresh()

    class Layer(torch.nn.Module):
        def forward(self, x):
            return rule(x)

    layer, x = Layer(), torch.ones(2, requires_grad=True)
    return here(), torch.export.export(layer, (x,), strict=True)


def exported_without_dynamo():
    rule = fresh()

    class Layer(torch.nn.Module):
        def forward(self, x):
            return here(), rule(x)

    x = torch.ones(2, requires_grad=True)
    program = torch.export.export(Layer(), (x,), strict=False)
    return program.module()(x)


OURS = ("gradtools did not check", "torch.export keeps")
CASES = [direct, by_keyword, method, nested, full_check, in_a_thread, meta_in_vmap]
CASES += [meta_in_grad, in_backward, compiled, exported]
CASES += [exported_without_dynamo]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_warning_points_at_the_line_of_its_caller(case):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line, _ = case()
    ours = [each for each in caught if str(each.message).startswith(OURS)]
    assert ours, [str(each.message) for each in caught]
    for each in ours:
        assert each.category is UserWarning
        assert (each.filename, each.lineno) == (__file__, line), each.message


def test_filters_see_the_module_of_the_user():
    rule, x = fresh(), sparse()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=__name__.replace(".", r"\."))
        rule(x)
    rule = fresh()
    with pytest.raises(UserWarning, match="did not check"):
        rule(x)


def test_a_batch_without_values_is_not_checked_and_says_so():
    x = torch.ones(3, 2, device="meta", requires_grad=True)
    with pytest.warns(UserWarning, match="did not check .* meta tensors"):
        assert torch.func.vmap(fresh())(x).shape == (3, 2)
