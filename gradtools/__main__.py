"""The command line: ``python -m gradtools check pkg.module``.

Each target is a module (``pkg.module``) or a file (``path/to/file.py``); all rules that
are stated in it are checked, those of its classes too. ``pkg.module:name`` checks one
rule, or the rules of one class; the name may be dotted, ``Class.method``. Rules that a
module only imports are left out unless they are named.

A rule with ``probe=`` is checked on what its probe returns, with every question that
there is. Of any other rule the calls that the module made when it was imported tell
what is known; without one the rule is not checked.

A table says what was found, and the messages of failures follow in full.
``--html PATH`` writes the reports as one page, with pictures. The exit status is

- 0: every rule was checked and is right;
- 1: a rule is wrong, or its code failed;
- 2: there was nothing to check: no such module or name, or no rule in it;
- 3: nothing is wrong, but something was not checked.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gradtools.errors import GradtoolsError
from gradtools.gradcheck.report import Evidence, Outcome, Report, write_page
from gradtools.rules.custom_vjp import StatedRule
from gradtools.rules.methods import BoundRule
from gradtools.spelling import suggestion

__all__ = ["main"]

RIGHT, WRONG, USAGE, UNCHECKED = range(4)


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status, see the module.
    """
    parser = _parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        fix = suggestion(unknown[0].partition("=")[0], ("--html", "--help"))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}. {fix}")
    if options.command is None:
        parser.print_help()
        return USAGE
    try:
        chosen = _chosen(options.targets)
    except _UsageError as error:
        print(f"gradtools: {error}", file=sys.stderr)
        return USAGE
    findings = [_check(name, rule) for name, rule in _with_progress(chosen)]
    _print(findings)
    status = _status(findings)
    if options.html is not None and not _wrote(findings, options.html):
        return status or USAGE
    return status


def _parser() -> argparse.ArgumentParser:
    description, _, details = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m gradtools", description="Check the derivatives of rules."
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    check = commands.add_parser(
        "check",
        help="check the rules of modules",
        description=description,
        epilog=details.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument(
        "targets",
        nargs="+",
        metavar="target",
        help="pkg.module, pkg.module:name, path/to/file.py or path/to/file.py:name",
    )
    check.add_argument(
        "--html", metavar="PATH", help="write the reports as one page, with pictures"
    )
    return parser


def _status(findings: Sequence[_Finding]) -> int:
    outcomes = {finding.outcome for finding in findings}
    if "failed" in outcomes:
        return WRONG
    return UNCHECKED if "not checked" in outcomes else RIGHT


def _wrote(findings: Sequence[_Finding], path: str) -> bool:
    reports = [report for finding in findings for report in finding.reports]
    try:
        write_page(reports, path)
    except (ImportError, OSError) as error:
        print(f"gradtools: {path} was not written: {error}", file=sys.stderr)
        return False
    return True


# From targets to rules.


class _UsageError(Exception):
    """A target that means nothing."""


@dataclasses.dataclass(frozen=True)
class _Broken:
    """Stands for the rules of a module that one of them did not let be imported."""

    error: GradtoolsError


Chosen = tuple[str, StatedRule[..., Any] | _Broken]


def _chosen(targets: Sequence[str]) -> list[Chosen]:
    """Return the rules that the targets name, each once."""
    found: dict[int, Chosen] = {}
    for target in targets:
        for name, rule in _rules_of(target):
            found.setdefault(id(rule), (name, rule))
    return list(found.values())


def _rules_of(target: str) -> list[Chosen]:
    where, name = _split(target)
    try:
        module = _imported(where)
    except GradtoolsError as error:
        return [(where, _Broken(error))]
    except (Exception, SystemExit) as error:
        raise _UsageError(f"cannot import {where}: {_last_line(error)}") from error
    rules = _named(module, name) if name else list(_stated_in(module))
    if not rules:
        raise _UsageError(f"no rule is stated in {target}")
    return [(f"{module.__name__}.{path}", rule) for path, rule in rules]


def _split(target: str) -> tuple[str, str]:
    """Split ``module:name``; a colon may belong to a path."""
    where, _, name = target.rpartition(":")
    if not where or "/" in name or "\\" in name:
        return target, ""
    return where, name


def _imported(where: str) -> ModuleType:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    path = Path(where).resolve()
    folder, name = path.parent, path.stem
    while (folder / "__init__.py").exists():
        folder, name = folder.parent, f"{folder.name}.{name}"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))  # as Python does for a script
    if "." in name:
        return importlib.import_module(name)
    return _executed(path, name)


