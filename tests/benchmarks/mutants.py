"""The mutation benchmark: how many wrong rules ``gradcheck`` finds, and what it says.

``python -m tests.benchmarks.mutants [--seeds 5] [--table as-is|opaque|float32|all]``

A mutant that counts (see judge.py) is killed when ``rule.gradcheck(*args)`` raises a
GradtoolsError; another exception is a crash, and no kill. Right rules must pass. The
tables: the rules as they are, in float64; with functions that autograd cannot see into;
and in float32, with functions that refuse double precision. As the figure to beat, the
first has what ``torch.autograd.gradcheck(fast_mode=True)`` kills of the same mutants.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

import gradtools as gt
from tests.benchmarks.judge import judge
from tests.benchmarks.mutators import (
    MUTATORS,
    Mutant,
    batched_identity,
    get,
    identity,
    map_tensors,
    tensors,
)
from tests.benchmarks.right_rules import RULES

RIGHT = "(right)"


class Cell(NamedTuple):
    """What became of one mutant, or of one right rule, on one seed."""

    table: str
    rule: str
    mutator: str
    target: str
    seed: int
    outcome: str  # "killed", "survived", "crashed" or "equivalent"
    named: bool = False
    kind: bool = False
    line: str = ""
    by_torch: bool = False


# How a table presents a rule.


class Table(NamedTuple):
    """The dtype of arguments, and what is done to fun, and to fwd and bwd."""

    dtype: torch.dtype
    around_fun: Callable[..., Any]
    around_rest: Callable[..., Any]


def _as_is(function):
    return function


def _opaque(fun):
    """Hide a function from autograd, as a kernel of one's own would be."""

    @functools.wraps(fun)
    def hidden(*args):
        with torch.no_grad():
            out = fun(*map_tensors(torch.Tensor.detach, args))
        return map_tensors(torch.Tensor.detach, out)

    return hidden


def _single_only(function):
    """Refuse double precision, as a kernel for float32 does."""

    @functools.wraps(function)
    def single(*args):
        for leaf in tensors(args):
            if leaf.dtype in (torch.float64, torch.complex128):
                raise RuntimeError(f"expected single precision, not {leaf.dtype}")
        return function(*args)

    return single


TABLES = {
    "as-is": Table(torch.float64, _as_is, _as_is),
    "opaque": Table(torch.float64, _opaque, _as_is),
    "float32": Table(torch.float32, _single_only, _single_only),
}


# One mutant.


def check(mutant: Mutant, table: str, seed: int) -> Cell:
    """Let gradtools check a mutant, and read what it says."""
    dtype, around_fun, around_rest = TABLES[table]
    cell = functools.partial(
        Cell, table, mutant.rule, mutant.mutator, mutant.target, seed
    )
    args = RULES[mutant.rule].args(dtype, seed)
    try:
        rule = gt.custom_vjp(around_fun(mutant.fun), **mutant.options)
        rule.def_fwd(around_rest(mutant.fwd))
        rule.def_bwd(around_rest(mutant.bwd))
        rule.gradcheck(*args)
    except gt.GradtoolsError as error:
        return cell("killed", *_reading(mutant, error), _first_line(error))
    except Exception as error:  # a crash is a result, of any kind
        return cell("crashed", line=f"{type(error).__name__}: {_first_line(error)}")
    return cell("survived")


def _first_line(error):
    return str(error).strip().partition("\n")[0][:200]


def _reading(mutant, error):
    """Return whether the message names the right argument, and the right mistake."""
    text = str(error)
    named = not mutant.blame or any(re.search(path, text) for path in mutant.blame)
    # Names of rules and files are left out: "sum_rows" would say "sum".
    parts = [error.what, *itertools.chain(*error.violations), error.fix or ""]
    name = re.escape(mutant.fun.__name__)
    said = re.sub(rf"\b{name}(?=[:.])", "", "\n".join(parts))
    return named, bool(re.search(mutant.words, said, re.IGNORECASE))


