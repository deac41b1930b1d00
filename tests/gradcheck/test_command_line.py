"""python -m gradtools check: which rules it finds, what it says, how it exits."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import gradtools as gt
from gradtools.__main__ import main

RULES = '''
import torch
import gradtools as gt


def cube(factor, **options):
    """A rule, right where the factor is 3."""

    @gt.custom_vjp(**options)
    def cube(x):
        return x**3

    @cube.def_bwd
    def _(residuals, g):
        ((x,), output) = residuals
        return g * factor * x**2

    return cube


def x():
    return torch.linspace(0.5, 1.5, 3)
'''

RIGHT = "right = cube(3.0, probe=x)\n"
WRONG = "wrong = cube(2.0, probe=x)\n"
UNKNOWN = "unknown = cube(3.0)\n"

_names = (f"rules_of_the_command_line_{number}" for number in itertools.count())


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module, and return its name."""
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)

    def write(text, name=None):
        name = name or next(_names)
        (tmp_path / f"{name}.py").write_text(RULES + text)
        return name

    yield write
    for name in set(sys.modules) - known:
        if "rules_of_the_command_line" in name:
            del sys.modules[name]


def rows(output):
    """The rules and outcomes of the table."""
    lines = output.partition("\n\n")[0].splitlines()
    assert lines[0].split() == ["rule", "outcome", "found", "evaluations", "ms"]
    width = lines[0].index("outcome"), lines[0].index("found")
    return {
        line[: width[0]].strip().partition(".")[2]: line[width[0] : width[1]].strip()
        for line in lines[1:]
    }


def test_a_right_rule(module, capsys):
    assert main(["check", module(RIGHT)]) == 0
    output, errors = capsys.readouterr()
    assert rows(output) == {"right": "passed"}
    assert "largest error" in output
    assert output.endswith("\n1 rule: 1 right\n")
    assert errors == ""


def test_one_failure_hides_no_other(module, capsys):
    other = module(WRONG)
    assert main(["check", module(WRONG + RIGHT + UNKNOWN), other]) == 1
    output, _ = capsys.readouterr()
    assert output.count("is not the derivative of the function") >= 4
    assert output.count("\n  fix ") == 2
    assert rows(output) == {
        "wrong": "failed",
        "right": "passed",
        "unknown": "not checked",
    }
    assert "4 rules: 2 wrong, 1 not checked, 1 right" in output


def test_a_rule_without_probe_is_not_checked(module, capsys):
    assert main(["check", module(RIGHT + UNKNOWN)]) == 3
    output, _ = capsys.readouterr()
    assert rows(output) == {"right": "passed", "unknown": "not checked"}
    assert "give the rule probe=" in output


def test_calls_that_the_module_makes_count(module, capsys):
    text = UNKNOWN + "unknown(x().requires_grad_())\n"
    assert main(["check", module(text)]) == 0
    assert rows(capsys.readouterr()[0]) == {"unknown": "passed"}


def test_an_error_of_the_users_code_is_a_failure(module, capsys):
    text = RIGHT + (
        "def probe():\n"
        "    raise ValueError('[red]no data[/red]')\n"
        "broken = cube(3.0, probe=probe)\n"
    )
    assert main(["check", module(text)]) == 1
    output, _ = capsys.readouterr()
    assert rows(output) == {"right": "passed", "broken": "failed"}
    assert "ValueError: [red]no data[/red] (" in output
    assert ".py:" in output


def test_a_module_whose_import_finds_a_wrong_rule(module, capsys):
    text = "cube(2.0)(x().requires_grad_())\n"
    assert main(["check", module(text), module(RIGHT)]) == 1
    output, _ = capsys.readouterr()
    assert sorted(rows(output).values()) == ["failed", "passed"]
    assert "is not the derivative of the function" in output


METHODS = """
class Layer:
    class Inner:
        deep = cube(3.0, probe=x)

    @gt.custom_vjp(probe=lambda: (Layer(), x()))
    def scaled(self, x):
        return 2 * x

    @scaled.def_bwd
    def _(self, residuals, g):
        return None, 2 * g

    static = staticmethod(cube(3.0, probe=x))
"""


def test_rules_of_classes(module, capsys):
    name = module(METHODS)
    assert main(["check", name]) == 0
    methods = {"Layer.Inner.deep", "Layer.scaled", "Layer.static"}
    assert rows(capsys.readouterr()[0]) == dict.fromkeys(methods, "passed")
    assert main(["check", f"{name}:Layer.scaled"]) == 0
    assert rows(capsys.readouterr()[0]) == {"Layer.scaled": "passed"}
    assert main(["check", f"{name}:Layer.Inner", f"{name}:Layer.Inner.deep"]) == 0
    assert rows(capsys.readouterr()[0]) == {"Layer.Inner.deep": "passed"}


