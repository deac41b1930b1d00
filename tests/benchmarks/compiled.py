"""What torch.compile makes of a rule: nodes of its graphs, time, recompilations."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import Function

import gradtools as gt
from tests.benchmarks import ledger
from tests.benchmarks.ledger import Part, Row
from tests.benchmarks.rivals import CONTESTS, TINY, Contest
from tests.benchmarks.rivals.contest import COMBINED, COMPOSITE, GRADTOOLS
from tests.benchmarks.speed import Effort, compared, each_time

MOST_NODES, MOST_TIME = 1.0, 1.03
CALLS = 20
SIZES = {"tiny": TINY, "a million": 10**6}
STEP = "compiled step, {}"


def measure(effort: Effort, is_quick: bool = False) -> Part:
    """Measure all three; what is counted is the same on every device."""
    counted = CONTESTS.values() if effort.device == "cpu" else ()
    rows = [
        *(row for contest in counted for row in nodes(contest)),
        *(guards(contest) for contest in counted),
        *times(effort, is_quick),
        *recompilations(effort.device),
    ]
    torch._dynamo.reset()
    return Part(rows)


class Graphs:
    """A backend that counts the nodes of what it is given, and how often it is."""

    def __init__(self) -> None:
        self.forward: list[int] = []
        self.backward: list[int] = []

    def backend(self) -> Callable[..., Any]:
        """Return the backend."""
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(
            fw_compiler=self._counting(self.forward),
            bw_compiler=self._counting(self.backward),
        )

    @staticmethod
    def _counting(counts: list[int]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func

        def compiler(graph: torch.fx.GraphModule, example: Sequence[Any]) -> Any:
            counts.append(
                sum(
                    isinstance(node.target, torch._ops.OpOverload)
                    for node in graph.graph.nodes
                )
            )
            return make_boxed_func(graph.forward)

        return compiler


def nodes(contest: Contest) -> list[Row]:
    """Count the aten nodes of forward and backward."""
    counts = {}
    args = contest.arguments(TINY)
    for name in (GRADTOOLS, COMBINED):
        graphs = Graphs()
        torch._dynamo.reset()
        function = separate(contest.spellings[name])
        backend = graphs.backend()
        step = torch.compile(function, fullgraph=True, backend=backend)
        contest.step(step, args)()
        counts[name] = sum(graphs.forward), sum(graphs.backward)
    rows = []
    for place, work in enumerate(("nodes of the forward", "nodes of the backward")):
        mine, theirs = counts[GRADTOOLS][place], counts[COMBINED][place]
        rows.append(
            ledger.exact(
                "compiled",
                work,
                contest.name,
                GRADTOOLS,
                COMBINED,
                "ratio",
                mine / theirs,
                MOST_NODES,
                f"{mine} against {theirs}",
            )
        )
    return rows


def guards(contest: Contest) -> Row:
    """Count the lines of the tree of guards that Dynamo looks at before each call."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    counts = {}
    args = contest.arguments(TINY)
    for name in (GRADTOOLS, COMBINED):
        torch._dynamo.reset()
        function = separate(contest.spellings[name])
        step = torch.compile(function, fullgraph=True, backend="aot_eager")
        contest.step(step, args)()
        (entry,) = _debug_get_cache_entry_list(function.__code__)
        counts[name] = len(str(entry.guard_manager).splitlines())
    mine, theirs = counts[GRADTOOLS], counts[COMBINED]
    return ledger.exact(
        "compiled",
        "lines of guards",
        contest.name,
        GRADTOOLS,
        COMBINED,
        "ratio",
        mine / theirs,
        None,
        f"{mine} against {theirs}",
    )


