"""The way of a call that is like one before: nothing is looked up, all is compared.

After a kernel has passed some megabytes through the caches, Python runs several times
slower than its loops suggest. So this is one function that calls nothing of ours, for
the plain case: tensors and constants in, one tensor out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch

from gradtools import torch_compat
from gradtools.gradcheck.policy import chosen, current_policy
from gradtools.rules.promise import CONSTANTS, Promise

__all__ = ["ASTRAY", "repeated"]

ASTRAY: Any = object()
"""What is returned for a call that is not like the one before."""


def repeated(
    kernel: Any, leaves: Sequence[Any], promise: Promise
) -> Callable[[tuple[Any, ...], bool], Any] | None:
    """Return what serves calls like a verified one; None where that is not plain.

    Args:
        kernel: The kernel.
        leaves: Its arguments in that call.
        promise: What it returns for such arguments.

    The function that comes back takes the arguments, and whether one that requires a
    gradient is not for it.
    """
    if (
        not promise.is_verified
        or promise.spec is not None
        or promise.kind[0] is not None
        or kernel.numpy
        or not kernel.parameters.simple
        or current_policy() == "always"
        or not all(map(_is_plain, leaves))
    ):
        return None
    expected = [
        (x.shape, x.dtype, x.device) if isinstance(x, torch.Tensor) else (type(x), x)
        for x in leaves
    ]
    count, function = len(expected), kernel.function
    (out_shape, out_dtype, out_device), note = promise.metas[0], kernel.noted
    tensor_type, strided, policy = torch.Tensor, torch.strided, chosen.get
    modes, is_watched = torch_compat.dispatch_modes, torch_compat.function_modes
    is_wrapped = torch_compat.is_wrapped

    def call(args: tuple[Any, ...], needs_gradient: bool) -> Any:  # noqa: PLR0912
        if len(args) != count or policy() == "always" or modes() or is_watched():
            return ASTRAY
        given, spans, versions = [], [], []
        for arg, known in zip(args, expected, strict=True):
            if type(arg) is tensor_type:
                if (
                    len(known) != 3
                    or arg.shape != known[0]
                    or arg.dtype is not known[1]
                    or arg.device != known[2]
                    or arg.layout is not strided
                    or not arg.is_contiguous()
                    or arg.is_neg()
                    or arg.is_inference()
                    or is_wrapped(arg)
                ):
                    return ASTRAY
                if arg.requires_grad:
                    if needs_gradient:
                        return ASTRAY
                    arg = arg.detach()  # noqa: PLW2901
                spans.append((arg.data_ptr(), arg.nbytes))
                versions.append((arg, arg._version))
            elif type(arg) is not known[0] or arg != known[1]:
                return ASTRAY
            given.append(arg)
        try:
            out = function(*given)
        except Exception as error:
            note(error)
            raise
        if (
            type(out) is tensor_type
            and out.shape == out_shape
            and out.dtype is out_dtype
            and out.device == out_device
            and out.layout is strided
            and not out.requires_grad
            and out.is_contiguous()
        ):
            low, length = out.data_ptr(), out.nbytes
            high = low + length
            begin, size, held = promise.last[0]
            if held() is not None:
                spans.append((begin, size))
            for begin, size in spans:
                if begin < high and low < begin + size:
                    break
            else:
                for arg, version in versions:
                    if arg._version != version:
                        break
                else:
                    promise.last = ((low, length, ref(out.untyped_storage())),)
                    return out
        kernel.refuse(args, [arg for arg, _ in versions], versions, out, promise)
        return out

    return call


def _is_plain(leaf: Any) -> bool:
    """Whether ``==`` tells all: an array answers it with an array, objects change."""
    if isinstance(leaf, torch.Tensor):
        return not leaf.dtype.is_complex
    return isinstance(leaf, CONSTANTS)
