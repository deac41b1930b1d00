"""What a test run says of the rules that it used; and how it has them checked.

``--gradtools=always`` (or ``first``, ``off``) is the policy of the session, in every
thread and worker. At its end one line counts the rules that were checked, and further
lines name those that are wrong or went unchecked. Nothing else changes: a wrong rule
fails the test that uses it by the error that it raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gradtools.gradcheck.report import Report

VARIABLE = "GRADTOOLS_GRADCHECK"
MOST_LINES = 10


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("gradtools").addoption(
        "--gradtools",
        choices=("first", "always", "off"),
        help="when rules are checked in this session, in place of "
        f"the environment's {VARIABLE}",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Take up the policy, and listen to what checks find."""
    session = _Session(config)
    config.pluginmanager.register(session, "gradtools-session")
    config.add_cleanup(session.close)


class _Session:
    """One test run.

    Attributes:
        found: For each rule, by its name and place, the worst that was found of it:
            how bad it is, and why.
    """

    def __init__(self, config: pytest.Config) -> None:
        from gradtools.gradcheck import check

        self.config = config
        self.found: dict[str, tuple[int, str]] = {}
        self.listeners = check.listeners
        self.listeners.append(self.hear)
        self.before = os.environ.get(VARIABLE)
        self.policy = config.getoption("gradtools")
        if self.policy is not None:
            _set_variable(self.policy)

    def close(self) -> None:
        self.listeners.remove(self.hear)
        if self.policy is not None:
            _set_variable(self.before)

    def hear(self, report: Report) -> None:
        """Keep the worst of a rule; nothing of the report itself, which holds much."""
        self.note(report.rule, _badness(report), _reason(report))

    def note(self, rule: str, badness: int, reason: str) -> None:
        if rule not in self.found or badness > self.found[rule][0]:
            self.found[rule] = badness, reason

    # Workers of pytest-xdist hand over what they found.

    def pytest_sessionfinish(self) -> None:
        output: Any = getattr(self.config, "workeroutput", None)
        if output is not None:
            output["gradtools"] = [(rule, *what) for rule, what in self.found.items()]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        output: Any = getattr(node, "workeroutput", {})  # a worker that crashed: none
        for rule, badness, reason in output.get("gradtools", ()):
            self.note(rule, badness, reason)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.found:
            for line in self.lines():
                terminalreporter.write_line(line)

    def lines(self) -> Iterator[str]:
        """The rules in numbers, and what is to be said of them one by one."""
        levels = [badness for badness, _ in self.found.values()]
        checked = len(levels) - levels.count(NOT_CHECKED)
        noun = "rule" if checked == 1 else "rules"
        yield (
            f"gradtools: {checked} {noun} checked, {levels.count(WRONG)} wrong, "
            f"{levels.count(NOT_CHECKED)} not checked"
        )
        worth = [item for item in self.found.items() if item[1][0] != RIGHT]
        worth.sort(key=lambda item: (-item[1][0], item[0]))
        for rule, (badness, reason) in worth[:MOST_LINES]:
            word = "wrong" if badness == WRONG else "not checked"
            yield f"  {word}: {self.shortened(rule)}: {reason}"
        if len(worth) > MOST_LINES:
            yield f"  and {len(worth) - MOST_LINES} more"

    def shortened(self, rule: str) -> str:
        """Write "swish (/home/me/nn/swish.py:3)" as "swish at nn/swish.py:3"."""
        name, _, place = rule.partition(" (")
        place = place.removesuffix(")").removeprefix(f"{self.config.rootpath}{os.sep}")
        return f"{name} at {place}"


RIGHT, NOT_CHECKED, WRONG = range(3)


def _badness(report: Report) -> int:
    return {"failed": WRONG, "not checked": NOT_CHECKED}.get(report.outcome, RIGHT)


def _reason(report: Report) -> str:
    """Say in one line what is the matter with a rule."""
    if report.failure is not None:
        name = report.rule.partition(" (")[0]
        return report.failure.what.removeprefix(f"{name}: ")
    for item in report.evidence:
        if item.outcome == report.outcome != "passed":
            general = item.question == "everything"
            return item.detail if general else f"{item.question}: {item.detail}"
    return ""


def _set_variable(value: str | None) -> None:
    """Set the environment's policy: that of a context would not reach other threads."""
    from gradtools.gradcheck import policy

    if value is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = value
    policy.from_environment.cache_clear()
