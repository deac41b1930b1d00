"""What gradtools takes from torch by a private name, and what differs in 2.11 to 2.15.

A name says what it stands for, so that a change upstream has one place to be answered.
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from torch import _guards
from torch._C import (
    _autograd,
    _functorch,  # pyright: ignore[reportAttributeAccessIssue]
)
from torch._functorch import pyfunctorch
from torch._functorch.autograd_function import VmapInfo
from torch._functorch.utils import enable_single_level_autograd_function
from torch._functorch.vmap import vmap_increment_nesting
from torch._subclasses import fake_tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "AtOneLevel", "GradLevel", "VmapLevel", "apply_of", "asks_for_values",
    "attention_by_operators", "autocast_devices", "autocast_enabled",
    "bytes_of_gradients", "call_backward_directly", "clean_autograd", "dispatch_modes",
    "dual_level", "dual_level_announced", "dual_level_holder",
    "edited_outputs_lose_gradients", "fake_tensors", "forget_unknown_sizes",
    "forward_ad_active", "forward_ad_enabled", "function_modes", "graph_is_kept",
    "has_tangent", "hint",
    "innermost_level", "innermost_transform", "is_aot_autograd", "is_at_open_level",
    "is_being_differentiated", "is_differentiated", "is_fake", "is_foreign_subclass",
    "is_intercepted", "is_view", "is_view_of", "is_wrapped", "keep",
    "only_reverse_and_vmap", "order", "passing_error", "plain", "primal_of",
    "put_back", "requires_grad_at_any_level", "run_backward", "running_trace",
    "tangent_of", "transforms_active",
    "unwrap_if_dead", "unwrapped_to", "version_of", "vmap_flat",
    "without_modes",
]  # fmt: skip

transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
"""Whether any torch.func transform is running in this thread."""


def innermost_level() -> int:
    """Return the number of the innermost torch.func transform, 0 for none."""
    return _functorch.maybe_current_level() or 0


def is_at_open_level(tensor: torch.Tensor) -> bool:
    """Whether the transform that a tensor belongs to is running here, or none."""
    return _functorch.maybe_get_level(tensor) <= innermost_level()


def unwrapped_to(level: int, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield what a tensor wraps, from the outside in, down to the given level."""
    while is_wrapped(tensor) and _functorch.maybe_get_level(tensor) > level:
        tensor = _functorch.get_unwrapped(tensor)
        yield tensor


is_wrapped: Callable[[torch.Tensor], bool] = _functorch.is_functorch_wrapped_tensor
"""Whether a tensor belongs to a torch.func transform."""

run_backward: Callable[..., Any] = torch.autograd.graph._engine_run_backward
"""Without a check of shapes."""

graph_is_kept: Callable[[], bool] = _autograd._get_current_graph_task_keep_graph
"""Inside a backward: whether the user asked for ``retain_graph``."""

_interpreters: Callable[[], Any] = _functorch.get_interpreter_stack
_JVP = _functorch.TransformType.Jvp


def forward_ad_active(*, within_forward: bool = True) -> bool:
    """Whether a forward-mode level is open, by itself or by torch.func.jvp.

    While AOT autograd traces a graph of Dynamo's, only functorch knows of the level.
    Within the forward of a Function no tangent moves; False there, if so wanted.
    """
    moves = within_forward or torch._C._is_fwd_grad_enabled()
    return (moves and forward_ad._current_level >= 0) or (
        transforms_active() and any(i.key() == _JVP for i in _interpreters())
    )


unwrap_if_dead: Callable[[torch.Tensor], torch.Tensor] = _functorch.unwrap_if_dead
"""What a tensor wraps, where the transform that it belonged to is over."""


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return ``function.apply`` for calls with no transform active, of live tensors.

    It is what ``Function.apply`` calls when it has found that out anew.
    """
    return getattr(super(torch.autograd.Function, function), "apply")  # noqa: B009


def call_backward_directly(function: type[torch.autograd.Function]) -> None:
    """Have the engine call ``function.backward`` without a search for it each time."""
    node: Any = function._backward_cls
    node.apply = function.backward
    node.astray = False  # until a forward says otherwise


dual_level_holder: Any = forward_ad
"""Where generated code reads ``_current_level``, one variable of the process."""


def dual_level() -> int:
    """Return Python's number of the open forward-mode level, -1 for none."""
    return forward_ad._current_level