def _executed(path: Path, name: str) -> ModuleType:
    """Import a file that is in no package, whatever else has its name."""
    known = sys.modules.get(name)
    if known is not None and getattr(known, "__file__", None) == str(path):
        return known
    name = name if known is None else f"{name} ({path})"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


Found = tuple[str, StatedRule[..., Any]]


def _named(module: ModuleType, name: str) -> list[Found]:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = [path for path, _ in _stated_in(module)]
            raise _UsageError(
                f"{module.__name__} has no {name}. {suggestion(name, known)}"
            )
        value = getattr(value, part)
    if isinstance(value, BoundRule):
        value = value.rule
    if isinstance(value, StatedRule):
        return [(name, value)]
    if inspect.isclass(value):
        return list(_in_class(value, module))
    raise _UsageError(f"{module.__name__}.{name} is no rule, but {value!r}")


def _stated_in(module: ModuleType) -> Iterator[Found]:
    for name, value in list(vars(module).items()):
        if isinstance(value, StatedRule):
            if _is_from(value, module):
                yield name, value
        elif inspect.isclass(value) and value.__module__ == module.__name__:
            yield from _in_class(value, module)


def _in_class(cls: type, module: ModuleType) -> Iterator[Found]:
    for name in list(vars(cls)):
        value = getattr(cls, name, None)
        if isinstance(value, StatedRule):
            yield f"{cls.__qualname__}.{name}", value
        elif inspect.isclass(value) and _is_nested(value, cls):
            yield from _in_class(value, module)


def _is_nested(value: type, cls: type) -> bool:
    return value.__qualname__.startswith(f"{cls.__qualname__}.")


def _is_from(rule: StatedRule[..., Any], module: ModuleType) -> bool:
    """Whether one of the functions of a rule was written in a module."""
    stated = rule.rule
    functions = (stated.fun, stated.fwd, stated.bwd, stated.jvp)
    return module.__name__ in {getattr(f, "__module__", None) for f in functions}


# From rules to findings.


@dataclasses.dataclass(frozen=True)
class _Finding:
    """What is known of one rule.

    Attributes:
        name: Where the rule was found.
        outcome: The worst of its reports.
        verdict: What is wrong, what was not checked, or the largest error; one line.
        reports: The reports.
        messages: What its failures say, in full.
    """

    name: str
    outcome: Outcome
    verdict: str
    reports: tuple[Report, ...] = ()
    messages: tuple[str, ...] = ()


def _check(name: str, rule: StatedRule[..., Any] | _Broken) -> _Finding:
    """Check a rule; nothing that its code does ends the run."""
    if isinstance(rule, _Broken):
        return _failure(name, name, (), rule.error)
    probe = rule.rule.probe
    if probe is not None:
        try:
            given = probe()
            rule.gradcheck(*(given if isinstance(given, tuple) else (given,)))
        except Exception as error:  # the user's code raises what it likes
            return _failure(name, rule.rule.where, rule.reports, error)
    return _finding(name, rule.reports)


def _failure(
    name: str, where: str, reports: Sequence[Report], error: Exception
) -> _Finding:
    """Return what is known of a rule whose check raised."""
    if any(report.failure is not None for report in reports):
        return _finding(name, reports)
    known = isinstance(error, GradtoolsError)
    text = error.what if known else _last_line(error)
    evidence = Evidence("everything", "failed", text)
    failed = Report(where, "", (evidence,), failure=error if known else None)
    return _finding(name, [*reports, failed])


