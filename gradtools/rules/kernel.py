"""Kernel: a function that torch cannot see into, called with care.

What it is handed: tensors without a graph, their numbers in a row, or arrays. What it
must give back, and how that is verified, is in :mod:`.promise`. It knows nothing of
derivatives: :mod:`.external` puts a rule around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradtools import torch_compat, trees
from gradtools.errors import DefinitionError, TransformError, Violation
from gradtools.gradcheck.policy import current_policy
from gradtools.lowering.boundary import call_kernel, is_tracing, register
from gradtools.lowering.contract import describe
from gradtools.rules import arrays
from gradtools.rules.operators import Operators
from gradtools.rules.promise import CONSTANTS, Call, Promise
from gradtools.rules.repeated import ASTRAY, repeated
from gradtools.rules.rule import place
from gradtools.rules.signature import Meta, Parameters, flatten_entries

__all__ = ["Kernel"]

_MOST_KNOWN = 512


class Kernel:
    """An opaque function of tensors.

    Attributes:
        function: The user's.
        out: Takes the same arguments and returns tensors like the output.
        parameters: Of the function.
        numpy: The function takes and gives arrays.
        dtypes: Of the floating tensors that it takes; empty for any.
        allow_nan: It may return NaN for finite arguments.
        where: Its name and place, for messages.
        operators: The same as operators of torch, for traces.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        out: Callable[..., Any],
        *,
        numpy: bool,
        dtypes: tuple[torch.dtype, ...],
        allow_nan: bool,
    ) -> None:
        self.name = name
        self.function = function
        self.out = out
        self.parameters = Parameters(function)
        self.numpy = numpy
        self.dtypes = dtypes
        self.allow_nan = allow_nan
        self.where = f"{name} ({place(function)})"
        self.operators = Operators(self)
        self.promises: dict[Any, Promise] = {}
        self.verified: set[Any] = set()
        self.last: Callable[[tuple[Any, ...], bool], Any] | None = None
        self.key = register(self)  # for torch.compile

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the kernel."""
        if is_tracing():
            return call_kernel(self, args, kwargs)
        if self.last is not None and not kwargs:
            out = self.last(args, False)
            if out is not ASTRAY:
                return out
        return self.run_entries(self.parameters.bind(args, kwargs))

    def run_entries(self, entries: Sequence[Any]) -> Any:
        """Call the kernel with bound arguments, by itself or as an operator."""
        leaves, spec = flatten_entries(tuple(entries))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if torch_compat.is_intercepted(tensors):
            self.refuse_wrapped(tensors)
            self.refuse_arguments(leaves, spec)
            return self.operators.call(leaves, spec)
        if not all(map(_is_strided, tensors)):
            self.refuse_layout(leaves, spec)
        promise = self.promise(leaves, spec, entries)
        given = [handed(tensor) for tensor in tensors]
        out = self.run(leaves, spec, given, promise)
        self.last = repeated(self, leaves, promise)
        return out

    def exported(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the kernel as an operator that has the derivative of the rule."""
        leaves, spec = flatten_entries(self.parameters.bind(args, kwargs))
        self.refuse_arguments(leaves, spec)
        return self.operators.call(leaves, spec, tracked=True)

    def run(
        self,
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        given: Sequence[torch.Tensor],
        promise: Promise,
    ) -> Any:
        """Call the kernel with tensors that have values; verify what it does."""
        policy = current_policy()
        look = policy == "always" or not (promise.is_verified or policy == "off")
        call = Call(self, leaves, spec, given, promise)
        if look:
            call.keep_values()
        returned = self.enter(leaves, spec, given)
        flat = call.outputs(returned)
        if look and call.values_are_kept:
            call.verify_values(flat)
            promise.is_verified = True
            self.verified.add(promise.kind)
        if promise.spec is None:
            return flat[0]
        return trees.unflatten(flat, promise.spec)

    def enter(
        self,
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        given: Sequence[torch.Tensor],
    ) -> Any:
        """Run the user's function on what it is handed."""
        values: Sequence[Any] = given
        if self.numpy:
            values = [arrays.array_of(tensor, self.where) for tensor in given]
        rest = iter(values)
        filled = [next(rest) if isinstance(x, torch.Tensor) else x for x in leaves]
        args = filled if spec is None else trees.unflatten(filled, spec)
        try:
            return self.parameters.call(self.function, args)
        except Exception as error:
            self.noted(error)
            raise

    def noted(self, error: Exception) -> None:
        """Say on an exception of the user's code whose it is."""
        error.add_note(f"raised by the kernel {self.where}")

    def refuse(
        self,
        leaves: Sequence[Any],
        given: Sequence[torch.Tensor],
        versions: Sequence[tuple[torch.Tensor, int]],
        out: Any,
        promise: Promise,
    ) -> None:
        """Raise what is wrong with a repeated call, if anything is."""
        call = Call(self, leaves, None, given, promise)
        call.versions = [version for _, version in versions]
        call.outputs(out)

    def promise(
        self, leaves: Sequence[Any], spec: trees.Spec | None, entries: Sequence[Any]
    ) -> Promise:
        """Return what out= says of these arguments; kept, for it costs tensors."""
        key: list[Any] = [spec]
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                key += (leaf.shape, leaf.dtype, leaf.device)
            else:
                key += (type(leaf), leaf)
        try:
            found = self.promises.get(tuple(key))
        except TypeError:  # an object without a hash
            found = None
        if found is None:
            found = self.promised(leaves, spec, entries)
            constants = (x for x in leaves if not isinstance(x, torch.Tensor))
            if all(isinstance(x, CONSTANTS) for x in constants):  # objects change
                if len(self.promises) >= _MOST_KNOWN:
                    self.promises.clear()
                self.promises[tuple(key)] = found
        return found

    def promised(
        self, leaves: Sequence[Any], spec: trees.Spec | None, entries: Sequence[Any]
    ) -> Promise:
        """Ask out= anew; refuse arguments that the kernel does not take."""
        self.refuse_arguments(leaves, spec)
        like, structure = trees.flatten(self.like(entries))
        alone = trees.is_leaf(trees.unflatten(like, structure))
        kind = (spec, *map(_roughly, leaves))
        metas = tuple(map(Meta.of, like))
        return Promise(None if alone else structure, metas, kind, kind in self.verified)

    def like(self, entries: Sequence[Any]) -> Any:
        """Return what out= returns; raise where that is no tree of tensors."""
        try:
            with torch.no_grad():
                found = self.parameters.call(self.out, entries)
        except Exception as error:
            error.add_note(f"raised by out= ({place(self.out)}) of {self.where}")
            raise
        leaves = trees.flatten(found)[0]
        strange = [
            leaf
            for leaf in leaves
            if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided
        ]
        if strange or not leaves:
            got = describe(strange[0]) if strange else "no tensor"
            raise DefinitionError(
                f"{self.name}: out= must return tensors like those of the kernel",
                rule=self.where,
                function=f"out= ({place(self.out)})",
                violations=[Violation("return", "a tensor, or a tree of them", got)],
                fix="Return an empty tensor for each output: out=lambda x: "
                "torch.empty_like(x). A kernel without an output is no function.",
            )
        return found

    def refuse_arguments(self, leaves: Sequence[Any], spec: trees.Spec | None) -> None:
        """Raise for arguments without a tensor, or of a dtype that is not taken."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors:
            raise DefinitionError(
                f"{self.name}: an external takes at least one tensor; none of the "
                "arguments is one, or holds one",
                rule=self.where,
                fix="Call the function itself, or pass its numbers as a tensor.",
            )
        if not self.dtypes:
            return
        expected = " or ".join(str(d).removeprefix("torch.") for d in self.dtypes)
        violations = [
            Violation(path, expected, describe(leaf))
            for path, leaf in zip(self.paths(leaves, spec), leaves, strict=True)
            if isinstance(leaf, torch.Tensor)
            and (leaf.is_floating_point() or leaf.is_complex())
            and leaf.dtype not in self.dtypes
        ]
        if violations:
            raise DefinitionError(
                f"{self.name}: the kernel does not take this dtype",
                rule=self.where,
                violations=violations,
                fix="Convert the argument with .to(), or add the dtype to dtypes=.",
            )

    def refuse_layout(self, leaves: Sequence[Any], spec: trees.Spec | None) -> None:
        """Raise for tensors whose numbers are not in one row in memory."""
        raise DefinitionError(
            f"{self.name}: a kernel takes tensors whose numbers stand in a row in "
            "memory, and this one has another layout",
            rule=self.where,
            violations=[
                Violation(
                    path,
                    "strided",
                    "nested" if leaf.is_nested else str(leaf.layout).split(".")[-1],
                )
                for path, leaf in zip(self.paths(leaves, spec), leaves, strict=True)
                if isinstance(leaf, torch.Tensor) and not _is_strided(leaf)
            ],
            fix="Pass its parts (x.indices(), x.values()) as arguments, or "
            "x.to_dense().",
        )

    def refuse_wrapped(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raise for tensors of a transform: the rule around should have served it."""
        if any(map(torch_compat.is_wrapped, tensors)):
            raise TransformError(
                f"{self.name}: a torch.func transform reached the kernel itself",
                rule=self.where,
                fix="Call the external, not the function that it was made from.",
            )

    def paths(self, leaves: Sequence[Any], spec: trees.Spec | None) -> list[str]:
        """Return one key path per leaf, such as ``args.params['w']``."""
        entries = leaves if spec is None else trees.unflatten(leaves, spec)
        names = self.parameters.names(len(entries))
        return [
            path
            for name, entry in zip(names, entries, strict=True)
            for path in trees.paths(entry, f"args.{name}")
        ]


def handed(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as a kernel gets it: without a graph, its numbers in a row."""
    if tensor.requires_grad or type(tensor) is not torch.Tensor:
        tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    return tensor.contiguous()


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _roughly(leaf: Any) -> Any:
    """Return the kind of an argument, by which values have been looked at."""
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, leaf.device, leaf.dim()
    return (type(leaf), leaf) if isinstance(leaf, (bool, str)) else type(leaf)
