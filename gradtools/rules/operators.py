"""A kernel as operators of torch, for what looks at tensors instead of computing.

``torch.compile``, ``torch.export`` and dispatch modes see one operator per structure of
arguments, in the namespace ``gradtools``, with a schema made from a call. It is made
when the first trace meets it (a millisecond), never at definition.

An operator holds its kernel weakly and stays registered when that is gone: a graph may
still name it.
"""

from __future__ import annotations

import enum
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from gradtools import torch_compat, trees
from gradtools.errors import DefinitionError, TransformError
from gradtools.rules.rule import place
from gradtools.rules.signature import Parameters

__all__ = ["Operators"]

NAMESPACE = "gradtools"


class Opaque(Protocol):
    """What an operator calls."""

    name: str
    where: str
    out: Callable[..., Any]
    parameters: Parameters

    def run_entries(self, entries: Sequence[Any]) -> Any:
        """Call the kernel."""
        ...

    def like(self, entries: Sequence[Any]) -> Any:
        """Return tensors like the output."""
        ...

    def paths(self, leaves: Sequence[Any], spec: trees.Spec | None) -> list[str]:
        """Return one key path per leaf."""
        ...


class Operators:
    """The operators of one kernel, by the structure of their arguments.

    Attributes:
        rule: What is around the kernel, in a weak reference.
    """

    rule: Callable[[], Any]

    def __init__(self, kernel: Opaque) -> None:
        self.kernel = weakref.ref(kernel)
        self.made: dict[Any, Operator] = {}

    def call(
        self, leaves: Sequence[Any], spec: trees.Spec | None, *, tracked: bool = False
    ) -> Any:
        """Call the kernel as an operator.

        Args:
            leaves: The arguments.
            spec: Their containers.
            tracked: The derivative of the operator is asked for.
        """
        kernel = self.kernel()
        assert kernel is not None  # it is what calls
        structure = trees.flatten(_promised(kernel, leaves, spec))[1]
        key = (spec, *map(_kind, leaves), structure)
        with _lock:
            operator = self.made.get(key)
            if operator is None or not operator.serves(leaves):
                operator = Operator(kernel, self.rule, leaves, spec, structure)
                self.made[key] = operator
        return operator(leaves if tracked else [_detached(leaf) for leaf in leaves])


class Operator:
    """One operator.

    Attributes:
        op: As torch has it.
        crossing: The places of the arguments that it takes.
        built_in: The others.
    """

    def __init__(
        self,
        kernel: Opaque,
        rule: Callable[[], Any],
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        structure: trees.Spec,
    ) -> None:
        self.kernel = weakref.ref(kernel)
        self.rule = rule
        self.where = kernel.where
        self.spec = spec
        self.structure = structure
        self.crossing = [i for i, leaf in enumerate(leaves) if _schema_type(leaf)]
        self.built_in = {
            i: _held(leaf) for i, leaf in enumerate(leaves) if not _schema_type(leaf)
        }
        names = _argument_names(kernel.paths(leaves, spec))
        taken = (f"{_schema_type(leaves[i])} {names[i]}" for i in self.crossing)
        given = ["Tensor"] * structure.num_leaves
        returns = given[0] if len(given) == 1 else f"({', '.join(given)})"
        self.op = torch.library.custom_op(
            f"{NAMESPACE}::{_free_name(kernel.name)}",
            self.run,
            mutates_args=(),
            schema=f"({', '.join(taken)}) -> {returns}",
        )
        self.op.register_fake(self.fake)
        self.op.register_autograd(self.backward, setup_context=_save)

    def serves(self, leaves: Sequence[Any]) -> bool:
        """Whether the objects that are built in are the ones at hand."""
        return all(held() is leaves[i] for i, held in self.built_in.items())

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Call the operator."""
        found = self.op(*(leaves[i] for i in self.crossing))
        outs = [found] if isinstance(found, torch.Tensor) else found
        return trees.unflatten(outs, self.structure)

    def run(self, *args: Any) -> Any:
        """Call the kernel: what torch does with tensors that have values."""
        if torch_compat.forward_ad_active():
            raise TransformError(
                "forward mode reached the operator of an external, which has no "
                "tangent: it would be zero",
                rule=self.where,
                fix="Call the external itself, instead of an exported program.",
            )
        out = self.alive(self.kernel).run_entries(self.entries(args))
        return _returned(out, torch.Tensor.contiguous)

    def fake(self, *args: Any) -> Any:
        """Return tensors like the output: what torch does with those that have none."""
        out = self.alive(self.kernel).like(self.entries(args))
        return _returned(out, lambda tensor: tensor.new_empty(tensor.shape))

    def backward(self, ctx: Any, *cotangents: Any) -> Any:
        """Differentiate an exported program: by the rule, on a run of its own."""
        rest = iter(ctx.saved_tensors)
        args = [next(rest) if x is None else x for x in ctx.constants]
        with torch.enable_grad():
            out = self.alive(self.rule).run_entries(self.entries(args))
        pairs = [
            (out, cotangent)
            for out, cotangent in zip(trees.flatten(out)[0], cotangents, strict=True)
            if out.requires_grad
        ]
        wanted = [isinstance(x, torch.Tensor) and x.requires_grad for x in args]
        found = iter(
            torch.autograd.grad(
                [out for out, _ in pairs],
                [arg for arg, want in zip(args, wanted, strict=True) if want],
                [cotangent for _, cotangent in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
        )
        return tuple(next(found) if want else None for want in wanted)

    def entries(self, args: Sequence[Any]) -> Sequence[Any]:
        """Return the arguments of the kernel, those that are built in as well."""
        rest = iter(args)
        leaves = [
            self.object_at(place) if place in self.built_in else next(rest)
            for place in range(len(self.crossing) + len(self.built_in))
        ]
        return _entries(leaves, self.spec)

    def object_at(self, place: int) -> Any:
        """Return an object that is built in."""
        held = self.built_in[place]
        found = held()
        if found is None and isinstance(held, weakref.ref):
            raise TransformError(
                "an object that a graph hands to an external is no more",
                rule=self.where,
                fix="Keep a reference to it while the graph is in use.",
            )
        return found

    def alive(self, target: Callable[[], Any]) -> Any:
        """Return what a weak reference leads to."""
        found = target()
        if found is None:
            raise TransformError(
                "an external that a graph calls is no more",
                rule=self.where,
                fix="Keep a reference to it while the graph is in use, or define it "
                "at the top level of a module.",
            )
        return found


def _returned(out: Any, made: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    outs = [made(tensor) for tensor in trees.flatten(out)[0]]
    return outs[0] if len(outs) == 1 else tuple(outs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the arguments; a tensor's place among the constants is None."""
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, torch.Tensor)))
    ctx.constants = [None if isinstance(x, torch.Tensor) else x for x in inputs]


