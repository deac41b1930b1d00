"""torch.compile: the only module that knows of it.

Dynamo traces a rule in one of two ways. With no transform active, and a backend that
goes through AOT autograd, it follows :class:`Traced` into fwd and bwd, guards on all
that they read, and drops nothing. Where a torch.func transform or a forward-mode level
is active it would drop bwd without a sign; and a backend that runs Dynamo's graph as it
is would differentiate bwd without the residuals. There the rule crosses as one opaque
call (``nonstrict_trace``), and everything happens as in eager mode when AOT autograd,
or the backend, runs that call.

What crosses is tensors and constants. Python numbers that fwd and bwd read from
closures, globals and objects would be baked in, so the traced code reads them too and
Dynamo guards on them: :func:`_numbers_of`.

Nothing here imports ``torch._dynamo`` (that takes seconds): functions that Dynamo must
treat specially are marked by attribute, and the crossing is made by the first trace
that needs it.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch.autograd import Function

from gradtools import torch_compat, trees
from gradtools.errors import GradtoolsError
from gradtools.lowering import free_variables
from gradtools.lowering.flat import Plan
from gradtools.lowering.residuals import Layout
from gradtools.lowering.state import State
from gradtools.rules.rule import Rule
from gradtools.rules.signature import CallSignature, flatten_entries
from gradtools.trees import Structure

__all__ = [
    "Crossable",
    "call",
    "is_tracing",
    "register",
    "unseen",
    "without_compiling",
]

P = ParamSpec("P")
R = TypeVar("R")

is_tracing: Callable[[], bool] = torch.compiler.is_dynamo_compiling


def unseen(function: Callable[P, R]) -> Callable[P, R]:
    """Keep Dynamo from compiling a function, and all that it calls, frame by frame.

    After a graph break Dynamo goes on with whatever Python frame comes next: with the
    rooms of gradtools, and with the user's functions in the midst of a check.
    """
    code: Any = function
    _frames.set_code_exec_strategy(code.__code__, _SKIP)
    return function


_C: Any = torch._C
_frames: Any = _C._dynamo.eval_frame
_SKIP = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.SKIP)


def without_compiling() -> contextlib.AbstractContextManager[Any]:
    """Run compiled functions as they are: the caller may hold Dynamo's lock."""
    if "torch._dynamo" in sys.modules:
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


class Crossable(Protocol):
    """What can be called on the other side of the boundary."""

    key: str
    rule: Rule
    reads: Sequence[free_variables.Path]
    names: Sequence[str]

    def run_entries(self, entries: Sequence[Any]) -> Any:
        """Call the rule in eager mode, with bound arguments."""
        ...

    def before_trace(
        self,
        entries: tuple[Any, ...] | None,
        wants: Callable[[Any], bool] | None,
        order: int,
    ) -> None:
        """Check the rule on arguments like these, which have no values."""
        ...


_keys = itertools.count()
_registry: weakref.WeakValueDictionary[str, Crossable] = weakref.WeakValueDictionary()


def register(rule: Crossable) -> str:
    """Return the name by which a rule is found on the other side."""
    key = f"rule {next(_keys)}"
    _registry[key] = rule
    return key


