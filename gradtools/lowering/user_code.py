"""What surrounds a call of the user's functions: the policy, autocast, a note."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gradtools import torch_compat
from gradtools.errors import GradtoolsError
from gradtools.lowering.state import Checks
from gradtools.rules.rule import Rule

__all__ = ["autocast_state", "noted", "under_policy"]


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
