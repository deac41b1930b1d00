"""The pytest plugin: what a session says of its rules, and its policy."""

from pathlib import Path

import pytest

import gradtools as gt
from gradtools.gradcheck.policy import current_policy

pytest_plugins = ["pytester"]

RULES = """
    import threading
    import pytest
    import torch
    import gradtools as gt
    from gradtools.gradcheck.policy import current_policy

    def cube(factor=3.0):
        @gt.custom_vjp
        def cube(x):
            return x**3

        @cube.def_bwd
        def _(residuals, g):
            ((x,), output) = residuals
            return g * factor * x**2

        return cube

    def use(rule):
        rule(torch.linspace(0.5, 1.5, 3).requires_grad_())
"""


@pytest.fixture
def session(pytester, monkeypatch):
    """Run a test file with the plugin."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(gt.__file__).parents[1]))
    monkeypatch.delenv("GRADTOOLS_GRADCHECK", raising=False)

    def run(text, *options, apart=False):
        pytester.makepyfile(RULES + text)
        runs = pytester.runpytest_subprocess if apart else pytester.runpytest_inprocess
        return runs("-p", "gradtools.pytest_plugin", *options)

    return run


def test_rules_are_counted_though_they_are_gone(session):
    result = session("""
    def test_right():
        use(cube())

    def test_wrong():
        @gt.custom_vjp
        def square(x):
            return x**2

        @square.def_bwd
        def _(residuals, g):
            return g * 3 * residuals[0][0]

        with pytest.raises(gt.GradientMismatchError):
            use(square)

    def test_unchecked():
        with gt.gradcheck_policy("off"):
            use(sine())

    def sine():
        @gt.custom_vjp
        def sine(x):
            return torch.sin(x)

        @sine.def_bwd
        def _(residuals, g):
            return g * torch.cos(residuals[0][0])

        return sine
    """)
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(
        [
            "gradtools: 2 rules checked, 1 wrong, 1 not checked",
            "  wrong: square at test_*.py:*: what bwd returns for args.x is not *",
            "  not checked: sine at test_*.py:*: the policy is off",
        ]
    )


def test_the_worst_of_a_rule_counts(session):
    result = session("""
    @pytest.mark.parametrize("factor", [3.0, 2.0, 3.0])
    def test_it(factor):
        use(cube(factor))
    """)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["gradtools: 1 rule checked, 1 wrong, 0 not checked"])


def test_many_rules_are_not_all_named(session):
    rule = """
            rule = gt.custom_vjp(lambda x: {0} * x)
            rule.def_bwd(lambda residuals, g: {0} * g)
            use(rule)
    """
    result = session(
        """
    def test_it():
        with gt.gradcheck_policy("off"):
    """
        + "".join(rule.format(number) for number in range(13))
    )
    result.stdout.fnmatch_lines(
        ["gradtools: 0 rules checked, 0 wrong, 13 not checked", "  and 3 more"]
    )


def test_without_rules_nothing_is_said(session):
    result = session("""
    def test_it():
        cube()
    """)
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("gradtools:*")


POLICY = """
    def test_policy():
        found = [current_policy()]
        thread = threading.Thread(target=lambda: found.append(current_policy()))
        thread.start()
        thread.join()
        assert found == ["{policy}"] * 2
        with gt.gradcheck_policy("always"):
            assert current_policy() == "always"
"""


@pytest.mark.parametrize("policy", ["first", "always", "off"])
def test_the_option_is_the_policy_of_every_thread(session, policy):
    before = current_policy()
    result = session(POLICY.format(policy=policy), f"--gradtools={policy}")
    result.assert_outcomes(passed=1)
    assert current_policy() == before


def test_without_the_option_the_policy_stays(session, monkeypatch):
    monkeypatch.setenv("GRADTOOLS_GRADCHECK", "off")
    result = session(POLICY.format(policy="off"), apart=True)
    result.assert_outcomes(passed=1)


def test_workers_add_up(session):
    pytest.importorskip("xdist")
    result = session(
        POLICY.format(policy="always")
        + """
    @pytest.mark.parametrize("factor", [3.0, 2.0, 3.0, 3.0])
    def test_it(factor):
        use(cube(factor))
    """,
        *("-p", "xdist", "-n", "2", "--gradtools=always"),
        apart=True,
    )
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines(
        [
            "gradtools: 1 rule checked, 1 wrong, 0 not checked",
            "  wrong: cube at test_*.py:*",
        ]
    )


def test_a_misspelled_policy_names_the_right_ones(session):
    result = session("def test_nothing(): pass", "--gradtools=alwys")
    result.stderr.re_match_lines([".*invalid choice: 'alwys'.*'?first'?, '?always'?"])
    assert result.ret != 0
