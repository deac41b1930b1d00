"""The rooms of the package, the ways between them, and what is on the door."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.autograd.gradcheck import GradcheckError

import gradtools as gt

PACKAGE = Path(gt.__file__).parent
MODULES = {
    ".".join(("gradtools", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in PACKAGE.rglob("*.py")
}

# From the ground up: a module imports from its own layer and those listed before it.
LAYERS = [
    r"gradtools\.(errors|spelling|trees|torch_compat|probing|tables|warning)",
    r"gradtools\.rules\.(signature|rule)",
    r"gradtools\.lowering\..*",
    r"gradtools\.gradcheck\..*",
    r"gradtools\.rules\..*",
    r"gradtools\.second_order\..*",
    r"gradtools\.__init__",
    r"gradtools\.testing",
    r"gradtools\.(__main__|pytest_plugin)",
]


def layer(name):
    return next(i for i, pattern in enumerate(LAYERS) if re.fullmatch(pattern, name))


def imports(path):
    """Return the modules that a file imports, at its top and inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module)
    return found


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_imports_upward(name):
    upward = {
        other
        for other in imports(MODULES[name]) & MODULES.keys()
        if layer(other) > layer(name)
    }
    assert not upward


def test_the_check_knows_nothing_of_functions():
    of_lowering = {
        other
        for name, path in MODULES.items()
        if name.startswith("gradtools.gradcheck")
        for other in imports(path) & MODULES.keys()
        if other.startswith("gradtools.lowering")
    }
    assert of_lowering == {
        f"gradtools.lowering.{name}"
        for name in (
            *("flat", "state", "batching", "forward_mode"),  # a rule as pure functions
            *("replay", "contents"),  # what it leaves, and what it holds
            "preconditions",  # whether there is a forward mode at all
            "boundary",  # for a thread of its own
        )
    }


@pytest.mark.parametrize(
    ("pattern", "homes"),
    [
        (r"^torch\.utils\._pytree", {"trees"}),
        (
            r"^torch\._dynamo|_dynamo\.eval_frame",
            {"torch_compat", "lowering.boundary"},
        ),
        (r"^torch\.compiler", {"lowering.boundary", "lowering.trace_time"}),
        (
            r"^torch\._(?!dynamo)",
            {"torch_compat", "lowering.boundary"},
        ),
        (r"^forward_ad\._", {"torch_compat"}),
        (
            r"^torch\.autograd\.Function$",
            {
                "lowering.functions",
                "lowering.settings",
                "lowering.traced",
                "rules.function_class",
                "rules.lift",
                "torch_compat",
            },
        ),
    ],
)
def test_what_is_private_has_one_home(pattern, homes):
    users = {
        name
        for name, path in MODULES.items()
        if any(re.search(pattern, used) for used in dotted_names(path))
    }
    assert users == {f"gradtools.{home}" for home in homes}


def dotted_names(path):
    """Return what a file imports and every ``a.b.c`` in its code."""
    chains = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    return chains | imports(path)


def test_modules_are_of_a_readable_size():
    sizes = {n: len(p.read_text().splitlines()) for n, p in MODULES.items()}
    del sizes["gradtools.torch_compat"]  # a list of small things, in one place by rule
    assert {name: size for name, size in sizes.items() if size > 450} == {}


def test_the_public_names_are_sorted_documented_and_nothing_else():
    assert list(gt.__all__) == sorted(gt.__all__)
    for name in gt.__all__:
        assert getattr(gt, name).__doc__, name
    public = {name for name in vars(gt) if name.isidentifier() and name[0] != "_"}
    modules = {"errors", "gradcheck", "lowering", "probing", "rules", "second_order"}
    modules |= {
        "spelling",
        "torch_compat",
        "tables",
        "trees",
        "warning",
        "testing",
        "pytest_plugin",
    }  # the last two on import only
    assert public - modules == set(gt.__all__)


def test_the_public_names_say_that_they_are_public():
    for name in gt.__all__:
        assert getattr(gt, name).__module__ == "gradtools", name


def test_the_exceptions_are_what_their_tree_says():
    tree = {
        gt.DefinitionError: TypeError,
        gt.CapturedTensorError: gt.DefinitionError,
        gt.ForwardContractError: TypeError,
        gt.BackwardContractError: TypeError,
        gt.GradientMismatchError: GradcheckError,
        gt.TransformError: RuntimeError,
    }
    for error, base in tree.items():
        assert issubclass(error, base)
        assert issubclass(error, gt.GradtoolsError)
        assert error.__name__ in gt.errors.__doc__


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()


def python(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    ).stdout


def test_a_rule_is_stated_and_called_without_importing_dynamo():
    code = """
import sys, torch
import gradtools as gt

@gt.custom_vjp
def double(x):
    return 2 * x

double.def_bwd(lambda residuals, g: 2 * g)
x = torch.ones(2, requires_grad=True)
(first,) = torch.autograd.grad((double(x) ** 2).sum(), x, create_graph=True)
first.sum().backward()
torch.func.vmap(double)(x)
print("torch._dynamo" in sys.modules)
"""
    assert python(code) == "False\n"


def test_the_import_brings_no_module_that_torch_has_not_imported():
    code = """
import sys, torch
before = set(sys.modules)
import gradtools
print({name.partition(".")[0] for name in sys.modules.keys() - before})
"""
    assert python(code) == "{'gradtools'}\n"
