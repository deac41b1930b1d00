"""Kernel: a function that torch cannot see into, called with care.

What a kernel is handed, what it must give back, and what is verified of it:

* on every call, in a few microseconds: structure, shapes, dtypes and devices are those
  that ``out=`` promises; an output shares no memory with an argument or another output;
  no argument has a new version (what torch itself has edited);
* on the first call with a kind of arguments, and on every one under
  ``gradcheck_policy("always")``: no argument has new values (what code has edited
  behind torch's back); no output is NaN where all arguments are finite.

Knows nothing of derivatives: :mod:`.external` puts a rule around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from gradtools import torch_compat, trees
from gradtools.errors import (
    CapturedTensorError,
    DefinitionError,
    ForwardContractError,
    TransformError,
    Violation,
)
from gradtools.gradcheck.policy import current_policy
from gradtools.lowering.boundary import call_kernel, is_tracing, register
from gradtools.lowering.contract import describe
from gradtools.probing import is_checking
from gradtools.rules import arrays
from gradtools.rules.operators import Operators
from gradtools.rules.rule import place
from gradtools.rules.signature import Meta, Parameters, flatten_entries

__all__ = ["Kernel"]

_MOST_KNOWN = 512


class Promise(NamedTuple):
    """What ``out=`` says of the output: its containers and its tensors."""

    spec: trees.Spec | None  # None: one tensor
    metas: tuple[Meta, ...]


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
        self.seen: set[Any] = set()
        self.key = register(self)  # for torch.compile

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the kernel."""
        if is_tracing():
            return call_kernel(self, args, kwargs)
        return self.run_entries(self.parameters.bind(args, kwargs))

    def run_entries(self, entries: Sequence[Any]) -> Any:
        """Call the kernel with bound arguments, by itself or as an operator."""
        entries = tuple(entries)
        leaves, spec = flatten_entries(entries)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if torch_compat.is_intercepted(tensors):
            self.refuse_wrapped(tensors)
            self.refuse_arguments(leaves, spec)
            return self.operators.call(leaves, spec)
        return self.run(leaves, spec, entries, tensors)

    def exported(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the kernel as an operator that has the derivative of the rule."""
        leaves, spec = flatten_entries(self.parameters.bind(args, kwargs))
        self.refuse_arguments(leaves, spec)
        return self.operators.call(leaves, spec, tracked=True)

    def run(
        self,
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        entries: Sequence[Any],
        tensors: Sequence[torch.Tensor],
    ) -> Any:
        """Call the kernel with tensors that have values; verify what it does."""
        promise = self.promise(leaves, spec, entries)
        given = [handed(tensor) for tensor in tensors]
        mark = self.unseen_kind(leaves, spec, given)
        copies = [tensor.clone() for tensor in given] if mark is not None else ()
        versions = [torch_compat.version_of(tensor) for tensor in given]
        returned = self.enter(leaves, spec, given)
        flat = self.laid_flat(returned, promise, given)
        for tensor, version in zip(given, versions, strict=True):
            if torch_compat.version_of(tensor) != version:
                self.refuse_edits(leaves, spec, given, versions, copies)
        if mark is not None:
            self.verify_values(leaves, spec, given, versions, copies, flat)
            self.seen.add(mark)
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
            error.add_note(f"raised by the kernel {self.where}")
            raise

    # What out= promises.

    def promise(
        self, leaves: Sequence[Any], spec: trees.Spec | None, entries: Sequence[Any]
    ) -> Promise:
        """Return what out= says of these arguments; kept, for it costs tensors."""
        try:
            key = (spec, *map(_exactly, leaves))
            found = self.promises.get(key)
        except TypeError:  # an object without a hash
            return self.promised(leaves, spec, entries)
        if found is None:
            found = self.promised(leaves, spec, entries)
            if None not in key[1:]:
                if len(self.promises) >= _MOST_KNOWN:
                    self.promises.clear()
                self.promises[key] = found
        return found

    def promised(
        self, leaves: Sequence[Any], spec: trees.Spec | None, entries: Sequence[Any]
    ) -> Promise:
        """Ask out= anew; refuse arguments that the kernel does not take."""
        self.refuse_arguments(leaves, spec)
        like, structure = trees.flatten(self.like(entries))
        metas = tuple(map(Meta.of, like))
        alone = len(like) == 1 and trees.is_leaf(trees.unflatten(like, structure))
        return Promise(None if alone else structure, metas)

    def like(self, entries: Sequence[Any]) -> Any:
        """Return what out= returns; raise where that is no tree of tensors."""
        try:
            with torch.no_grad():
                found = self.parameters.call(self.out, entries)
        except Exception as error:
            error.add_note(f"raised by out= ({place(self.out)}) of {self.where}")
            raise
        leaves = trees.flatten(found)[0]
        strange = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
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

    # What the kernel returned.

    def laid_flat(
        self, returned: Any, promise: Promise, given: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return the output's leaves as tensors; raise where they are not promised."""
        if promise.spec is None:
            flat = [returned]
        else:
            flat, spec = trees.flatten(returned)
            if spec != promise.spec:
                self.refuse_structure(returned, promise)
        if self.numpy:
            arrays.refuse_shared(self, flat, given)
            pairs = zip(flat, promise.metas, strict=True)
            flat = [arrays.tensor_of(value, meta) for value, meta in pairs]
        for value, meta in zip(flat, promise.metas, strict=True):
            if not (
                isinstance(value, torch.Tensor)
                and value.shape == meta.shape
                and value.dtype == meta.dtype
                and value.device == meta.device
            ):
                self.refuse_output(flat, promise)
        if any(value.requires_grad for value in flat):
            self.refuse_captured()
        self.refuse_shared(flat, given)
        # Detached, for what a foreign library makes is unknown to those who watch.
        return [value.detach() for value in flat]

    def refuse_structure(self, returned: Any, promise: Promise) -> NoReturn:
        """Raise for other containers than those of out=."""
        assert promise.spec is not None
        promised = trees.unflatten(promise.metas, promise.spec)
        raise self.unlike([Violation("return", describe(promised), describe(returned))])

    def refuse_output(self, flat: Sequence[Any], promise: Promise) -> NoReturn:
        """Raise for outputs of another shape, dtype or device."""
        names = ["return"]
        if promise.spec is not None:
            names = trees.paths(trees.unflatten(flat, promise.spec), "return")
        raise self.unlike(
            Violation(name, str(meta), describe(value))
            for name, meta, value in zip(names, promise.metas, flat, strict=True)
            if str(meta) != describe(value)
        )

    def unlike(self, violations: Any) -> ForwardContractError:
        return ForwardContractError(
            f"{self.name}: the kernel returned something else than out= says",
            rule=self.where,
            function=f"out= ({place(self.out)})",
            violations=list(violations),
            fix="Correct the kernel, or what out= returns.",
        )

    def refuse_captured(self) -> NoReturn:
        """Raise where an output has a gradient: its arguments have none."""
        raise CapturedTensorError(
            f"{self.name}: the kernel uses a tensor that needs a gradient without "
            "getting it as an argument, so its gradient would be lost",
            rule=self.where,
            fix="Pass it as an argument, or capture tensor.detach() if it is a "
            "constant.",
        )

    def refuse_shared(
        self, outs: Sequence[torch.Tensor], given: Sequence[torch.Tensor]
    ) -> None:
        """Raise where an output lies in the memory of an argument or another output."""
        spans = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in given]
        for out in outs:
            low, high = span = _span(out)
            for begin, end in spans:
                if begin < high and low < end:
                    raise self.shared()
            spans.append(span)

    def shared(self) -> ForwardContractError:
        return ForwardContractError(
            f"{self.name}: the kernel returned memory of an argument, or the same "
            "memory twice; a later edit of one would change the other",
            rule=self.where,
            fix="Return a copy (.clone(), .copy()), or write into a new tensor.",
        )

    # What was done to the arguments.

    def unseen_kind(
        self,
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        given: Sequence[torch.Tensor],
    ) -> Any:
        """Return the kind of these arguments if their values are to be looked at."""
        kind = (spec, *map(_roughly, leaves))
        policy = current_policy()
        if policy == "off" or (kind in self.seen and policy != "always"):
            return None
        if any(tensor.is_cuda for tensor in given) and (
            torch.cuda.is_current_stream_capturing()
        ):
            return None
        return kind

    def verify_values(
        self,
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        given: Sequence[torch.Tensor],
        versions: Sequence[int],
        copies: Sequence[torch.Tensor],
        flat: Sequence[torch.Tensor],
    ) -> None:
        """Raise for edits that torch does not know of, and for NaN out of nowhere."""
        if not all(map(_same, given, copies)):
            self.refuse_edits(leaves, spec, given, versions, copies)
        if self.allow_nan or is_checking() or not all(map(_is_finite, given)):
            return
        bad = [out for out in flat if _has_nan(out)]
        if bad:
            count = sum(int(torch.isnan(out).sum()) for out in bad)
            raise ForwardContractError(
                f"{self.name}: the kernel returned NaN for finite arguments, "
                f"{count} in {sum(out.numel() for out in bad)} numbers",
                rule=self.where,
                fix="Correct the kernel (memory that it did not write?), or say "
                "allow_nan=True if that is what it means.",
            )

    def refuse_edits(
        self,
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        given: Sequence[torch.Tensor],
        versions: Sequence[int],
        copies: Sequence[torch.Tensor],
    ) -> NoReturn:
        """Put edited arguments back as they were, where copies exist, and raise."""
        paths = [
            path
            for path, leaf in zip(self.paths(leaves, spec), leaves, strict=True)
            if isinstance(leaf, torch.Tensor)
        ]
        edited = []
        for number, (tensor, version) in enumerate(zip(given, versions, strict=True)):
            changed = torch_compat.version_of(tensor) != version
            if changed or (copies and not _same(tensor, copies[number])):
                edited.append(paths[number])
                if copies:
                    torch_compat.put_back(tensor, copies[number], version)
        after = "its values were put back" if copies else "its old values are gone"
        raise ForwardContractError(
            f"{self.name}: the kernel edits its arguments in place ({after})",
            rule=self.where,
            violations=[
                Violation(path, "as it was handed over", "other values after the call")
                for path in edited
            ],
            fix="Write into a new tensor, or copy the argument first (.clone()).",
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
    plain = tensor.detach()
    if plain.is_conj() or plain.is_neg():
        plain = plain.resolve_conj().resolve_neg()
    return plain.contiguous()


def _exactly(leaf: Any) -> Any:
    """Return what out= may depend on; None for an object that may change."""
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return (type(leaf), leaf) if isinstance(leaf, _CONSTANTS) else None


def _roughly(leaf: Any) -> Any:
    """Return the kind of an argument, by which values have been looked at."""
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, leaf.device, leaf.dim()
    return (type(leaf), leaf) if isinstance(leaf, (bool, str)) else type(leaf)


_CONSTANTS = (
    type(None), bool, int, float, complex, str, torch.dtype, torch.device,
)  # fmt: skip


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where in memory a tensor lies."""
    if tensor.is_contiguous():
        low = tensor.data_ptr()
        return low, low + tensor.nbytes
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal to the bit: NaN is NaN, and -0.0 is not 0.0."""
    if torch.equal(first, second):
        return True
    flat = (t.reshape(-1).view(torch.uint8) for t in (first, second))
    return torch.equal(*flat)


def _is_finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _has_nan(tensor: torch.Tensor) -> bool:
    return bool(torch.isnan(tensor).any())