def _finding(name: str, reports: Sequence[Report]) -> _Finding:
    if not reports:
        return _Finding(name, "not checked", "give the rule probe=, or call it once")
    failed = [report for report in reports if report.outcome == "failed"]
    worst: Outcome = "failed" if failed else "passed"
    if not failed and any(report.outcome == "not checked" for report in reports):
        worst = "not checked"
    return _Finding(
        name,
        worst,
        _verdict(worst, reports),
        tuple(reports),
        tuple(_message(report) for report in failed),
    )


def _verdict(worst: Outcome, reports: Sequence[Report]) -> str:
    items = [item for report in reports for item in report.evidence]
    if worst == "passed":
        errors = [item.error for item in items if item.error is not None]
        return f"largest error {max(errors):.0e}" if errors else ""
    for report in reports:
        if report.failure is not None:
            name = report.rule.partition(" (")[0]
            return report.failure.what.removeprefix(f"{name}: ")
    item = next(item for item in items if item.outcome == worst)
    general = item.question == "everything"
    return item.detail if general else f"{item.question}: {item.detail}"


def _message(report: Report) -> str:
    return str(report) if report.failure is None else str(report.failure)


def _last_line(error: BaseException) -> str:
    """The last line of a traceback, and where it ends."""
    frames = traceback.extract_tb(error.__traceback__)
    line = traceback.format_exception_only(error)[-1].strip()
    frames = [frame for frame in frames if not _is_machinery(frame.filename)]
    return f"{line} ({frames[-1].filename}:{frames[-1].lineno})" if frames else line


def _is_machinery(filename: str) -> bool:
    return filename == __file__ or "importlib" in filename


# What is printed.

HEADINGS = ("rule", "outcome", "found", "evaluations", "ms")


def _with_progress(chosen: Sequence[Chosen]) -> Iterable[Chosen]:
    """Show a bar, where there is a terminal that a person looks at."""
    if not sys.stderr.isatty():
        return chosen
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return chosen
    console = Console(stderr=True)
    return track(chosen, description="checking", console=console, transient=True)


def _print(findings: Sequence[_Finding]) -> None:
    rows = [
        (
            finding.name,
            finding.outcome,
            finding.verdict.partition("\n")[0],
            str(sum(report.evaluations for report in finding.reports)),
            f"{1e3 * sum(report.seconds for report in finding.reports):.1f}",
        )
        for finding in findings
    ]
    if not (sys.stdout.isatty() and _print_in_colour(rows)):
        _print_plainly(rows)
    for finding in findings:
        for message in finding.messages:
            print(f"\n{finding.name}\n{message}")
    print(f"\n{_summary(findings)}")


def _print_in_colour(rows: Sequence[Sequence[str]]) -> bool:
    """Print a table with rich; return whether it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    colours = {"passed": "green", "failed": "bold red", "not checked": "yellow"}
    table = Table()
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if place > 2 else "left")
    for name, outcome, *rest in rows:
        table.add_row(Text(name), Text(outcome, colours[outcome]), *map(Text, rest))
    Console().print(table)
    return True


def _print_plainly(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    for row in (HEADINGS, *rows):
        left = [text.ljust(width) for text, width in zip(row[:3], widths, strict=False)]
        right = [
            text.rjust(width) for text, width in zip(row[3:], widths[3:], strict=True)
        ]
        print("  ".join([*left, *right]).rstrip())


def _summary(findings: Sequence[_Finding]) -> str:
    words = {"failed": "wrong", "not checked": "not checked", "passed": "right"}
    counts = [
        f"{count} {word}"
        for outcome, word in words.items()
        if (count := sum(finding.outcome == outcome for finding in findings))
    ]
    noun = "rule" if len(findings) == 1 else "rules"
    return f"{len(findings)} {noun}: {', '.join(counts)}"


if __name__ == "__main__":
    sys.exit(main())
