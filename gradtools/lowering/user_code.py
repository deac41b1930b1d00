"""What surrounds a call of the user's functions: the policy, autocast, a note."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.errors import GradtoolsError
from gradtools.lowering.state import Checks
from gradtools.rules.rule import Rule

__all__ = ["autocast_state", "noted", "under_autocast", "under_policy"]


def noted(error: Exception, rule: Rule, role: str) -> None:
    """Say on an exception of the user's code whose it is; it goes on as it is."""
    if isinstance(error, GradtoolsError):
        return
    note = f"raised in {rule.which(role)} of the rule {rule.where}"
    level = torch_compat.innermost_transform()
    if rule.vmap == "auto" and isinstance(level, torch_compat.VmapLevel):
        note += '; code that vmap cannot enter takes custom_vjp(vmap="sequential")'
    error.add_note(note)


def under_policy(function: Any, policy: str, checks: Checks | None) -> Any:
    """Return a fwd or bwd that runs under the policy of the check at the call.

    It may call rules, on a thread of autograd's, which does not see the caller's
    context (fwd too, which a second derivative runs again). "first" needs nothing.
    """
    if policy == "first" or checks is None:
        return function

    def under(*args: Any, **kwargs: Any) -> Any:
        with checks.under(policy):
            return function(*args, **kwargs)

    return under


def autocast_state(devices: Sequence[str]) -> tuple[tuple[str, torch.dtype], ...]:
    """Return the device types under autocast, each with its dtype."""
    if not torch_compat.autocast_enabled():
        return ()
    return tuple(
        (device, torch.get_autocast_dtype(device))
        for device in devices
        if torch.is_autocast_enabled(device)
    )


def under_autocast(
    states: Sequence[tuple[str, torch.dtype | None]],
    function: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call a function with each device type under autocast to a dtype, or None.

    One ``with`` in the other: torch.compile does not follow a stack of contexts.
    """
    if not states:
        return function(*args, **kwargs)
    (device, dtype), *rest = states
    with torch.autocast(device, dtype, enabled=dtype is not None):
        return under_autocast(rest, function, *args, **kwargs)
