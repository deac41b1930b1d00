"""Bytes: what is kept between forward and backward, and the peak of a training step.

A dispatch mode sees every storage that an operator makes and holds it weakly, so that
it can tell at any moment how many bytes are alive, on any device and to the byte.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import Function
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradtools as gt
from tests.benchmarks import ledger
from tests.benchmarks.ledger import Part, Row
from tests.benchmarks.rivals import CONTESTS, Contest
from tests.benchmarks.rivals.contest import (
    COMBINED,
    COMPOSABLE,
    COMPOSITE,
    CUSTOM_OP,
    GRADTOOLS,
)
from tests.benchmarks.timing import no_collection

SIZE, WARM_UP = 1000, 3
ONCE = "gradtools, once_differentiable"
KEPT = "kept after forward"
LEFT = "alive after backward"


class Storages(TorchDispatchMode):
    """Counts the bytes of the storages that are made under it and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator and remember what it made."""
        found = func(*args, **(kwargs or {}))
        given = {_key(leaf) for leaf in tensors((*args, *(kwargs or {}).values()))}
        for leaf in tensors(found):
            if _key(leaf) not in given:
                storage = leaf.untyped_storage()
                self.made[_key(leaf)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.alive())
        return found

    def alive(self) -> int:
        """Return how many bytes are alive now."""
        gone = [key for key, (storage, _) in self.made.items() if storage.expired()]
        for key in gone:
            del self.made[key]
        return sum(size for _, size in self.made.values())


def tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors of an operator's arguments or results.

    torch's pytree would leave cycles behind, which are what is looked for here.
    """
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [leaf for part in value for leaf in tensors(part)]
    return []


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


# One call of a rule.


class Bytes(NamedTuple):
    """What one step of a rule held."""

    kept: int
    left: int


def held(contest: Contest, spelling: Callable[..., Any], device: str) -> Bytes:
    """Return the bytes of a step whose arguments nobody else holds."""
    leaves = contest.active(contest.arguments(SIZE, device=device))
    for _ in range(WARM_UP):  # the check, and what is made once
        _held(contest, spelling, leaves)
    return _held(contest, spelling, leaves)


def _held(contest: Contest, spelling: Callable[..., Any], leaves: Any) -> Bytes:
    with no_collection(), Storages() as storages:
        # As in a network, the arguments are made by the layers before.
        args = pytree.tree_map(lambda x: x * 1.0, leaves)
        outs = spelling(*args)
        del args
        kept = storages.alive()
        gs = pytree.tree_map(torch.ones_like, outs)
        wanted = [x for x in pytree.tree_leaves(leaves) if x.requires_grad]
        found = torch.autograd.grad(
            pytree.tree_leaves(outs), wanted, pytree.tree_leaves(gs)
        )
        # What the results themselves are is the same whoever made them.
        results = {_key(x): x.untyped_storage().nbytes() for x in found}
        results |= {
            _key(x): x.untyped_storage().nbytes()
            for x in pytree.tree_leaves((outs, gs))
        }
        left = storages.alive() - sum(results.values())
    return Bytes(kept, left)


def single_rules(device: str) -> list[Row]:
    """Compare what each spelling of each rule holds."""
    rows = []
    for rule, contest in CONTESTS.items():
        found = {
            name: held(contest, contest.spellings[name], device)
            for name in (GRADTOOLS, COMBINED, COMPOSABLE, CUSTOM_OP, COMPOSITE)
        }
        by_hand = found[COMBINED]
        for name, bytes_ in found.items():
            if name == COMBINED:
                continue
            bar = 1.0 if name == GRADTOOLS else None
            note = f"{bytes_.kept:,} against {by_hand.kept:,} bytes"
            ratio = bytes_.kept / by_hand.kept
            names = "memory", KEPT, rule, name, COMBINED
            rows.append(ledger.exact(*names, "ratio", ratio, bar, note))
        rows.append(
            ledger.exact(
                "memory",
                LEFT,
                rule,
                GRADTOOLS,
                COMBINED,
                "bytes",
                found[GRADTOOLS].left,
                found[COMBINED].left,
                f"{found[COMBINED].left} by hand",
            )
        )
    return rows


# A network.

LAYERS, WIDTH, HEADS, ROWS, BATCH = 24, 64, 4, 32, 4
EPSILON = 1e-5


def norm(x: Any, weight: Any, bias: Any) -> Any:
    """Normalize the last dimension."""
    return functional.layer_norm(x, x.shape[-1:], weight, bias, EPSILON)


def norm_fwd(x: Any, weight: Any, bias: Any) -> Any:
    """Keep the normalized numbers in the place of the argument."""
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + EPSILON)
    hat = centred * scale
    return hat * weight + bias, (hat, scale, weight)


def norm_bwd(residuals: Any, g: Any) -> Any:
    """Derive from the normalized numbers."""
    hat, scale, weight = residuals
    inner = g * weight
    mean = inner.mean(-1, keepdim=True)
    spread = hat * (inner * hat).mean(-1, keepdim=True)
    rows = tuple(range(g.dim() - 1))
    return scale * (inner - mean - spread), (g * hat).sum(rows), g.sum(rows)


