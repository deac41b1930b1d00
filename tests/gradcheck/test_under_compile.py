"""A rule that torch.compile meets first is checked while it is traced."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import gradtools as gt


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def sine(factor=1.0, log=None, **options):
    @gt.custom_vjp(**options)
    def sine(x, *rest):
        if log is not None and gt.is_checking():
            log.append(tuple(x.shape))
        return torch.sin(x)

    @sine.def_bwd
    def _(residuals, g):
        (x, *rest), _ = residuals
        return (factor * g * torch.cos(x), *(None for _ in rest))

    return sine


def x(*shape):
    return torch.linspace(0.1, 1.0, torch.Size(shape or (4,)).numel()).reshape(
        shape or (4,)
    )


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


USES = {
    "backward": lambda f: compiled(f)(x().requires_grad_()),
    "backward, dynamic": lambda f: compiled(f, dynamic=True)(x().requires_grad_()),
    "backward, backend eager": lambda f: compiled(f, "eager")(x().requires_grad_()),
    "intermediate result": lambda f: compiled(lambda x: f(x.exp() @ x.exp().T))(
        x(3, 3).requires_grad_()
    ),
    "grad": lambda f: compiled(torch.func.grad(lambda x: f(x).sum()))(x()),
    "vmap of grad": lambda f: compiled(
        torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))
    )(x(3, 4)),
    "int, str, None, list, dict": lambda f: compiled(
        lambda x: f(x, 3, "mode", None, [1, 2.0], {"k": 4})
    )(x().requires_grad_()),
    "indices": lambda f: compiled(f)(x().requires_grad_(), torch.arange(3)),
}


@pytest.mark.parametrize("use", USES)
def test_a_right_rule_is_checked_at_trace_time(use):
    rule = sine()
    USES[use](rule)
    assert {report.outcome for report in rule.reports} == {"passed"}
    assert "derivative in x by autograd" in str(rule.reports[0])


@pytest.mark.parametrize("use", [use for use in USES if "grad" not in use])
def test_a_wrong_rule_is_an_error_of_gradtools(use):
    rule = sine(2.0)
    for _ in range(2):
        with pytest.raises(gt.GradientMismatchError, match="it is 2 times what it sh"):
            USES[use](rule)


WRONG_UNDER_TRANSFORMS = """
    import torch, gradtools as gt
    from tests.gradcheck.test_under_compile import USES, compiled, sine, x

    for use in ("grad", "vmap of grad"):
        try:
            USES[use](sine(2.0))
        except gt.GradientMismatchError as error:
            print("first:", error.kind)

    cube = gt.custom_vjp(lambda x: x**3 / 3)
    cube.defvjp(lambda x: (x**3 / 3, x), lambda x, g: g * x * x.detach())
    again = torch.func.grad(
        lambda x: torch.func.grad(lambda x: cube(x).sum())(x).sum()
    )
    try:
        compiled(again)(x())
    except gt.GradientMismatchError as error:
        print("second:", error.kind)
