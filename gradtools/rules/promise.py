"""What a kernel promises, and one call of it, in which that is verified.

On every call, in a few microseconds: structure, shapes, dtypes and devices are those
that ``out=`` says; an output shares no memory with an argument, with another output or
with one of the call before that is still in use; no argument has a new version, which
is how torch's own edits show.

On the first call with a kind of arguments, and on every one under
``gradcheck_policy("always")``: no argument has new values, whoever edited it; no output
is NaN where all arguments are finite. That takes a copy of the arguments, and reading
everything once.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from gradtools import torch_compat, trees
from gradtools.errors import CapturedTensorError, ForwardContractError, Violation
from gradtools.lowering.contract import describe
from gradtools.probing import is_checking
from gradtools.rules import arrays
from gradtools.rules.rule import place
from gradtools.rules.signature import Meta, is_differentiable

__all__ = ["CONSTANTS", "Call", "Promise"]

CONSTANTS = (
    type(None), bool, int, float, complex, str, torch.dtype, torch.device,
)  # fmt: skip
"""What has the same value whenever it is looked at."""


@dataclasses.dataclass
class Promise:
    """What ``out=`` says of the output, for arguments of certain shapes.

    Attributes:
        spec: The containers; None for one tensor.
        metas: The tensors.
        kind: What the arguments are, without their shapes.
        is_verified: Values have been looked at.
        last: Of each output of the call before: where its memory began, how many bytes
            it had, and its storage while that is in use.
    """

    spec: trees.Spec | None
    metas: tuple[Meta, ...]
    kind: Any
    is_verified: bool
    last: Sequence[tuple[int, int, Callable[[], Any]]] = ()


class Call:
    """One call of a kernel.

    Attributes:
        kernel: The kernel.
        leaves: The arguments, flat, and ``spec``, their containers.
        given: What it is handed for the tensors among them.
        promise: What is expected of it.
        versions: Of what it is handed, before.
        values_are_kept: And its values.
    """

    __slots__ = (
        "copies",
        "given",
        "kernel",
        "leaves",
        "promise",
        "spec",
        "values_are_kept",
        "versions",
    )

    def __init__(
        self,
        kernel: Any,
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        given: Sequence[torch.Tensor],
        promise: Promise,
    ) -> None:
        self.kernel = kernel
        self.leaves = leaves
        self.spec = spec
        self.given = given
        self.promise = promise
        self.versions = [torch_compat.version_of(tensor) for tensor in given]
        self.values_are_kept = False

    def keep_values(self) -> None:
        """Copy the arguments; not while a CUDA graph is captured, which reads none."""
        is_cuda = any(tensor.is_cuda for tensor in self.given)
        if not (is_cuda and torch.cuda.is_current_stream_capturing()):
            self.copies = [tensor.clone() for tensor in self.given]
            self.values_are_kept = True

    def outputs(self, returned: Any) -> list[torch.Tensor]:
        """Return the output's leaves as tensors; raise where they are not promised."""
        kernel, promise = self.kernel, self.promise
        if promise.spec is None:
            flat = [returned]
        else:
            flat, spec = trees.flatten(returned)
            if spec != promise.spec:
                self.refuse_structure(returned)
        if kernel.numpy:
            if any(arrays.is_shared(value, self.given) for value in flat):
                self.refuse_shared()
            pairs = zip(flat, promise.metas, strict=True)
            flat = [arrays.tensor_of(value, meta) for value, meta in pairs]
        for value, (shape, dtype, device) in zip(flat, promise.metas, strict=True):
            if not (
                isinstance(value, torch.Tensor)
                and value.shape == shape
                and value.dtype is dtype
                and value.device == device
                and value.layout is torch.strided
            ):
                self.refuse_output(flat)
        self.verify_memory(flat)
        if any(value.requires_grad for value in flat):
            self.refuse_captured()
        for tensor, version in zip(self.given, self.versions, strict=True):
            if torch_compat.version_of(tensor) != version:
                self.refuse_edits()
        if torch_compat.function_modes():
            # What a foreign library makes is unknown to those who watch.
            flat = [value.detach() for value in flat]
        return flat

    def verify_memory(self, outs: Sequence[torch.Tensor]) -> None:
        """Raise where an output lies in the memory of an argument or another output."""
        spans = [(t.data_ptr(), t.nbytes) for t in self.given]
        for out in outs:
            low, size = span = _span(out)
            for begin, length in spans:
                if begin < low + size and low < begin + length:
                    self.refuse_shared()
            for begin, length, held in self.promise.last:
                if begin < low + size and low < begin + length and _is_in_use(held):
                    self.refuse_reused()
            spans.append(span)
        self.promise.last = [
            (*span, weakref.ref(out.untyped_storage()))
            for out, span in zip(outs, spans[len(self.given) :], strict=True)
        ]

    def verify_values(self, flat: Sequence[torch.Tensor]) -> None:
        """Raise for edits that torch does not know of, and for NaN out of nowhere."""
        if not all(map(_same, self.given, self.copies)):
            self.refuse_edits()
        if self.kernel.allow_nan or is_checking():
            return
        bad = [x for x in flat if is_differentiable(x) and bool(torch.isnan(x).any())]
        if bad and all(bool(torch.isfinite(tensor).all()) for tensor in self.given):
            count = sum(int(torch.isnan(out).sum()) for out in bad)
            raise ForwardContractError(
                f"{self.kernel.name}: the kernel returned NaN for finite arguments, in "
                f"{count} of {sum(out.numel() for out in bad)} numbers",
                rule=self.kernel.where,
                fix="Correct the kernel (memory that it did not write?), or say "
                "allow_nan=True if that is what it means.",
            )

    # What is wrong.

    def refuse_structure(self, returned: Any) -> NoReturn:
        """Raise for other containers than those of out=."""
        spec = self.promise.spec
        assert spec is not None
        promised = trees.unflatten(self.promise.metas, spec)
        self.refuse_unlike(
            [Violation("return", describe(promised), describe(returned))]
        )

    def refuse_output(self, flat: Sequence[Any]) -> NoReturn:
        """Raise for outputs of another shape, dtype or device."""
        names, spec = ["return"], self.promise.spec
        if spec is not None:
            names = trees.paths(trees.unflatten(flat, spec), "return")
        self.refuse_unlike(
            [
                Violation(name, str(meta), describe(value))
                for name, meta, value in zip(
                    names, self.promise.metas, flat, strict=True
                )
                if str(meta) != describe(value)
            ]
        )

    def refuse_unlike(self, violations: Sequence[Violation]) -> NoReturn:
        """Raise for what is not as out= says."""
        raise ForwardContractError(
            f"{self.kernel.name}: the kernel returned something else than out= says",
            rule=self.kernel.where,
            function=f"out= ({place(self.kernel.out)})",
            violations=violations,
            fix="Correct the kernel, or what out= returns.",
        )

    def refuse_captured(self) -> NoReturn:
        """Raise where an output has a gradient: its arguments have none."""
        raise CapturedTensorError(
            f"{self.kernel.name}: the kernel uses a tensor that needs a gradient "
            "without getting it as an argument, so its gradient would be lost",
            rule=self.kernel.where,
            fix="Pass it as an argument, or capture tensor.detach() if it is a "
            "constant.",
        )

    def refuse_shared(self) -> NoReturn:
        """Raise for an output that is not memory of its own."""
        raise ForwardContractError(
            f"{self.kernel.name}: the kernel returned memory of an argument, or the "
            "same memory twice; a later edit of one would change the other",
            rule=self.kernel.where,
            fix="Return a copy (.clone(), .copy()), or write into a new tensor.",
        )

    def refuse_reused(self) -> NoReturn:
        """Raise for an output that takes the place of an earlier one."""
        raise ForwardContractError(
            f"{self.kernel.name}: the kernel returned memory that it has returned "
            "before, and the earlier output is still in use: it has other values now",
            rule=self.kernel.where,
            fix="Return a copy (.clone(), .copy()), or make a new tensor on each call.",
        )

    def refuse_edits(self) -> NoReturn:
        """Put edited arguments back as they were, where copies exist, and raise."""
        kernel, paths = self.kernel, self.kernel.paths(self.leaves, self.spec)
        pairs = zip(paths, self.leaves, strict=True)
        names = [path for path, leaf in pairs if isinstance(leaf, torch.Tensor)]
        edited = []
        for number, (tensor, version) in enumerate(
            zip(self.given, self.versions, strict=True)
        ):
            old = self.copies[number] if self.values_are_kept else None
            is_new = torch_compat.version_of(tensor) != version
            if is_new or (old is not None and not _same(tensor, old)):
                edited.append(names[number])
                if old is not None:
                    torch_compat.put_back(tensor, old, version)
        kept = self.values_are_kept
        after = "their values were put back" if kept else "their old values are gone"
        raise ForwardContractError(
            f"{kernel.name}: the kernel edits its arguments in place ({after})",
            rule=kernel.where,
            violations=[
                Violation(path, "as it was handed over", "other values after the call")
                for path in edited
            ],
            fix="Write into a new tensor, or copy the argument first (.clone()).",
        )


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return where in memory a tensor begins, and how many bytes that is."""
    if tensor.is_contiguous():
        return tensor.data_ptr(), tensor.nbytes
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _is_in_use(held: Callable[[], Any]) -> bool:
    """Whether a storage is, and holds memory: resize_(0) gives it back."""
    storage = held()
    return storage is not None and storage.nbytes() > 0


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN being equal to itself."""
    if first.dtype is torch.complex32:  # which torch.equal does not know
        first, second = torch.view_as_real(first), torch.view_as_real(second)
    if torch.equal(first, second):
        return True
    both_nan = torch.isnan(first) & torch.isnan(second)
    return bool(((first == second) | both_nan).all())