def at_trace_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have Dynamo run a function while it traces, and take its result as a constant.

    This is ``torch.compiler.assume_constant_result`` without its import of Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def call(target: Crossable, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a rule while Dynamo traces."""
    rule = target.rule
    entries = rule.parameters.bind(args, kwargs)
    leaves, spec = flatten_entries(entries)
    if _is_exporting():
        if _needs_gradient(leaves):
            _warn_of_export(rule.name)
        return rule.parameters.call(rule.fun, entries)
    # Dynamo guards on the level that it reads itself, and compiles anew under another.
    moving = _is_moving() or torch_compat.dual_level() >= 0
    if moving and _level_is_outside():
        _prepare(target.key)
        return _outside(target, entries)
    if rule.bwd is None or moving or _must_cross():
        _before_trace(target.key, True)
        return _cross(target, entries, leaves, moving)
    if not _needs_gradient(leaves):
        return rule.parameters.call(rule.fun, entries)
    _before_trace(target.key, False)
    needs = tuple(isinstance(x, torch.Tensor) and x.requires_grad for x in leaves)
    plan = Plan(
        rule, CallSignature(rule.parameters, entries, leaves, spec, needs), _STATE
    )
    *tensors, outputs = Traced.apply(plan, *leaves)
    return outputs.rebuild(tensors)


def _needs_gradient(leaves: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves
    )


class Traced(Function):
    """The Function that Dynamo follows: first-order reverse mode and nothing else."""

    @staticmethod
    def forward(ctx: Any, plan: Any, *leaves: Any) -> Any:
        out, residuals = plan.call_fwd(plan.signature.entries(leaves))
        outs, outputs = Structure.split(out)
        tensors, structure = Structure.split(residuals)
        ctx.save_for_backward(*tensors)
        floating = tuple(out.is_floating_point() or out.is_complex() for out in outs)
        ctx.plan, ctx.layout = plan, Layout(outputs, structure, (), None, floating)
        return (*outs, outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        plan, layout = ctx.plan, ctx.layout
        given = layout.only_floating(cotangents)
        values = plan.backward(
            layout, ctx.saved_tensors, given, ctx.needs_input_grad[1:]
        )
        return (None, *values)


_STATE = State(watched={"fwd", "bwd"})


@at_trace_time
def _before_trace(key: str, transformed: bool) -> None:
    """Let the check run on what Dynamo knows of the arguments."""
    from torch._dynamo.exc import ShortenTraceback
    from torch._dynamo.symbolic_convert import InstructionTranslator

    frame: Any = InstructionTranslator.current_tx().output.current_tx
    while frame.f_code is not _code_of_call:
        frame = frame.parent
    wanting: list[torch.Tensor] = []
    examples: list[torch.Tensor] = []
    try:
        entries = _stand_in(frame.symbolic_locals["entries"], wanting, examples)
    except _Unknown:
        entries = None

    def wants(leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and (
            leaf.requires_grad or any(leaf is tensor for tensor in wanting)
        )

    try:
        order = torch_compat.order(examples)
        _registry[key].before_trace(entries, None if transformed else wants, order)
    except GradtoolsError as error:
        # Dynamo lets some of its own exceptions through; of all others it makes a
        # report of an internal error.
        both: Any = type(type(error).__name__, (type(error), ShortenTraceback), {})
        wrapped = both.__new__(both, *error.args)
        wrapped.__dict__.update(error.__dict__, **_SHORT)
        raise wrapped from None


_SHORT = {"first_useful_frame": None, "frame_exec_strategy": None}
_code_of_call = call.__code__


class _Unknown(Exception):  # noqa: N818 (caught above)
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
    raise _Unknown  # made in the trace: there is nothing outside yet


@at_trace_time
def _must_cross() -> bool:
    """Whether Dynamo's own treatment of a Function would be wrong."""
    return torch_compat.transforms_active() or not _goes_through_aot()


@at_trace_time
def _level_is_outside() -> bool:
    """Whether AOT autograd would compile without the tangents that will come in."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    graphs = [
        tracer.graph for tracer in InstructionTranslator.current_tx().output.tracers
    ]
    opened = (
        "_enter_dual_level" in str(node.target) for g in graphs for node in g.nodes
    )
    return _goes_through_aot() and not any(opened)


def _goes_through_aot() -> bool:
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
def _is_exporting() -> bool:
    """Whether torch.export traces (torch 2.11 answers True to traced code, always)."""
    return torch.compiler.is_exporting()


@at_trace_time
def _warn_of_export(name: str) -> None:
    warnings.warn(
        f"torch.export keeps the forward of the rule {name} only: what is exported has "
        "the derivative of its function, not of the rule (pytorch#106388)",
        stacklevel=2,
    )


# The crossing.


def _cross(
    target: Crossable, entries: Sequence[Any], leaves: Sequence[Any], moving: bool
) -> Any:
    """Call a rule through a call that Dynamo does not look into."""
    _ = {target.key}  # a constant from here on, see below
    _prepare(target.key)
    skeleton: Any = tuple(range(len(leaves)))
    if len(entries) != len(leaves) or any(
        a is not b for a, b in zip(entries, leaves, strict=True)
    ):
        skeleton = trees.unflatten(range(len(leaves)), trees.flatten(tuple(entries))[1])
    holes = [
        (index, _identity(leaf))
        for index, leaf in enumerate(leaves)
        if not isinstance(leaf, _PLAIN)
    ]
    given = [leaf if isinstance(leaf, _PLAIN) else 0 for leaf in leaves]
    numbers: list[Any] = []
    for path in target.reads:
        _numbers_of(free_variables.follow(target.rule, path), target.names, 2, numbers)
    for leaf in leaves:
        if not isinstance(leaf, _PLAIN):
            _numbers_of(leaf, target.names, 2, numbers)
    for number in numbers:
        # As the key of a set a number must be a constant; as an argument Dynamo may
        # make a symbol of it, and guard on nothing.
        _ = {number}
    moved = True if moving else False  # noqa: SIM210 (a constant to Dynamo)
    return _crossing(target.key, skeleton, given, holes, moved)


_PLAIN = (torch.Tensor, bool, int, float, complex, str, torch.dtype, torch.device)

_crossing: Any = None
_outside: Any = None


@at_trace_time
def _prepare(key: str) -> None:
    """Make the crossing, and list anew what the rule's functions read."""
    global _crossing, _outside
    import torch._dynamo

    if _crossing is None:
        _crossing = torch._dynamo.nonstrict_trace(_other_side)
        _outside = torch._dynamo.disable(
            _run_entries,
            reason="gradtools: forward mode around a compiled region loses the rule; "
            "open the level (or call jvp) inside the compiled function",
        )
    target = _registry[key]
    functions = {
        role: getattr(target.rule, role) for role in ("fun", "fwd", "bwd", "jvp")
    }
    target.reads = [
        (("attribute", role), *path)
        for role, function in functions.items()
        for path in free_variables.free_variables(function).values()
    ]
    target.names = sorted(
        frozenset[str]().union(*map(free_variables.names_used, functions.values()))
    )


def _identity(leaf: Any) -> int:
    if leaf is None:
        return 0
    if isinstance(leaf, types.BuiltinFunctionType):
        return 0 + _constant_id(leaf)
    return id(leaf)


@at_trace_time
def _constant_id(leaf: Any) -> int:
    """Return the identity of a function that torch 2.11 will not give us."""
    return id(leaf)


@at_trace_time
def _is_moving() -> bool:
    """Whether forward mode is active where the rule is called."""
    return torch_compat.forward_ad_active()


def _other_side(
    key: str, skeleton: Any, leaves: list[Any], holes: list[Any], moving: bool
) -> Any:
    """Call the rule as in eager mode."""
    leaves = list(leaves)
    for index, identity in holes:
        leaves[index] = _object(identity)
    spec = trees.flatten(skeleton)[1]
    with torch_compat.dual_level_announced(moving):
        return _registry[key].run_entries(trees.unflatten(leaves, spec))


def _run_entries(target: Crossable, entries: Sequence[Any]) -> Any:
    return target.run_entries(entries)


def _object(identity: int) -> Any:
    """Return the object that Dynamo guards on by identity; 0 stands for None."""
    if identity == 0:
        return None
    return next(thing for thing in gc.get_objects() if id(thing) == identity)


def _numbers_of(value: Any, names: Sequence[str], depth: int, found: list[Any]) -> None:
    """Collect the numbers and texts that code using ``names`` reaches from a value."""
    if isinstance(value, (bool, int, float, complex, str)):
        found.append(value)
    elif isinstance(value, torch.Tensor) or depth == 0:
        return
    elif isinstance(value, (list, tuple)):
        for item in value:
            _numbers_of(item, names, depth - 1, found)
    elif isinstance(value, dict):
        for item in value.values():
            _numbers_of(item, names, depth - 1, found)
    else:
        for name in names:
            if hasattr(value, name):
                _numbers_of(getattr(value, name), names, depth - 1, found)
