"""What Dynamo is asked while it traces: answers that are constants to the trace.

Nothing here imports Dynamo before there is a trace.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.lowering.user_code import autocast_state

__all__ = [
    "at_trace_time",
    "attempts",
    "autocast_here",
    "goes_through_aot",
    "is_exporting_here",
    "is_moving",
    "level_is_outside",
    "must_cross",
    "next_attempt",
    "passing",
]


def at_trace_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have Dynamo run a function while it traces, and take its result as a constant.

    This is ``torch.compiler.assume_constant_result`` without its import of Dynamo.
    """
    marked: Any = function
    marked._dynamo_marked_constant = True
    return function


@at_trace_time
def autocast_here() -> tuple[tuple[str, torch.dtype], ...]:
    """Return the device types under autocast, each with its dtype."""
    return autocast_state(torch_compat.autocast_devices())


@at_trace_time
def must_cross() -> bool:
    """Whether Dynamo's own treatment of a Function would be wrong."""
    return torch_compat.transforms_active() or not goes_through_aot()


@at_trace_time
def level_is_outside() -> bool:
    """Whether AOT autograd would compile without the tangents that will come in."""
    graphs = [tracer.graph for tracer in torch_compat.running_trace().output.tracers]
    opened = (
        "_enter_dual_level" in str(node.target) for g in graphs for node in g.nodes
    )
    return goes_through_aot() and not any(opened)


def goes_through_aot() -> bool:
    """Whether the backend of the running trace hands its graph to AOT autograd."""
    backend: Any = torch_compat.running_trace().output.compiler_fn
    while backend is not None:
        name = getattr(backend, "__name__", None) or type(backend).__name__
        if name.startswith("aot_") or "Inductor" in name or name in _AOT_BACKENDS:
            return True
        if torch_compat.is_aot_autograd(backend):
            return True
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(
            backend, "compiler_fn", None
        )
    return False


_AOT_BACKENDS = frozenset({"inductor", "cudagraphs", "openxla"})


@at_trace_time
def is_exporting_here() -> bool:
    """Whether torch.export traces (torch 2.11 answers True to traced code, always)."""
    return torch.compiler.is_exporting()


@at_trace_time
def is_moving() -> bool:
    """Whether forward mode is active where the rule is called."""
    return torch_compat.forward_ad_active()


# What is to be raised to the user.


class _Attempts(threading.local):
    """What Dynamo tries once, with tensors without values, before it is in a graph.

    Attributes:
        error: What the try has raised.
    """

    name: str = ""
    error: Exception | None = None

    def is_due(self, name: str) -> bool:
        """Whether this is the try; asked once, the answer is no from then on."""
        due, self.name = bool(name) and self.name == name, ""
        return due

    def fail(self, error: Exception) -> None:
        """Take down what the try has raised."""
        self.error = error
        torch_compat.forget_unknown_sizes()

    def taken(self) -> Exception | None:
        """Return the error, and forget it."""
        error, self.error = self.error, None
        return error


attempts = _Attempts()
_numbers = itertools.count(1)


@at_trace_time
def next_attempt() -> str:
    """Return a name for the try that comes next; none where its failure is no matter.

    Without fullgraph Dynamo leaves the call to Python, which will tell what is wrong.
    """
    trace = torch_compat.running_trace().output.root_tx
    attempts.name = f"attempt {next(_numbers)}" if trace.one_graph else ""
    attempts.error = None
    return attempts.name


def passing(error: Exception) -> Exception:
    """Return an error as one that Dynamo lets through.

    It does that with some of its own; of all others it makes a report of an internal
    error.
    """
    kind: Any = type(error)
    both: Any = type(kind.__name__, (kind, torch_compat.passing_error()), {})
    wrapped = both.__new__(both, *error.args)
    wrapped.__dict__.update(error.__dict__, **_SHORT)
    return wrapped


_SHORT = {"first_useful_frame": None, "frame_exec_strategy": None}