def killed_by_torch(mutant: Mutant, seed: int) -> bool:
    """Return whether torch's gradcheck fails on a plain Function with the mutant."""
    args = RULES[mutant.rule].args(torch.float64, seed)
    leaves = [leaf.requires_grad_() for leaf in tensors(args)]
    function = _as_function(mutant, args)
    try:
        return not torch.autograd.gradcheck(function.apply, leaves, fast_mode=True)
    except Exception:  # whatever it raises, it has found something
        return True


def _as_function(mutant, args):
    keys = [place.keys for place in RULES[mutant.rule].places()]

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            rest = iter(given)
            out, ctx.residuals = mutant.fwd(*map_tensors(lambda _: next(rest), args))
            outs, ctx.spec = pytree.tree_flatten(out)
            return tuple(outs) if len(outs) > 1 else outs[0]

        @staticmethod
        def backward(ctx, *gs):
            g = pytree.tree_unflatten(gs, ctx.spec)
            returned = mutant.bwd(ctx.residuals, g)
            return tuple(get(returned, place) for place in keys)

    return Plain


# All of them.


def run(unit: tuple[str, int, Sequence[str]]) -> list[Cell]:
    """Run every mutant of one rule on one seed, in some tables."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    name, seed, tables = unit
    cells = [cell for table in tables for cell in _rights(name, seed, table)]
    for mutator, mutate in MUTATORS.items():
        for index, mutant in enumerate(mutate(RULES[name])):
            # A mutant may keep a state: each use gets one of its own.
            fresh = functools.partial(_again, mutator, name, index)
            cells += _outcomes(fresh, mutant, seed, tables)
    return cells


def _again(mutator, name, index):
    return MUTATORS[mutator](RULES[name])[index]


def _rights(name, seed, table):
    for make in (identity, batched_identity):
        mutant = make(RULES[name])
        if mutant is not None:
            by_torch = table == "as-is" and killed_by_torch(mutant, seed)
            cell = check(mutant, table, seed)
            yield cell._replace(mutator=RIGHT, target=mutant.mutator, by_torch=by_torch)


def _outcomes(fresh, mutant, seed, tables):
    if not judge(mutant, seed).counts:
        return [
            Cell(table, mutant.rule, mutant.mutator, mutant.target, seed, "equivalent")
            for table in tables
        ]
    cells = [check(fresh(), table, seed) for table in tables]
    return [
        cell._replace(by_torch=killed_by_torch(fresh(), seed))
        if cell.table == "as-is"
        else cell
        for cell in cells
    ]


# What is printed.


def report(table: str, cells: Sequence[Cell], rules: Sequence[str], seeds: int) -> None:
    """Print a table: a row per mutator, totals, false alarms, and every failure."""
    rights = [cell for cell in cells if cell.mutator == RIGHT]
    mutants = [cell for cell in cells if cell.mutator != RIGHT]
    print(f"\n== {table}: {len(rules)} rules, {seeds} seeds ==\n")
    head = ["count", "killed", "named", "kind", "crash", "equiv", "inappl"]
    head += ["torch"] if table == "as-is" else []
    print(f"{'mutator':<20}" + "".join(f"{word:>8}" for word in head))
    for mutator in MUTATORS:
        rows = [cell for cell in mutants if cell.mutator == mutator]
        _print_row(mutator, rows, _inapplicable(mutator, rules) * seeds, head)
    unused = sum(_inapplicable(mutator, rules) for mutator in MUTATORS) * seeds
    _print_row("all", mutants, unused, head)
    _print_totals(table, mutants, len(rules) * len(MUTATORS) * seeds)
    _print_rights(rights)
    _print_list("survived", [c for c in mutants if c.outcome == "survived"])
    _print_list("crashed", [c for c in mutants if c.outcome == "crashed"])
    killed = [cell for cell in mutants if cell.outcome == "killed"]
    _print_list("wrong argument named", [c for c in killed if not c.named])
    _print_list("wrong kind of mistake", [c for c in killed if not c.kind])


def _inapplicable(mutator, rules):
    return sum(not MUTATORS[mutator](RULES[rule]) for rule in rules)


def _figures(cells):
    outcomes = Counter(cell.outcome for cell in cells)
    killed = [cell for cell in cells if cell.outcome == "killed"]
    return {
        "count": len(cells) - outcomes["equivalent"],
        "killed": len(killed),
        "named": sum(cell.named for cell in killed),
        "kind": sum(cell.kind for cell in killed),
        "crash": outcomes["crashed"],
        "equiv": outcomes["equivalent"],
        "torch": sum(cell.by_torch for cell in cells),
    }


def _print_row(label, cells, inapplicable, head):
    figures = {**_figures(cells), "inappl": inapplicable}
    print(f"{label:<20}" + "".join(f"{figures[word]:>8}" for word in head))


def _print_totals(table, mutants, cell_count):
    figures = _figures(mutants)
    count, killed = figures["count"], figures["killed"]
    print(f"\nkilled           {_share(killed, count)}")
    print(f"  argument named {_share(figures['named'], killed)} of the killed")
    print(f"  kind named     {_share(figures['kind'], killed)} of the killed")
    print(f"crashed          {_share(figures['crash'], count)}")
    if table == "as-is":
        print(f"torch, fast mode {_share(figures['torch'], count)}")
    used = {(c.rule, c.mutator, c.seed) for c in mutants if c.outcome != "equivalent"}
    without = _share(cell_count - len(used), cell_count)
    print(f"no mutant counts {without} of the cells of rule, mutator and seed")


def _share(part, whole):
    return f"{part} of {whole} ({part / max(whole, 1):.2%})"


def _print_rights(rights):
    wrong = [cell for cell in rights if cell.outcome != "survived"]
    print(f"false alarms     {_share(len(wrong), len(rights))} of the right rules")
    by_torch = sum(cell.by_torch for cell in rights)
    if by_torch:
        print(f"false alarms of torch: {by_torch}")
    _print_list("false alarms", wrong)


def _print_list(title, cells):
    """Print cells, those that differ only in the seed in one line."""
    if not cells:
        return
    print(f"\n-- {title}: {len(cells)}")
    seeds: dict[tuple[str, ...], list[int]] = {}
    for cell in cells:
        key = (cell.mutator, cell.rule, cell.target, cell.line)
        seeds.setdefault(key, []).append(cell.seed)
    for (mutator, rule, target, line), where in sorted(seeds.items()):
        numbers = ",".join(map(str, sorted(where)))
        print(f"{mutator} | {rule} | {target} | {numbers} | {line}")


def _results(units: Sequence[Any], jobs: int) -> Iterable[list[Cell]]:
    if jobs <= 1:
        yield from map(run, units)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(run, units)


def is_beaten(cells: Sequence[Cell]) -> bool:
    """Whether a right rule is refused, a check crashes, or a mutant survives.

    Where autograd does not see the function, or in single precision, a few mutants are
    below what differences can tell: those are printed only.
    """
    rights = [cell for cell in cells if cell.mutator == RIGHT]
    mutants = [cell for cell in cells if cell.mutator != RIGHT]
    return (
        any(cell.outcome != "survived" for cell in rights)
        or any(cell.outcome == "crashed" for cell in mutants)
        or any(c.outcome == "survived" and c.table == "as-is" for c in mutants)
    )


def main() -> int:
    """Run the benchmark as the command line asks; 1 where the check is beaten."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", choices=[*TABLES, "all"], default="all")
    parser.add_argument("--rule", choices=list(RULES), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    tables = list(TABLES) if options.table == "all" else [options.table]
    rules = [options.rule] if options.rule else list(RULES)
    units = [
        (rule, seed, tables)
        for rule, seed in itertools.product(rules, range(options.seeds))
    ]
    start = time.perf_counter()
    cells = list(itertools.chain(*_results(units, options.jobs)))
    for table in tables:
        of_table = [cell for cell in cells if cell.table == table]
        report(table, of_table, rules, options.seeds)
    print(f"\n{time.perf_counter() - start:.0f} s, torch {torch.__version__}")
    return int(is_beaten(cells))


if __name__ == "__main__":
    sys.exit(main())
