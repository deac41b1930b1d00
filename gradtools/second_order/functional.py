"""Modules as functions of their parameters."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradtools import torch_compat
from gradtools.errors import DefinitionError
from gradtools.lowering.boundary import is_tracing

__all__ = ["functional"]

Tensors: TypeAlias = dict[str, torch.Tensor]


def functional(
    module: nn.Module,
) -> tuple[Callable[..., Any], Tensors, Tensors]:
    """Take a module apart: a function, its parameters, its buffers.

    Args:
        module: Any module; of a ``DistributedDataParallel`` the module inside, since
            the reducer sees ``.backward()`` alone (sum over ranks with ``group=``).

    Returns:
        ``(fn, params, buffers)``, where ``fn(params, buffers, *args, **kwargs)`` is
        what ``module(*args, **kwargs)`` would be with other parameters
        (``torch.func.functional_call``). The dicts share the memory of the module, and
        require no gradient: what is to be differentiated is said by the transform.
        ``fn`` leaves the buffers as they are: what a module in training mode writes to
        them goes to a copy.

    Raises:
        DefinitionError: It is no module, or its parameters are sharded (FSDP2).

    Example:
        >>> fn, params, buffers = gt.functional(torch.nn.Linear(2, 1, bias=False))
        >>> loss = lambda params: fn(params, buffers, torch.ones(2)).sum()
        >>> gt.grad(loss)(params)
        {'weight': tensor([[1., 1.]])}
    """
    if not isinstance(module, nn.Module):
        raise DefinitionError(
            f"functional takes an nn.Module, not {type(module).__name__}",
            fix="A function is one already: hand it to hvp, grad, ... as it is.",
        )
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    sharded = [
        name
        for name, value in inner.named_parameters()
        if torch_compat.is_foreign_subclass(value)
    ]
    if sharded:  # what FSDP2 gathers are its own parameters: all derivatives were zero
        raise DefinitionError(
            f"functional: {sharded[0]} and {len(sharded) - 1} more parameters are "
            "sharded, and their module gathers none but its own",
            fix="Take the module apart before fully_shard, and call the function with "
            "{name: p.full_tensor() for name, p in module.named_parameters()}.",
        )

    lock = contextlib.nullcontext() if is_tracing() else _lock_of(inner)

    def fn(
        params: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        copies = {name: buffer.clone() for name, buffer in buffers.items()}
        # While it runs, the parameters hang in the module, where other threads look.
        with contextlib.nullcontext() if is_tracing() else lock:
            return torch.func.functional_call(inner, {**params, **copies}, args, kwargs)

    params = {name: value.detach() for name, value in inner.named_parameters()}
    buffers = {name: value.detach() for name, value in inner.named_buffers()}
    return fn, params, buffers


_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def _lock_of(module: nn.Module) -> Any:
    """Return the lock of a module, the same for all functions of it."""
    return _locks.setdefault(module, threading.RLock())
