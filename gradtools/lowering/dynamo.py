"""What Dynamo knows while it traces, and what traced code may ask about the trace."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.errors import GradtoolsError

__all__ = [
    "Known", "Unknown", "at_trace_time", "check", "goes_through_aot", "is_exporting",
    "is_moving", "level_is_outside", "must_cross", "warn_of_export",
]  # fmt: skip


def at_trace_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have Dynamo run a function while it traces, and take its result as a constant.

    This is ``torch.compiler.assume_constant_result`` without its import of Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Known:
    """What Dynamo knows of the arguments of the call that it follows.

    Args:
        code: Of the function whose variables they are.

    Attributes:
        wanting: Stand-ins of tensors that need a gradient.
        examples: Dynamo's own tensors.
    """

    def __init__(self, code: types.CodeType) -> None:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        frame: Any = InstructionTranslator.current_tx().output.current_tx
        while frame.f_code is not code:
            frame = frame.parent
        self.variables: dict[str, Any] = frame.symbolic_locals
        self.wanting: list[torch.Tensor] = []
        self.examples: list[torch.Tensor] = []

    def object(self, name: str) -> Any:
        """Return the object that a variable of the frame holds."""
        return self.variables[name].realize().value

    def stand_in(self, name: str) -> Any:
        """Return what a variable of the frame stands for, tensors without values."""
        return _stand_in(self.variables[name], self.wanting, self.examples)

    def wants(self, leaf: Any) -> bool:
        """Whether the gradient of a value is wanted."""
        return isinstance(leaf, torch.Tensor) and (
            leaf.requires_grad or any(leaf is tensor for tensor in self.wanting)
        )


def check(target: Any, entries: Any, wants: Any, known: Known) -> None:
    """Check a rule; raise what is found in a way that Dynamo hands on."""
    from torch._dynamo.exc import ShortenTraceback

    try:
        target.before_trace(entries, wants, torch_compat.order(known.examples))
    except GradtoolsError as error:
        # Dynamo lets some of its own exceptions through; of all others it makes a
        # report of an internal error.
        both: Any = type(type(error).__name__, (type(error), ShortenTraceback), {})
        wrapped = both.__new__(both, *error.args)
        wrapped.__dict__.update(error.__dict__, **_SHORT)
        raise wrapped from None


_SHORT = {"first_useful_frame": None, "frame_exec_strategy": None}


class Unknown(Exception):  # noqa: N818 (caught above)
    """Dynamo holds a value that has no likeness outside of a trace."""


def _stand_in(
    variable: Any, wanting: list[torch.Tensor], examples: list[torch.Tensor]
) -> Any:
    """Return what a variable of Dynamo's stands for, tensors without their values.

    Those that need a gradient are added to ``wanting``, Dynamo's to ``examples``.
    """
    variable = variable.realize()
    proxy = getattr(variable, "proxy", None)
    if proxy is not None and "example_value" in proxy.node.meta:
        example = proxy.node.meta["example_value"]
        if not isinstance(example, torch.Tensor):
            return torch_compat.hint(example)
        examples.append(example)
        shape = [torch_compat.hint(size) for size in example.shape]
        one = torch.empty((), dtype=example.dtype, device=example.device)
        tensor = one.expand(shape)  # no memory for what has no values
        if example.requires_grad:
            wanting.append(tensor)
        return tensor
    if variable.is_python_constant():
        return variable.as_python_constant()
    items = getattr(variable, "items", None)
    if isinstance(items, list):
        kind = variable.python_type()
        values = [_stand_in(item, wanting, examples) for item in items]
        return kind(*values) if hasattr(kind, "_fields") else kind(values)
    if isinstance(items, dict):
        pairs = [(key.vt.as_python_constant(), item) for key, item in items.items()]
        return {key: _stand_in(item, wanting, examples) for key, item in pairs}
    for name in ("value", "fn"):
        if hasattr(variable, name) and variable.source is not None:
            return getattr(variable, name)
    raise Unknown  # made in the trace: there is nothing outside yet


@at_trace_time
def must_cross() -> bool:
    """Whether Dynamo's own treatment of a Function would be wrong."""
    return torch_compat.transforms_active() or not goes_through_aot()


@at_trace_time
def level_is_outside() -> bool:
    """Whether AOT autograd would compile without the tangents that will come in."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    graphs = [
        tracer.graph for tracer in InstructionTranslator.current_tx().output.tracers
    ]
    opened = (
        "_enter_dual_level" in str(node.target) for g in graphs for node in g.nodes
    )
    return goes_through_aot() and not any(opened)


def goes_through_aot() -> bool:
    """Whether the backend of the running trace hands its graph to AOT autograd."""
    from torch._dynamo.backends.common import AotAutograd
    from torch._dynamo.symbolic_convert import InstructionTranslator

    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    while backend is not None:
        name = getattr(backend, "__name__", None) or type(backend).__name__
        if name.startswith("aot_") or "Inductor" in name or name in _AOT_BACKENDS:
            return True
        if isinstance(backend, AotAutograd):
            return True
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(
            backend, "compiler_fn", None
        )
    return False


_AOT_BACKENDS = frozenset({"inductor", "cudagraphs", "openxla"})


@at_trace_time
def is_exporting() -> bool:
    """Whether torch.export traces (torch 2.11 answers True to traced code, always)."""
    return torch.compiler.is_exporting()


@at_trace_time
def warn_of_export(name: str) -> None:
    """Say what torch.export leaves of a rule."""
    warnings.warn(
        f"torch.export keeps the forward of the rule {name} only: what is exported has "
        "the derivative of its function, not of the rule (pytorch#106388)",
        stacklevel=2,
    )


@at_trace_time
def is_moving() -> bool:
    """Whether forward mode is active where the rule is called."""
    return torch_compat.forward_ad_active()