"""


def test_a_wrong_rule_under_a_transform_is_too():
    # A failed trace leaves functorch levels behind: in a process of its own.
    code = textwrap.dedent(WRONG_UNDER_TRANSFORMS)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert run.stdout.split("\n")[:3] == [
        "first: factor",
        "first: factor",
        "second: second derivative",
    ], run.stderr


def test_a_batch_is_compared_with_a_loop_in_a_trace():
    @gt.custom_vjp(vmap="broadcast_all")
    def double(x):
        return 2 * x

    double.def_bwd(lambda residuals, g: 2 * g)
    USES["vmap of grad"](double)
    (report,) = double.reports
    assert [e.capability for e in report.evidence][-1] == "vmap"


def test_the_check_adds_no_guard_on_sizes():
    def frames(policy):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        rule = sine()
        function = torch.compile(rule, backend=counter, fullgraph=True, dynamic=True)
        with gt.gradcheck_policy(policy):
            for count in (4, 7, 9):
                arg = x(count).requires_grad_()
                (grad,) = torch.autograd.grad(function(arg).sum(), arg)
                assert_close(grad, x(count).cos())
        return counter.frame_count

    assert frames("first") == frames("off") < 3


@pytest.mark.parametrize("is_counter", [False, True], ids=["followed", "crossed"])
def test_two_sizes_share_one_compiled_function(is_counter):
    @gt.custom_vjp
    def sine(x):
        return torch.sin(x)

    sine.def_bwd(lambda residuals, g: g * residuals[0][0].cos())
    # A backend of unknown kind is crossed, and "aot_eager" by name is followed.
    backend = CompileCounterWithBackend("aot_eager") if is_counter else "aot_eager"
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    function = torch.compile(sine, backend=backend, fullgraph=True, dynamic=True)
    for count in (4, 7):
        arg = x(count).requires_grad_()
        (grad,) = torch.autograd.grad(function(arg).sum(), arg)
        assert_close(grad, x(count).cos())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    assert not is_counter or backend.frame_count == 1
    assert [report.outcome for report in sine.reports] == ["passed"]


def test_numbers_are_made_up_in_the_domain_of_the_function():
    @gt.custom_vjp
    def log(x):
        return torch.log(x)

    log.def_bwd(lambda residuals, g: g / residuals[0][0])
    compiled(log)(x().requires_grad_())
    assert [report.outcome for report in log.reports] == ["passed"]


def test_a_function_that_takes_no_such_numbers_goes_unchecked_with_a_warning():
    @gt.custom_vjp
    def picky(x):
        if gt.is_checking() and bool((x < 5).any()):
            raise ValueError("below 5")
        return 2 * x

    picky.def_bwd(lambda residuals, g: 2 * g)
    with pytest.warns(
        UserWarning, match="on made-up ones the function raises ValueErr"
    ):
        out = compiled(picky)((x() + 5).requires_grad_())
    assert_close(out, 2 * (x() + 5))
    assert [report.outcome for report in picky.reports] == ["not checked"]


def test_probe_is_used_in_a_trace():
    log = []
    compiled(sine(log=log, probe=lambda: (torch.ones(2, 3),)))(x().requires_grad_())
    assert set(log) == {(2, 3)}


def test_a_rule_checked_before_is_not_examined_again():
    log = []
    rule = sine(log=log)
    rule(x().requires_grad_())
    count = len(log)
    compiled(rule)(x().requires_grad_())
    assert len(log) == count > 0


@pytest.mark.parametrize("policy", ["off", "first"])
def test_nothing_is_checked_under_policy_off_or_without_a_gradient(policy):
    rule = sine(2.0)
    with warnings.catch_warnings(), gt.gradcheck_policy(policy):
        warnings.simplefilter("error", UserWarning)
        compiled(rule)(x().requires_grad_(policy == "off"))
    outcomes = [report.outcome for report in rule.reports]
    assert outcomes == (["not checked"] if policy == "off" else [])


def test_nothing_is_checked_under_no_grad():
    rule = sine(2.0)
    with torch.no_grad():
        out = compiled(rule)(x().requires_grad_())
    assert_close(out, x().sin())
    assert rule.reports == ()


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_what_was_checked_in_a_trace_gives_the_right_numbers(backend, dynamic):
    rule, arg = sine(), x().requires_grad_()
    out = compiled(rule, backend, dynamic=dynamic)(arg)
    assert_close(out, x().sin())
    assert_close(torch.autograd.grad(out.sum(), arg)[0], x().cos())
    assert [report.outcome for report in rule.reports] == ["passed"]


def test_a_function_whose_trace_failed_fails_again_with_the_same_error():
    function, errors = compiled(sine(2.0)), []
    for _ in range(2):
        with pytest.raises(gt.GradientMismatchError, match="it is 2 times") as error:
            function(x().requires_grad_())
        errors.append(error.value)
    assert errors[0] is not errors[1]
    assert str(errors[0]) == str(errors[1])
    assert errors[0].kind == errors[1].kind == "factor"


def test_indices_are_made_up_as_zeros():
    seen = []

    @gt.custom_vjp
    def pick(x, index):
        if gt.is_checking():
            seen.append(index.tolist())
        return x[index]

    @pick.def_bwd
    def _(residuals, g):
        (x, index), _ = residuals
        return torch.zeros_like(x).index_add(0, index, g), None

    out = compiled(pick)(x().requires_grad_(), torch.tensor([1, 3]))
    assert_close(out, x()[[1, 3]])
    assert [report.outcome for report in pick.reports] == ["passed"]
    assert [0, 0] in seen
    assert [1, 3] not in seen


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = 3.0

    @gt.custom_vjp
    def forward_rule(self, x):
        return self.scale * x

    @forward_rule.def_bwd
    def _(self, residuals, g):
        return None, self.scale * g

    def forward(self, x):
        return self.forward_rule(x)


def test_a_method_is_checked_on_its_instance():
    arg = x().requires_grad_()
    out = compiled(Scaled())(arg)
    assert_close(torch.autograd.grad(out.sum(), arg)[0], torch.full((4,), 3.0))
    assert {report.outcome for report in Scaled.forward_rule.reports} == {"passed"}


def test_a_wrong_method_is_an_error_of_gradtools():
    class Wrong(Scaled):
        @gt.custom_vjp
        def forward_rule(self, x):
            return self.scale * x

        @forward_rule.def_bwd
        def _(self, residuals, g):
            return None, 2 * self.scale * g

    with pytest.raises(gt.GradientMismatchError, match=r"args\.x.*it is 2 times"):
        compiled(Wrong())(x().requires_grad_())


def test_a_rule_that_calls_itself_is_checked():
    @gt.custom_vjp
    def exp(x):
        return torch.exp(x)

    exp.def_fwd(lambda x: (exp(x), (x,)))
    exp.def_bwd(lambda residuals, g: g * exp(residuals[0]))
    second = torch.func.hessian(lambda x: exp(x).sum())
    assert_close(compiled(second)(x()), torch.exp(x()).diag())
    assert {report.outcome for report in exp.reports} == {"passed"}
