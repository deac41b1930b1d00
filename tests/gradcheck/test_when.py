"""When a rule is checked: at its first use, by policy, and what is remembered."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import gradtools as gt
from gradtools.gradcheck import policy


def sine(factor=1.0):
    """A rule; wrong where the factor is not 1."""

    @gt.custom_vjp
    def sine(x):
        return torch.sin(x)

    @sine.def_bwd
    def _(residuals, g):
        ((x,), _) = residuals
        return factor * g * torch.cos(x)

    return sine


def x(count=3):
    return torch.linspace(0.1, 1.0, count)


def _under_hooks(f):
    def spoil(tensor):
        raise AssertionError("the check ran under the caller's hooks")

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, spoil):
        return f(x().requires_grad_())


def _under_autocast(f):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return f(x().requires_grad_())


USES = {
    "backward": lambda f: f(x().requires_grad_()),
    "grad": lambda f: torch.func.grad(lambda x: f(x).sum())(x()),
    "vmap of grad": lambda f: torch.func.vmap(torch.func.grad(f))(x()),
    "grad of vmap": lambda f: torch.func.grad(lambda x: torch.func.vmap(f)(x).sum())(
        x()
    ),
    "jvp": lambda f: torch.func.jvp(f, (x(),), (x(),)),
    "hessian": lambda f: torch.func.hessian(lambda x: f(x).sum())(x()),
    "checkpoint": lambda f: torch.utils.checkpoint.checkpoint(
        f, x().requires_grad_(), use_reentrant=False
    ),
    "saved-tensor hooks": _under_hooks,
    "autocast": _under_autocast,
}


@pytest.mark.parametrize("use", USES)
def test_a_rule_is_checked_at_its_first_use(use):
    right, wrong = sine(), sine(2.0)
    USES[use](right)
    assert [report.outcome for report in right.reports] == ["passed"]
    with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
        USES[use](wrong)


def test_nothing_is_checked_where_no_gradient_is_wanted():
    rule = sine(2.0)
    rule(x())
    with torch.no_grad():
        rule(x().requires_grad_())
    torch.func.vmap(rule)(x())
    assert rule.reports == ()


def test_a_signature_is_checked_once():
    rule = sine()
    for count in (3, 3, 4, 5):
        rule(x(count).requires_grad_())
    assert len(rule.reports) == 1
    rule(x(1).requires_grad_())
    rule(x(3).float().requires_grad_())
    assert len(rule.reports) == 3


@pytest.mark.parametrize("first", [0.0, 1.0, float("inf")])
def test_a_number_that_hides_a_mistake_does_not_count_for_the_others(first):
    @gt.custom_vjp
    def scaled(x, factor):
        return x * min(factor, 10.0)

    @scaled.def_bwd
    def _(residuals, g):
        (_, factor), _ = residuals[0], residuals[1]
        return g * (10.0 if factor > 10 else factor**2), None

    for _ in range(4):  # until there is code for such calls
        scaled(x().requires_grad_(), first).sum().backward()
    with pytest.raises(gt.GradientMismatchError, match="3 times what it should be"):
        scaled(x().requires_grad_(), 3.0)


def test_reports_of_ever_new_arguments_do_not_pile_up():
    @gt.custom_vjp
    def scaled(x, step):
        return x * step

    scaled.def_bwd(lambda residuals, g: (g * residuals[0][1], None))
    arg = x().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(300):
            scaled(arg, step).sum().backward()
    assert len(scaled.reports) <= 256


def test_a_failure_is_remembered_and_raised_again():
    rule = sine(2.0)
    errors = []
    for _ in range(2):
        with pytest.raises(gt.GradientMismatchError, match="not the derivative") as e:
            rule(x().requires_grad_())
        errors.append(e.value)
    assert errors[0] is not errors[1]
    assert str(errors[0]) == str(errors[1])


def test_policy_off_runs_the_rule_unchecked_and_says_so():
    rule = sine(2.0)
    arg = x().requires_grad_()
    with gt.gradcheck_policy("off"):
        (grad,) = torch.autograd.grad(rule(arg).sum(), arg)
    torch.testing.assert_close(grad, 2 * torch.cos(arg))
    (report,) = rule.reports
    assert report.outcome == "not checked"
    assert "the policy is off" in str(report)


def test_a_rule_first_used_under_policy_off_is_checked_later():
    rule = sine(2.0)
    with gt.gradcheck_policy("off"):
        rule(x().requires_grad_())
    with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
        rule(x().requires_grad_())
    with gt.gradcheck_policy("off"):
        rule(x().requires_grad_())


def test_policy_always_checks_every_call():
    calls = []
    rule = sine()
    rule.def_fwd(lambda x: (torch.sin(x), calls.append(gt.is_checking()) or ((x,), 0)))
    with gt.gradcheck_policy("always"):
        rule(x().requires_grad_())
        count = calls.count(True)
        rule(x().requires_grad_())
    assert count > 0
    assert calls.count(True) == 2 * count
    assert len(rule.reports) == 1


def test_the_policy_reaches_backward_threads_and_is_a_decorator_too():
    @gt.gradcheck_policy("off")
    def run():
        arg = x().requires_grad_()
        sine(2.0)(arg).sum().backward()
        return arg.grad

    torch.testing.assert_close(run(), 2 * torch.cos(x()))
    torch.testing.assert_close(run(), 2 * torch.cos(x()))


@pytest.mark.parametrize("times", [1, 6])  # the general way; generated code
def test_the_policy_is_that_of_the_call_for_rules_that_bwd_calls_elsewhere(times):
    inner = gt.custom_vjp(torch.sin)
    inner.def_bwd(lambda residuals, g: (10 * g,))  # wrong: a check would find it
    outer = gt.custom_vjp(torch.square)
    outer.def_bwd(lambda residuals, g: (inner(g * 1.0),))
    x = torch.ones(3, requires_grad=True)

    def backward(y):
        y.sum().backward()

    with gt.gradcheck_policy("off"):
        for _ in range(times):
            y = outer(x)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(backward, y).result()
    with ThreadPoolExecutor(1) as pool, pytest.raises(gt.GradientMismatchError):
        pool.submit(lambda: inner(x)).result()


def test_an_unknown_policy_is_an_error(monkeypatch):
    with pytest.raises(gt.DefinitionError, match="'never', which is none of 'first'"):
        gt.gradcheck_policy("never")
    monkeypatch.setenv("GRADTOOLS_GRADCHECK", "sometimes")
    policy.from_environment.cache_clear()
    with pytest.raises(gt.DefinitionError, match="GRADTOOLS_GRADCHECK asks for"):
        sine()(x().requires_grad_())
    monkeypatch.undo()
    policy.from_environment.cache_clear()


def test_is_checking_tells_a_check_from_a_call():
    log = []

    @gt.custom_vjp
    def double(x):
        if not gt.is_checking():
            log.append(tuple(x.shape))
        return 2 * x

    double.def_bwd(lambda residuals, g: 2 * g)
    double(x().requires_grad_())
    assert log == [(3,)]
    assert not gt.is_checking()


def test_a_check_leaves_the_arguments_and_the_random_state_alone():
    rule = sine()
    arg = torch.randn(3, requires_grad=True)
    before, values, version = torch.get_rng_state(), arg.detach().clone(), arg._version
    rule(arg)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(arg, values)
    assert (arg.grad, arg._version) == (None, version)


def test_what_cannot_be_checked_is_a_warning_once():
    rule = sine(2.0)
    with pytest.warns(UserWarning, match="did not check the rule sine.*meta tensors"):
        rule(x().to("meta").requires_grad_())
    assert [report.outcome for report in rule.reports] == ["not checked"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule(x().to("meta").requires_grad_())
    with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
        rule(x().requires_grad_())


def test_a_report_prints_as_a_table():
    report = sine().gradcheck(x())
    first, second, *rows = str(report).splitlines()
    assert "passed in" in first
    assert "evaluations" in first
    assert second == "  x: (3,) float64"
    assert rows[0].split()[0] == "passed"
    assert "derivative in x by autograd" in rows[3]


def test_what_is_bad_in_a_contract_is_raised_by_the_check_as_itself():
    rule = sine()
    rule.def_bwd(lambda residuals, g: (g, g))
    with pytest.raises(gt.BackwardContractError, match="bwd returned"):
        rule.gradcheck(x())