def gelu(x: Any) -> Any:
    """Return x times the normal distribution function."""
    return functional.gelu(x)


def gelu_fwd(x: Any) -> Any:
    """Keep the derivative alone."""
    distribution = 0.5 * (1 + torch.erf(x * 2**-0.5))
    density = torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5
    return x * distribution, distribution + x * density


def gelu_bwd(derivative: Any, g: Any) -> Any:
    """Multiply."""
    return g * derivative


class Norm(Function):
    """The same by hand."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any) -> Any:
        out, residuals = norm_fwd(x, weight, bias)
        ctx.save_for_backward(*residuals)
        return out

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        return norm_bwd(ctx.saved_tensors, g)


class Gelu(Function):
    """The same by hand."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        out, derivative = gelu_fwd(x)
        ctx.save_for_backward(derivative)
        return out

    @staticmethod
    def backward(ctx: Any, g: Any) -> Any:
        (derivative,) = ctx.saved_tensors
        return gelu_bwd(derivative, g)


class Layers(NamedTuple):
    """The two functions of a network that have a rule."""

    norm: Callable[..., Any]
    gelu: Callable[..., Any]


def stated(**options: Any) -> Layers:
    """Return both with gradtools."""
    rules = gt.custom_vjp(norm, **options), gt.custom_vjp(gelu, **options)
    rules[0].defvjp(norm_fwd, norm_bwd)
    rules[1].defvjp(gelu_fwd, gelu_bwd)
    return Layers(*rules)


NETWORKS = {
    GRADTOOLS: stated(),
    ONCE: stated(once_differentiable=True),
    COMBINED: Layers(Norm.apply, Gelu.apply),
    COMPOSITE: Layers(norm, gelu),
}


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and beside the stream."""

    def __init__(self, layers: Layers) -> None:
        super().__init__()
        self.layers = layers
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.heads = nn.Linear(WIDTH, 3 * WIDTH)
        self.joined = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Return what each row takes from the others."""
        parts = self.heads(x).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(q, k, v)
        return self.joined(found.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the stream after the block."""
        first, second = self.norms
        x = x + self.attention(self.layers.norm(x, first.weight, first.bias))
        y = self.layers.norm(x, second.weight, second.bias)
        return x + self.down(self.layers.gelu(self.up(y)))


class Network(nn.Module):
    """A stack of blocks."""

    def __init__(self, layers: Layers, depth: int, is_checkpointed: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(layers) for _ in range(depth)])
        self.is_checkpointed = is_checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the stream after all blocks."""
        for block in self.blocks:
            if self.is_checkpointed:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class Usage(NamedTuple):
    """Bytes of one training step."""

    kept: int
    peak: int
    packed: int


class Packed:
    """Hooks that count what is saved, each storage once."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.held: list[torch.Tensor] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count, and hold, lest another storage takes the place."""
        self.sizes[_key(tensor)] = tensor.untyped_storage().nbytes()
        self.held.append(tensor)
        return tensor

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count what is saved within."""
        hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        with hooks:
            yield


def step(
    layers: Layers, depth: int, device: str, is_checkpointed: bool = False
) -> Usage:
    """Return what a training step of a network uses beside its parameters."""
    torch.manual_seed(0)
    network = Network(layers, depth, is_checkpointed).to(device)
    data = torch.randn(BATCH, ROWS, WIDTH, device=device)
    for _ in range(WARM_UP):  # the check; the gradients get their memory
        network(data).sum().backward()
    with no_collection(), Storages() as storages:
        loss = network(data).sum()
        kept = storages.alive()
        loss.backward()
        peak = storages.peak
    packed = Packed()
    with packed.counting():
        loss = network(data).sum()
    packed_bytes = sum(packed.sizes.values())
    parameters = {_key(p): p.untyped_storage().nbytes() for p in network.parameters()}
    packed_bytes -= sum(size for key, size in parameters.items() if key in packed.sizes)
    return Usage(kept, peak, packed_bytes)


def networks(depth: int, device: str) -> list[Row]:
    """Compare training steps."""
    works: Mapping[str, bool] = {"": False, ", checkpointed": True}
    rows = []
    for suffix, is_checkpointed in works.items():
        found = {
            name: step(layers, depth, device, is_checkpointed)
            for name, layers in NETWORKS.items()
        }
        for name, usage in found.items():
            for field, what in (
                ("kept", "kept by a network"),
                ("peak", "peak of a training step"),
                ("packed", "packed by saved-tensor hooks"),
            ):
                if name == COMBINED or (is_checkpointed and field == "packed"):
                    continue
                mine, theirs = getattr(usage, field), getattr(found[COMBINED], field)
                # The default keeps inputs for second derivatives: a row of its own.
                rows.append(
                    ledger.exact(
                        "memory",
                        what + suffix,
                        f"{depth} blocks",
                        name,
                        COMBINED,
                        "ratio",
                        mine / theirs,
                        1.0 if name == ONCE else None,
                        f"{mine:,} against {theirs:,} bytes",
                    )
                )
    return rows


def measure(device: str = "cpu", depth: int = LAYERS) -> Part:
    """Measure single rules and a network."""
    return Part([*single_rules(device), *networks(depth, device)])
