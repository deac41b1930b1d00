"""The ctx of a Function class, as an object that forgets nothing and knows no graph.

``torch.autograd.Function`` hands its state from forward to backward through a ``ctx``:
tensors that are saved, attributes of any kind, marks on outputs. :class:`Context` takes
all of it down, so that it can be laid out as residuals, and gives it back to backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from gradtools import torch_compat, trees
from gradtools.lowering.residuals import Remark
from gradtools.rules.marked_inputs import Aliases

__all__ = ["Context", "Outputs", "TracedContext", "kept", "restored"]


class Context:
    """What forward, backward, jvp and setup_context of a Function see as ``ctx``.

    What the class puts on it stands in ``__dict__``; the rest is torch's protocol.

    Attributes:
        needs_input_grad: Per argument, whether its gradient is wanted.
        saved_tensors: What was saved, in backward and jvp.
        to_save: The arguments of ``save_for_backward``.
        saved_for_forward: The arguments of ``save_for_forward``.
        dirty_tensors: Those of ``mark_dirty``.
        non_differentiable: Those of ``mark_non_differentiable``.
        materialize_grads: Whether backward gets zeros for an unused output.
    """

    __slots__ = (
        "__dict__",
        "_forward_cls",
        "dirty_tensors",
        "materialize_grads",
        "needs_input_grad",
        "non_differentiable",
        "saved_for_forward",
        "saved_tensors",
        "to_save",
    )

    def __init__(self, function: Any, needs_input_grad: tuple[bool, ...]) -> None:
        self._forward_cls = function
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()
        self.to_save: tuple[Any, ...] = ()
        self.saved_for_forward: tuple[Any, ...] = ()
        self.dirty_tensors: tuple[Any, ...] = ()
        self.non_differentiable: tuple[Any, ...] = ()
        self.materialize_grads = True

    def save_for_backward(self, *tensors: Any) -> None:
        """Take down what backward will find as ``saved_tensors``."""
        self.to_save = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        """Take down what jvp will find as ``saved_tensors``."""
        self.saved_for_forward = tensors

    def mark_dirty(self, *tensors: Any) -> None:
        """Take down which arguments were changed in place."""
        self.dirty_tensors = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """Take down which outputs have no derivative."""
        self.non_differentiable = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Take down whether backward gets zeros or None for an unused output."""
        self.materialize_grads = value


class TracedContext(Context):
    """A context for Dynamo, which in torch 2.11 cannot list what an object holds.

    Attributes:
        given_names: Of what the class has put on it.
    """

    __slots__ = ("given_names",)

    def __init__(self, function: Any, needs_input_grad: tuple[bool, ...]) -> None:
        object.__setattr__(self, "given_names", [])
        super().__init__(function, needs_input_grad)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        if name not in Context.__slots__ and name not in self.given_names:
            self.given_names.append(name)


@dataclasses.dataclass(frozen=True)
class Outputs(Remark):
    """What backward must know of forward.

    Attributes:
        wanted: Per argument, whether forward was told that a gradient is wanted.
        likes: Per output its shape, dtype and device; None for what is no tensor.
        is_tuple: Forward returned a tuple.
        materialize: Backward gets zeros for an unused output.
    """

    wanted: tuple[bool, ...]
    likes: tuple[tuple[Sequence[int], torch.dtype, torch.device] | None, ...]
    is_tuple: bool
    materialize: bool

    @classmethod
    def of(cls, context: Context, out: Any) -> Outputs:
        """Read it off a context, and what forward returned."""
        is_tuple = isinstance(out, tuple)
        likes = tuple(
            (value.shape, value.dtype, value.device)
            if isinstance(value, torch.Tensor)
            else None
            for value in (out if is_tuple else (out,))
        )
        wanted = context.needs_input_grad
        return cls(wanted, likes, is_tuple, context.materialize_grads)

    def cotangents(self, cotangent: Any) -> list[Any]:
        """Return what torch would hand to backward: one value per output."""
        # Where outputs cross as bits, a tuple comes though forward returned none.
        is_tuple = self.is_tuple or isinstance(cotangent, tuple)
        given = cotangent if is_tuple else (cotangent,)
        values: list[Any] = []
        for value, like in zip(given, self.likes, strict=False):
            if like is None:  # no tensor, or a container that torch does not look into
                values.append(None)
            elif value is None and self.materialize:
                shape, dtype, device = like
                values.append(torch.zeros(shape, dtype=dtype, device=device))
            else:
                values.append(value)
        return values


class Held:
    """A tensor with a graph that forward made for itself, by ``enable_grad``.

    It is handed to backward as it is, graph and all: torch.func cannot see into it, and
    a second derivative past it would be lost, so that there it is refused.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept(
    context: Context, args: Sequence[Any], aliases: Aliases, *, moving: bool
) -> tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]:
    """Return what a context keeps, as residuals.

    Args:
        context: The context that forward has seen.
        args: The arguments of forward.
        aliases: What stood for some of them.
        moving: Whether the class has a jvp, which reads tensors of its own.

    Returns:
        The tensors for backward, those for jvp, and the attributes.
    """
    for_jvp = tuple(context.saved_for_forward) if moving else ()
    attributes = (
        {k: getattr(context, k) for k in context.given_names if hasattr(context, k)}
        if isinstance(context, TracedContext)
        else dict(vars(context))
    )
    found = tuple(context.to_save), for_jvp, attributes
    recording = torch.is_grad_enabled() and any(
        isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args
    )
    # Where torch records nothing, a graph can only be one of forward's own.
    own = set() if recording else {id(t) for t in _with_own_graph(found, args, aliases)}
    if not own:
        saved = aliases.undone(found[0]), aliases.undone(for_jvp)
        return *saved, {k: aliases.undone(value) for k, value in attributes.items()}
    own |= set(aliases.pairs)  # where the graph ends
    return trees.map_tensors(
        lambda tensor: Held(tensor) if id(tensor) in own else tensor, found
    )


def _with_own_graph(
    tree: Any, args: Sequence[Any], aliases: Aliases
) -> Iterator[torch.Tensor]:
    for tensor in trees.flatten(tree)[0]:
        if (
            isinstance(tensor, torch.Tensor)
            and tensor.requires_grad
            and tensor not in aliases
            and not any(tensor is arg for arg in args)
            and not torch_compat.is_view_of(tensor, args)
        ):
            yield tensor


def restored(
    context: Context, saved: Sequence[Any], attributes: dict[str, Any]
) -> Context:
    """Put back on a context what :func:`kept` took from one."""
    context.saved_tensors = tuple(_bare(value) for value in saved)
    for name, value in attributes.items():
        setattr(context, name, _bared(value))
    return context


def _bare(value: Any) -> Any:
    return value.tensor if type(value) is Held else value


def _bared(value: Any) -> Any:
    if trees.is_leaf(value):
        return _bare(value)
    leaves, spec = trees.flatten(value)
    if not any(type(leaf) is Held for leaf in leaves):
        return value
    return trees.unflatten(map(_bare, leaves), spec)