_lock = threading.RLock()  # out= may call another external
_names: set[str] = set()


def _free_name(name: str) -> str:
    """Return a name that no operator has yet."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII) or "external"
    plain = f"external{plain}" if plain[0] in "_0123456789" else plain
    found, count = plain, 1
    while found in _names or hasattr(getattr(torch.ops, NAMESPACE), found):
        count += 1
        found = f"{plain}_{count}"
    _names.add(found)
    return found


def _argument_names(paths: Sequence[str]) -> list[str]:
    """Return key paths as names of arguments: ``args.p['w']`` becomes ``p_w``."""
    plain = [
        re.sub(r"\W+", "_", path.removeprefix("args.")).strip("_") for path in paths
    ]
    unique = len(set(plain)) == len(plain) and all(
        name.isascii() and name.isidentifier() and name not in _RESERVED
        for name in plain
    )
    return plain if unique else [f"a{number}" for number in range(len(plain))]


_RESERVED = {"self", "from", "in", "lambda", "def", "out", "None", "True", "False"}
_TYPES: tuple[tuple[Any, str], ...] = (
    (torch.Tensor, "Tensor"),
    (bool, "bool"),
    ((int, torch.SymInt), "SymInt"),
    ((float, torch.SymFloat), "float"),
    (complex, "complex"),
    (str, "str"),
    (torch.dtype, "ScalarType"),
    (torch.device, "Device"),
    (torch.layout, "Layout"),
    (torch.memory_format, "MemoryFormat"),
)


def _schema_type(leaf: Any) -> str:
    """Return the type of a value in a schema, nothing where it has none."""
    if isinstance(leaf, enum.Enum):  # of an IntEnum the number would cross
        return ""
    return next((name for kind, name in _TYPES if isinstance(leaf, kind)), "")


def _kind(leaf: Any) -> Any:
    """Return what tells operators apart: the type, or the object that is built in."""
    return _schema_type(leaf) or (None if leaf is None else id(leaf))


def _held(leaf: Any) -> Callable[[], Any]:
    """Hold an object weakly, where it can be."""
    try:
        return weakref.ref(leaf)
    except TypeError:
        return lambda: leaf


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _entries(leaves: Sequence[Any], spec: trees.Spec | None) -> Sequence[Any]:
    return leaves if spec is None else trees.unflatten(leaves, spec)


def _promised(kernel: Opaque, leaves: Sequence[Any], spec: trees.Spec | None) -> Any:
    """Ask out= about tensors that may have no values."""
    bare = [_detached(leaf) for leaf in leaves]
    try:
        return kernel.like(_entries(bare, spec))
    except Exception as error:
        if not torch_compat.asks_for_values(error):
            raise
        raise DefinitionError(
            f"{kernel.name}: out= needs the values of its arguments, and in a trace "
            "there are none",
            rule=kernel.where,
            function=f"out= ({place(kernel.out)})",
            fix="Let out= depend on shapes, dtypes and devices alone.",
        ) from error