def times(effort: Effort, is_quick: bool) -> list[Row]:
    """Compare compiled steps; by inductor, where there is a compiler for it."""
    backend = "inductor" if has_compiler(effort.device) else "aot_eager"
    rows = []
    for size_name, size in SIZES.items():
        contenders = {}
        torch._dynamo.reset()
        for rule, contest in CONTESTS.items():
            if is_quick and (rule != "swish" or size != TINY):
                continue
            args = contest.arguments(size, device=effort.device)
            runs = {}
            for name in (GRADTOOLS, COMBINED, COMPOSITE):
                function = separate(contest.spellings[name])
                runs[name] = contest.step(
                    torch.compile(function, fullgraph=True, backend=backend), args
                )
            contenders[rule] = runs
        if contenders:
            rounds = effort.rounds if size == TINY else effort.rounds_large
            found = effort.race(rounds).run_rules(contenders)
            work = STEP.format(size_name) + f" ({backend})"
            rows += compared("compiled", work, found, GRADTOOLS, COMBINED, MOST_TIME)
            rows += compared("compiled", work, found, GRADTOOLS, COMPOSITE)
            for name in (GRADTOOLS, COMBINED, COMPOSITE):
                rows += each_time("compiled", work, found, name)
    return rows


def separate(spelling: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with code of its own, for Dynamo's cache is by code."""
    namespace: dict[str, Any] = {"spelling": spelling}
    exec("def step(*args):\n    return spelling(*args)", namespace)
    return namespace["step"]


def has_compiler(device: str) -> bool:
    """Whether inductor can work here."""
    if device == "cuda":
        return torch.utils._triton.has_triton()
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


# Recompilations.


@gt.custom_vjp
def leaky(x, slope):
    return torch.where(x > 0, x, slope * x)


@leaky.def_fwd
def _(x, slope):
    return torch.where(x > 0, x, slope * x), (x, slope)


@leaky.def_bwd
def _(residuals, g):
    x, slope = residuals
    return torch.where(x > 0, g, slope * g), None


class Leaky(Function):
    @staticmethod
    def forward(ctx, x, slope):
        ctx.save_for_backward(x)
        ctx.slope = slope
        return torch.where(x > 0, x, slope * x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, g, ctx.slope * g), None


class Change(NamedTuple):
    """What changes from call to call."""

    name: str
    size: Callable[[int], int]
    slope: Callable[[int], float]


CHANGES = (
    Change("a float argument changes", lambda n: 5, lambda n: 0.01 * (n + 1)),
    Change("the batch size changes", lambda n: 5 + n, lambda n: 0.1),
    Change("both change", lambda n: 5 + n, lambda n: 0.01 * (n + 1)),
)


def compilations(
    function: Callable[..., Any], change: Change, device: str, dynamic: bool | None
) -> int:
    """Return how often a function is compiled in a number of calls."""
    torch._dynamo.reset()
    count = 0

    def backend(graph: torch.fx.GraphModule, example: Sequence[Any]) -> Any:
        nonlocal count
        count += 1
        return inner(graph, example)

    inner = torch._dynamo.lookup_backend("aot_eager")
    step = torch.compile(
        separate(function), fullgraph=True, backend=backend, dynamic=dynamic
    )
    with torch._dynamo.config.patch(recompile_limit=CALLS + 1):
        for number in range(CALLS):
            x = torch.randn(change.size(number), 3, device=device, requires_grad=True)
            step(x, change.slope(number)).sum().backward()
    return count


def recompilations(device: str) -> list[Row]:
    """Count compilations in both spellings of a leaky unit."""
    rows = []
    for change in CHANGES:
        for dynamic in (None, True):
            mine = compilations(leaky, change, device, dynamic)
            theirs = compilations(Leaky.apply, change, device, dynamic)
            suffix = ", dynamic=True" if dynamic else ""
            rows.append(
                ledger.exact(
                    "compiled",
                    f"compilations in {CALLS} calls, {change.name}{suffix}",
                    "leaky",
                    GRADTOOLS,
                    COMBINED,
                    "count",
                    mine,
                    theirs,
                    f"{mine} against {theirs}",
                )
            )
    return rows