def test_imported_rules_must_be_named(module, capsys):
    other = module(WRONG)
    name = module(f"from {other} import wrong\n" + RIGHT)
    assert main(["check", name]) == 0
    assert rows(capsys.readouterr()[0]) == {"right": "passed"}
    assert main(["check", f"{name}:wrong"]) == 1
    assert rows(capsys.readouterr()[0]) == {"wrong": "failed"}


def test_a_rule_for_an_imported_function_belongs_to_the_module(module, capsys):
    text = (
        "sine = gt.custom_vjp(torch.sin, probe=x)\n"
        "sine.def_bwd(lambda residuals, g: g * torch.cos(residuals[0][0]))\n"
    )
    main(["check", module(text)])
    assert "sine" in rows(capsys.readouterr()[0])


def test_files(module, tmp_path, capsys):
    name = module(RIGHT + WRONG)
    assert main(["check", f"{tmp_path}/{name}.py"]) == 1
    assert set(rows(capsys.readouterr()[0])) == {"right", "wrong"}
    assert main(["check", f"{tmp_path}/{name}.py:right"]) == 0
    package = tmp_path / f"package_{name}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "stated.py").write_text(f"from {name} import cube, x\n" + RIGHT)
    (package / "inner.py").write_text("from .stated import right\n")
    assert main(["check", f"{package}/inner.py:right"]) == 0


def test_a_file_may_have_the_name_of_a_module(module, tmp_path, capsys):
    module(RIGHT, name="random")
    assert main(["check", f"{tmp_path}/random.py"]) == 0
    import random

    assert not hasattr(random, "right")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_module", "cannot import no_such_module: ModuleNotFoundError"),
        ("no/such/file.py", "cannot import no/such/file.py: FileNotFoundError"),
        ("{name}:nothing", "{name} has no nothing"),
        ("{name}:Nothing.at.all", "{name} has no Nothing.at.all"),
        ("{name}:cube", "{name}.cube is no rule, but <function cube"),
        ("{name}", "no rule is stated in {name}"),
        ("{broken}", "cannot import {broken}: ZeroDivisionError: division by zero ("),
        ("{leaving}", "cannot import {leaving}: SystemExit: 4 ("),
    ],
)
def test_targets_that_mean_nothing(module, capsys, target, message):
    names = {
        "name": module(""),
        "broken": module("1 / 0"),
        "leaving": module("raise SystemExit(4)"),
    }
    assert main(["check", target.format(**names)]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"gradtools: {message.format(**names)}")
    assert errors.count("\n") == 1


def test_the_page(module, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "page.html"
    text = RIGHT + WRONG + "broken = cube(3.0, probe=lambda: 1 / 0)\n"
    assert main(["check", module(text), "--html", str(path)]) == 1
    text = path.read_text()
    assert "3 reports" in text
    assert "ZeroDivisionError" in text
    assert "is not the derivative of the function" in text
    assert "<svg" in text


def test_a_page_that_cannot_be_written(module, tmp_path, capsys):
    path = str(tmp_path / "no" / "page.html")
    assert main(["check", module(RIGHT), "--html", path]) == 2
    output, errors = capsys.readouterr()
    assert rows(output) == {"right": "passed"}
    assert f"{path} was not written" in errors
    assert main(["check", module(WRONG), "--html", path]) == 1


@pytest.mark.parametrize("with_rich", [True, False])
def test_a_terminal(module, capsys, monkeypatch, with_rich):
    if with_rich:
        pytest.importorskip("rich")
    else:
        for name in ("rich", "rich.console", "rich.progress", "rich.table"):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["check", module(RIGHT + WRONG)]) == 1
    output, _ = capsys.readouterr()
    assert "right" in output
    assert "2 rules: 1 wrong, 1 right" in output
    assert ("━" in output or "─" in output) == with_rich


def test_alone_it_prints_help(capsys):
    assert main([]) == 2
    assert "check the rules of modules" in capsys.readouterr()[0]


def test_as_a_process(module, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(gt.__file__).parents[1]))
    command = [sys.executable, "-m", "gradtools", "check", f"{module(WRONG)}.py"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "1 rule: 1 wrong" in done.stdout