@contextlib.contextmanager
def dual_level_announced(is_open: bool) -> Generator[None]:
    """Let Python know of a forward-mode level that a compiled graph has opened."""
    before = forward_ad._current_level
    if is_open and before < 0:
        forward_ad._current_level = 0
    try:
        yield
    finally:
        forward_ad._current_level = before


def bytes_of_gradients(node: Any) -> int:
    """Return the size of what a node of a graph is given in a backward."""
    metas = node._input_metadata
    return sum(math.prod(meta.shape) * meta.dtype.itemsize for meta in metas)


_aten = torch.ops.aten
attention_by_operators: Callable[..., Any] = _aten._scaled_dot_product_attention_math
"""scaled_dot_product_attention without a fused kernel; gives it and its weights."""


def is_being_differentiated() -> bool:
    """Whether a derivative by torch.func or dual numbers is under way around here."""
    return forward_ad_active() or any(
        i.key() in _DIFFERENTIATING for i in _interpreters() or ()
    )


@contextlib.contextmanager
def forward_ad_enabled() -> Generator[None]:
    """Compute tangents again where a Function's jvp has them switched off.

    Without it the outer of two nested forward modes sees constants (pytorch#197867).
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield


def primal_of(tensor: torch.Tensor) -> torch.Tensor:
    """Strip the tangent of the innermost forward-mode level, and of that one only."""
    if tensor.layout is not torch.strided:
        return tensor
    return forward_ad.unpack_dual(tensor, level=0).primal


def tangent_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the tangent of the innermost forward-mode level, if there is one."""
    if tensor.layout is not torch.strided:
        return None  # a sparse tensor can have none, and must not be asked
    return forward_ad.unpack_dual(tensor, level=0).tangent


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether a tensor moves at its own level of forward mode, also in a Function."""
    level = max(_functorch.maybe_get_level(tensor), 0)
    with contextlib.ExitStack() as stack:
        while innermost_level() > level:
            stack.enter_context(pyfunctorch.temporarily_pop_interpreter_stack())
        if level and not any(i.key() == _JVP for i in (_interpreters() or ())[-1:]):
            return False
        # Out of sight of the modes that watch a function: each would ask this again.
        with forward_ad_enabled(), torch._C.DisableTorchFunction():
            return tangent_of(tensor) is not None


def requires_grad_at_any_level(tensor: torch.Tensor) -> bool:
    """Whether a gradient is wanted of ``tensor`` by plain autograd or a transform."""
    while not tensor.requires_grad:
        if not is_wrapped(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


def is_differentiated(tensor: torch.Tensor) -> bool:
    """Whether a derivative in ``tensor`` is under way, in either mode, at any level."""
    moving = forward_ad_active()
    while not (tensor.requires_grad or (moving and has_tangent(tensor))):
        if not is_wrapped(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


def order(leaves: Sequence[Any]) -> int:
    """Return how many derivatives in these values are under way, one upon the other."""
    kinds = {i.level(): i.key() for i in _interpreters() or ()}
    able = {level for level, kind in kinds.items() if kind in _DIFFERENTIATING}
    moving = forward_ad_active()
    if not (able or moving):
        return 1
    found: set[int] = set()
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor):
            continue
        tensor = leaf
        while is_wrapped(tensor):
            level = _functorch.maybe_get_level(tensor)
            if level in able and (
                tensor.requires_grad or (moving and has_tangent(tensor))
            ):
                found.add(level)
            tensor = _functorch.get_unwrapped(tensor)
        if tensor.requires_grad:
            found.add(0)
        if moving and has_tangent(tensor):
            found.add(-1)
    return max(len(found), 1)


def only_reverse_and_vmap() -> bool:
    """Whether the running transforms are grad, vjp and vmap alone.

    And no TorchFunctionMode looks on, which would see what happens between them.
    """
    return (
        not forward_ad_active()
        and torch._C._len_torch_function_stack() == 0
        and all(i.key() in _REVERSE_AND_VMAP for i in _interpreters() or ())
    )


_REVERSE_AND_VMAP = (_functorch.TransformType.Grad, _functorch.TransformType.Vmap)

AtOneLevel: Any = _SingleLevelFunction
"""The class of Functions that belong to the innermost transform alone."""


class VmapLevel:
    """The innermost transform, a vmap: what takes batches apart and makes them."""

    def __init__(self, interpreter: Any) -> None:
        self.level = interpreter.level()
        self.lower = interpreter.lower
        self.info = VmapInfo(interpreter.batch_size(), interpreter.randomness())

    def unwrap(self, value: Any) -> tuple[Any, int | None]:
        """Return the whole batch and its dimension, None for what is not batched."""
        if not isinstance(value, torch.Tensor):
            return value, None
        return _functorch._unwrap_batched(value, self.level)

    def wrap(self, tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
        """Return one element, for all."""
        if dim is None:
            return tensor
        return _functorch._add_batch_dim(tensor, dim, self.level)


class GradLevel:
    """The innermost transform, a grad or vjp: what brings tensors to its level."""

    def __init__(self, interpreter: Any) -> None:
        self.level = interpreter.level()
        self.lower = interpreter.lower
        self.lift: Callable[[torch.Tensor], torch.Tensor] = interpreter._cptr.lift

    def unwrap(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return what the transforms below see of a tensor."""
        return _functorch._unwrap_for_grad(tensor, self.level)

    def wrap(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of this level."""
        return _functorch._wrap_for_grad(tensor, self.level)

    def apply(self, function: Any, *args: Any) -> Any:
        """Apply a Function that belongs to this level alone."""
        with enable_single_level_autograd_function():
            return function.apply(*args)


def innermost_transform() -> VmapLevel | GradLevel | None:
    """Return the innermost of the running transforms, a vmap or a grad; None: none."""
    if not transforms_active():
        return None
    interpreter: Any = pyfunctorch.retrieve_current_functorch_interpreter()
    is_vmap = interpreter.key() == _functorch.TransformType.Vmap
    return VmapLevel(interpreter) if is_vmap else GradLevel(interpreter)


_DIFFERENTIATING = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor underneath all transforms, batch dimensions included."""
    while is_wrapped(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def hint(size: Any) -> Any:
    """Return the number that a symbolic one has in the running trace; no guard."""
    node = getattr(size, "node", None)
    return size if node is None else node.hint


is_fake: Callable[[torch.Tensor], bool] = fake_tensor.is_fake
"""Whether a tensor, under all its wrappers, stands for another one in a trace."""


@contextlib.contextmanager
def fake_tensors() -> Generator[Callable[[Any], Any]]:
    """Compute with shapes alone; gives the function that makes such tensors."""

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)

    with fake_tensor.FakeTensorMode(), torch.no_grad():
        yield fake


def is_foreign_subclass(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a type with a behaviour of its own, such as DTensor."""
    usual: Any = torch.Tensor
    own: Any = type(tensor)
    return own.__torch_dispatch__ is not usual.__torch_dispatch__


is_view: Callable[[torch.Tensor], bool] = torch.Tensor._is_view
"""Whether autograd knows a tensor as a view."""


def is_view_of(tensor: torch.Tensor, others: Sequence[Any]) -> bool:
    """Whether ``tensor`` is a view of one of ``others``, or of the same base."""
    base = tensor._base
    return base is not None and any(
        other is base or other._base is base
        for other in others
        if isinstance(other, torch.Tensor)
    )


def vmap_flat(
    function: Callable[..., Sequence[Any]],
    in_dims: Sequence[int | None],
    batch_size: int,
    randomness: str,
) -> Callable[..., tuple[Sequence[Any], Sequence[int | None]]]:
    """Vectorize a function of flat arguments; return its outputs and their dims.

    Unlike ``torch.func.vmap`` it leaves what does not depend on the batch unbatched,
    and says so with a dim of ``None``.
    """

    def call(*args: Any) -> tuple[Sequence[Any], Sequence[int | None]]:
        with vmap_increment_nesting(batch_size, randomness) as level:
            elements = [
                arg if dim is None else _functorch._add_batch_dim(arg, dim, level)
                for arg, dim in zip(args, in_dims, strict=True)
            ]
            outputs = function(*elements)
            pairs = [
                _functorch._unwrap_batched(output, level)
                if isinstance(output, torch.Tensor)
                else (output, None)
                for output in outputs
            ]
        return [value for value, _ in pairs], [dim for _, dim in pairs]

    return call


autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
"""Whether autocast is on for any device type."""


def autocast_devices() -> list[str]:
    """Return the device types that are under autocast now."""
    kinds = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        kinds.append(accelerator.type)
    return [kind for kind in kinds if torch.is_autocast_enabled(kind)]


@contextlib.contextmanager
def clean_autograd() -> Generator[None]:
    """Run as at the top level of a script: no inference mode, no hooks, no autocast."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_without_saved_tensors_hooks())
        for device in autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def without_modes() -> Generator[None]:
    """Run out of sight of modes, such as make_fx's, which would record or refuse it.

    Also out of the vmap of torch.autograd.functional, which forbids random numbers.
    """
    torch._C._vmapmode_increment_nesting()
    depth = 0
    while torch._C._vmapmode_decrement_nesting():
        depth += 1
    try:
        with _disable_current_modes():
            yield
    finally:
        for _ in range(depth):
            torch._C._vmapmode_increment_nesting()


@contextlib.contextmanager
def _without_saved_tensors_hooks() -> Generator[None]:
    """Take the caller's hooks away for a while (torch.func refuses to run under)."""
    hooks: list[Any] = []
    try:
        while top := _autograd._top_saved_tensors_default_hooks(True):
            hooks.append(top)
            _autograd._pop_saved_tensors_default_hooks()
        yield
    finally:
        for pack, unpack in reversed(hooks):
            _autograd._push_saved_tensors_default_hooks(pack, unpack)


def put_back(tensor: torch.Tensor, value: torch.Tensor, version: int) -> None:
    """Give a tensor the values and the version that it once had."""
    if tensor._version == version and torch.equal(tensor, value):
        return  # batch_norm edits its statistics without a new version
    with torch.no_grad():
        tensor.copy_(value)
    _autograd._unsafe_set_version_counter((tensor,), (version,))


class _Keep(torch.autograd.Function):
    """Hold one tensor as autograd holds it (stands in for SavedTensor on 2.11)."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tensor)
        return tensor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> None:
        return None


def keep(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Save a tensor as ``save_for_backward`` would, apart from the other saved ones.

    Saved-tensor hooks apply. The function that comes back unpacks it, and raises, as
    autograd does, when the tensor was changed in place meanwhile. On its own, because
    ``ctx.saved_tensors`` unpacks, and checks, all at once.
    """
    saved = getattr(_autograd, "_make_saved_tensor", None)
    if saved is not None:
        return saved(tensor, is_output=False).unpack
    if not tensor.requires_grad or is_wrapped(tensor):
        return lambda: tensor
    with torch.enable_grad():
        out: Any = _Keep.apply(tensor)
    return lambda: out.grad_fn.saved_tensors[0]  # the node lives as long as its output


# Who looks on when torch computes, and what has no memory of its own.

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many modes see every operation: in a trace at least one."""

function_modes: Callable[[], int] = torch._C._len_torch_function_stack
"""How many modes see every call of a function of torch's."""

edited_outputs_lose_gradients: bool = torch.__version__ < "2.13"
"""In a trace of Dynamo's, of a Function whose forward edits in place what it returns.

The gradient is zero then, without a sign. A view of the output has it.
"""

_USUAL = (torch.Tensor, torch.nn.Parameter)


def is_intercepted(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors have no memory of their own, or a mode wants to see operations.

    True in traces (fake tensors), under transforms, for meta tensors and DTensors.
    """
    if dispatch_modes():
        return True
    for tensor in tensors:
        if (
            is_wrapped(tensor)
            or tensor.is_meta
            or (type(tensor) not in _USUAL and is_foreign_subclass(tensor))
        ):
            return True
    return False


def version_of(tensor: torch.Tensor) -> int:
    """Return how often torch has edited a tensor in place; 0 where nobody counts."""
    return 0 if tensor.is_inference() else tensor._version


def forget_unknown_sizes() -> None:
    """Drop sizes that code has asked for and not returned; Dynamo looks for them."""
    mode = _guards.detect_fake_mode()
    if mode is not None and mode.shape_env is not None:
        mode.shape_env.pending_fresh_unbacked_symbols.clear()


# What Dynamo is asked while it traces: its modules take seconds to import before.


def running_trace() -> Any:
    """Return what torch.compile knows of the trace that runs."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx()


def is_aot_autograd(backend: Any) -> bool:
    """Whether a backend of torch.compile is AOT autograd with a compiler behind it."""
    from torch._dynamo.backends.common import AotAutograd

    return isinstance(backend, AotAutograd)


def passing_error() -> type[Exception]:
    """Return the kind of error that Dynamo lets through as it is."""
    from torch._dynamo.exc import ShortenTraceback

    return ShortenTraceback


def asks_for_values(error: Exception) -> bool:
    """Whether code has raised because tensors of a trace have no values."""
    return type(error).__name__ in _ASKS_FOR_VALUES  # two of them are slow to import


_ASKS_FOR_VALUES = {
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "GuardOnDataDependentSymNode",
}
