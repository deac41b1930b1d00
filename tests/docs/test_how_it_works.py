"""The custom_vjp that docs/how-it-works.md builds has the sixty lines it promises."""

import ast
import re
from pathlib import Path
from types import CodeType

PAGE = (Path(__file__).parents[2] / "docs/how-it-works.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(?!>>>)(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def listing(name):
    """Return the lines of all that a name of the page needs, in the page's order."""
    statements = [
        (source, set(names(compile(source, "page", "exec"))), defined(node))
        for block in BLOCKS
        for node in ast.parse(block).body
        for source in [with_decorators(block, node)]
    ]
    needed, before = {name}, set()
    while needed != before:
        before = set(needed)
        needed |= {n for _, used, new in statements if new & before for n in used}
    sources = [source for source, _, new in statements if new & needed]
    return [line for source in sources for line in source.splitlines() if line.strip()]


def with_decorators(block, node):
    first = min(n.lineno for n in [node, *getattr(node, "decorator_list", [])])
    return "\n".join(block.splitlines()[first - 1 : node.end_lineno])


def names(code):
    """Return the globals, and the attributes, that code mentions at any depth."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names(constant)


def defined(node):
    """Return the names that a statement binds, or sets an attribute of."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = [n for t in getattr(node, "targets", ()) for n in ast.walk(t)]
    return {n.id for n in targets if isinstance(n, ast.Name)}


def test_it_has_at_most_sixty_lines():
    lines = listing("tiny")
    for part in ("import torch", "class Lowered(", "Lowered.jvp =", "Lowered.vmap ="):
        assert any(line.startswith(part) for line in lines)
    assert len(lines) <= 60


def test_it_runs_without_the_rest_of_the_page():
    page = {}
    exec("\n".join(listing("tiny")), page)
    cube = page["tiny"](lambda x: (x**3, (x,)), lambda r, g: (g * 3 * r[0] ** 2,))
    torch = page["torch"]
    x = torch.tensor([1.0, 2.0])
    second = torch.func.vmap(torch.func.jacfwd(torch.func.jacfwd(cube)))(x)
    torch.testing.assert_close(second, 6 * x)
