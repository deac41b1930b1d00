"""What a call takes along when it crosses into compiled code: tensors and constants.

Of an object only its identity crosses, on which Dynamo guards; on the other side it is
found again among those that are alive.
"""

from __future__ import annotations

import enum
import gc
import types
from collections.abc import Sequence
from typing import Any

import torch

from gradtools import trees
from gradtools.errors import TransformError, Violation
from gradtools.lowering.trace_time import at_trace_time

__all__ = ["is_plain", "object_of", "packed", "refuse_objects", "unpacked"]


def packed(entries: Sequence[Any], leaves: Sequence[Any]) -> tuple[Any, Any, Any]:
    """Return what may cross: numbers in the containers, the leaves, what is missing."""
    skeleton: Any = tuple(range(len(leaves)))
    if len(entries) != len(leaves) or any(
        a is not b for a, b in zip(entries, leaves, strict=True)
    ):
        skeleton = trees.unflatten(range(len(leaves)), trees.flatten(tuple(entries))[1])
    holes = [
        (index, _identity(leaf))
        for index, leaf in enumerate(leaves)
        if not is_plain(leaf)
    ]
    given = [leaf if is_plain(leaf) else 0 for leaf in leaves]
    return skeleton, given, holes


def is_plain(leaf: Any) -> bool:
    """Whether a value crosses as it is; of an IntEnum only the number would."""
    return isinstance(leaf, _PLAIN) and not isinstance(leaf, enum.Enum)


_PLAIN = (
    torch.Tensor, bool, int, float, complex, str,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def unpacked(skeleton: Any, leaves: Sequence[Any], holes: Sequence[Any]) -> Any:
    """Undo :func:`packed`."""
    values = list(leaves)
    for index, identity in holes:
        values[index] = object_of(identity)
    return trees.unflatten(values, trees.flatten(skeleton)[1])


def refuse_objects(out: Any, target: Any) -> None:
    """Raise for outputs that cannot cross back."""
    rule = getattr(target, "rule", target)
    violations = [
        Violation(path, "a tensor, a number or a text", f"a {type(leaf).__name__}")
        for path, leaf in zip(
            trees.paths(out, "output"), trees.flatten(out)[0], strict=True
        )
        if not is_plain(leaf)
    ]
    if violations:
        raise TransformError(
            f"{rule.where.split()[0]}: in a compiled transform a rule returns tensors, "
            "numbers and texts alone",
            rule=rule.where,
            violations=violations,
            fix="Leave it out of the output, or call the rule outside of a transform.",
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


def object_of(identity: int) -> Any:
    """Return the object that Dynamo guards on by identity; 0 stands for None."""
    if identity == 0:
        return None
    for thing in gc.get_objects():
        if id(thing) == identity:
            return thing
    raise TransformError(
        "an argument of compiled code is no more, or it is a constant that cannot be "
        "handed over, such as numpy's dtypes",
        fix="Keep an object alive while the compiled code is in use; pass numbers, or "
        "a text, for such a constant.",
    )
