"""Tensors that reach a rule's functions past the arguments.

A tensor that needs a gradient and comes through a closure, a global, a default,
``self`` or a callable argument would get none, silently: :class:`Watch` finds it while
the function runs.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gradtools import torch_compat
from gradtools.errors import CapturedTensorError, Violation
from gradtools.lowering.contents import (
    PLAIN,
    hidden_tensors,
    place_of,
    unnamed,
)
from gradtools.rules.rule import Rule

__all__ = [
    "Watch",
    "captured",
    "is_without_gradient",
    "may_hide_parameters",
    "needs_gradient",
    "refuse_hidden_parameters",
]


class Watch(TorchFunctionMode):
    """Raise when a tensor that needs a gradient was not handed to the function.

    Args:
        rule: The rule, for the message.
        role: Which of its functions runs.
        arguments: The values that the function was given.
    """

    def __init__(self, rule: Rule, role: str, arguments: Iterable[Any]) -> None:
        super().__init__()
        self.rule = rule
        self.role = role
        self.function = getattr(rule, role)
        self.level = torch_compat.innermost_level()
        self.found: CapturedTensorError | None = None
        self.known: dict[int, weakref.ref[torch.Tensor]] = {}
        values = list(arguments)
        self.arguments = [value for value in values if isinstance(value, torch.Tensor)]
        self.objects = [value for value in values if not isinstance(value, PLAIN)]
        for tensor in self.arguments:
            self.remember(tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_property = getattr(func, "__name__", "") == "__get__"
        if not (is_property or is_without_gradient(func)):
            self.refuse(_tensors_in((args, kwargs)))
        result = func(*args, **kwargs)
        produced = list(_tensors_in(result))
        if is_property and produced:
            self.refuse(_tensors_in(args))
        for tensor in produced:
            self.remember(tensor)
        return result

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Raise again what was found: torch's ``**`` makes another error of it."""
        super().__exit__(kind, error, traceback)
        if self.found is not None and error is not self.found:
            raise self.found from None

    def refuse(self, tensors: Iterable[torch.Tensor], place: str = "") -> None:
        """Raise for a tensor that is owed a gradient and did not come as an argument.

        Args:
            tensors: What the function uses, or returned.
            place: Where it stands in what the function returned.
        """
        for tensor in tensors:
            if needs_gradient(tensor) and not self.is_known(tensor):
                within = (tensor, *torch_compat.unwrapped_to(self.level, tensor))
                places = (place_of(t, self.function, self.objects) for t in within)
                where = next(filter(None, places), unnamed(tensor))
                self.found = captured(self.rule, self.role, place + where)
                raise self.found

    def remember(self, tensor: torch.Tensor) -> None:
        """Take a tensor for known: an argument, or made from arguments."""
        for made in (tensor, *torch_compat.unwrapped_to(self.level, tensor)):
            key = id(made)
            self.known[key] = weakref.ref(made, functools.partial(self.forget, key))

    def forget(self, key: int, _: Any) -> None:
        """Let a tensor go that is no more; its number may be given to another one."""
        self.known.pop(key, None)

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is an argument, or was made inside."""
        reference = self.known.get(id(tensor))
        if reference is not None and reference() is tensor:
            return True
        # A transform that is opened inside wraps what it is given. Its number may be
        # that of one outside, which is set aside while the function runs.
        inside = next(torch_compat.unwrapped_to(self.level, tensor), None)
        return (
            inside is not None
            and (self.is_known(inside) or not needs_gradient(inside))
            and torch_compat.is_at_open_level(tensor)
            and place_of(tensor, self.function, self.objects) is None
        )


def is_without_gradient(function: Any) -> bool:
    """Whether a torch function may be asked of a captured tensor.

    Its metadata (a property that gives no tensor is metadata too), something else of
    its shape, and its value where that is asked outright.
    """
    return getattr(function, "__name__", "") in _WITHOUT_GRADIENT


_WITHOUT_GRADIENT = frozenset(
    {
        "__format__", "__hash__", "__len__", "__repr__", "detach", "dim",
        "element_size", "empty_like", "full_like", "get_device", "is_complex",
        "is_contiguous", "is_floating_point", "ndimension", "nelement",
        "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "numel",
        "ones_like", "rand_like", "randn_like", "size", "stride", "zeros_like",
    }
)  # fmt: skip


def captured(rule: Rule, role: str, where: str) -> CapturedTensorError:
    """Return the error for a tensor that came past the arguments."""
    return CapturedTensorError(
        f"{rule.name}: {role} uses a tensor that needs a gradient without getting it "
        "as an argument, so its gradient would be lost",
        rule=rule.where,
        function=rule.which(role),
        violations=[
            Violation(where, "an argument of the rule", "a captured tensor"),
        ],
        fix="Pass it as an argument (gradtools.closure_convert finds all of them), or "
        "capture tensor.detach() if it is a constant.",
    )


def needs_gradient(tensor: torch.Tensor) -> bool:
    """Whether a captured tensor would be owed a gradient."""
    return (
        tensor.requires_grad
        or torch_compat.is_wrapped(tensor)
        or (torch_compat.forward_ad_active() and torch_compat.has_tangent(tensor))
    )


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)


def may_hide_parameters(leaf: Any) -> bool:
    """Whether an argument is a module or another callable with a state of its own."""
    return callable(leaf) and not isinstance(leaf, (torch.Tensor, type))


def refuse_hidden_parameters(
    rule: Rule, paths: list[str], leaves: Iterable[Any]
) -> None:
    """Raise for a module or callable argument with parameters that need a gradient."""
    violations = []
    for index, leaf in enumerate(leaves):
        if not may_hide_parameters(leaf) or (index == 0 and rule.is_method):
            continue  # what self holds and the rule uses, Watch finds
        hidden = [
            path for path, tensor in hidden_tensors(leaf) if needs_gradient(tensor)
        ]
        if hidden:
            kind, path = type(leaf).__name__, hidden[0].lstrip(".")
            got = f"a {kind} whose {path} needs a gradient"
            violations.append(
                Violation(paths[index], "a value without parameters", got)
            )
    if violations:
        raise CapturedTensorError(
            f"{rule.name}: an argument holds parameters that need a gradient, and "
            "would get none",
            rule=rule.where,
            violations=violations,
            fix="Pass the parameters as arguments of their own: call the module "
            "through "
            "torch.func.functional_call, or convert it with gradtools.closure_convert.",
        )
