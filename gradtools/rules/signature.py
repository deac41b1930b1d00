"""Binding: which value goes to which parameter, and what may have a gradient.

:class:`Parameters` is read once from a function; :class:`CallSignature` describes one
call: its values laid flat, which of them are differentiable and which need a gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from gradtools import trees
from gradtools.errors import DefinitionError
from gradtools.spelling import suggestion, unexpected

__all__ = ["CallSignature", "Meta", "Parameters", "describe"]

_KIND = inspect.Parameter


class Parameters:
    """The parameters of a function.

    The values of a call are kept as *entries*: one per parameter in the order of the
    signature, defaults applied, each value of ``*args`` an entry of its own and
    ``**kwargs`` one entry, a dict.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        nondiff_argnums: int | Sequence[int] = (),
        nondiff_argnames: str | Sequence[str] = (),
    ) -> None:
        self.function = function
        try:
            self.signature = inspect.signature(function)
        except (TypeError, ValueError):  # builtins: positional arguments only
            self.signature = inspect.Signature([_KIND("args", _KIND.VAR_POSITIONAL)])
        by_kind: dict[Any, list[str]] = {}
        for parameter in self.signature.parameters.values():
            by_kind.setdefault(parameter.kind, []).append(parameter.name)
        self.positional = (
            *by_kind.get(_KIND.POSITIONAL_ONLY, ()),
            *by_kind.get(_KIND.POSITIONAL_OR_KEYWORD, ()),
        )
        self.positional_only = frozenset(by_kind.get(_KIND.POSITIONAL_ONLY, ()))
        self.var_positional = next(iter(by_kind.get(_KIND.VAR_POSITIONAL, ())), None)
        self.keyword_only = tuple(by_kind.get(_KIND.KEYWORD_ONLY, ()))
        self.var_keyword = next(iter(by_kind.get(_KIND.VAR_KEYWORD, ())), None)
        self.defaults = {
            parameter.name: parameter.default
            for parameter in self.signature.parameters.values()
            if parameter.default is not parameter.empty
        }
        self.simple = not (self.var_positional or self.keyword_only or self.var_keyword)
        self.nondiff = self._nondiff(nondiff_argnums, nondiff_argnames)

    def _nondiff(
        self, argnums: int | Sequence[int], argnames: str | Sequence[str]
    ) -> tuple[int, ...]:
        numbers = [argnums] if isinstance(argnums, int) else list(argnums)
        names = [argnames] if isinstance(argnames, str) else list(argnames)
        count = len(self.positional)
        for number in numbers:
            if not isinstance(number, int) or not -count <= number < count:
                raise DefinitionError(
                    f"nondiff_argnums names argument {number!r}, which the function "
                    f"does not have: its positional parameters are {self.positional}",
                    fix=f"Use numbers from 0 to {count - 1}, or nondiff_argnames.",
                )
        for name in names:
            if name not in self.positional:
                raise DefinitionError(
                    f"nondiff_argnames names {name!r}, which is none of the "
                    f"function's positional parameters {self.positional}",
                    fix=f"{suggestion(name, self.positional)} Keyword-only values that "
                    "are no floating tensors take part without a gradient as they are.",
                )
        chosen = {number % count for number in numbers}
        chosen |= {self.positional.index(name) for name in names}
        return tuple(sorted(chosen))

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return the entries of a call, or raise the TypeError that Python would."""
        if not kwargs and self.simple and len(args) == len(self.positional):
            return args
        count = len(self.positional)
        entries = list(args[:count])
        given = dict(kwargs)
        for name in self.positional[len(entries) :]:
            if name in given and name not in self.positional_only:
                entries.append(given.pop(name))
            elif name in self.defaults:
                entries.append(self.defaults[name])
            else:
                self._refuse(args, kwargs)
        if len(args) > count:
            if self.var_positional is None:
                self._refuse(args, kwargs)
            entries += args[count:]
        for name in self.keyword_only:
            if name not in given and name not in self.defaults:
                self._refuse(args, kwargs)
            entries.append(given.pop(name) if name in given else self.defaults[name])
        if self.var_keyword is not None:
            if any(
                name in given
                for name in self.positional
                if name not in self.positional_only
            ):
                self._refuse(args, kwargs)
            entries.append(given)
        elif given:
            self._refuse(args, kwargs)
        return tuple(entries)

    def _refuse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = getattr(self.function, "__name__", "function")
        if self.var_keyword is None:  # a misspelled name first: it explains the rest
            by_name = (*self.positional, *self.keyword_only)
            known = [each for each in by_name if each not in self.positional_only]
            for given in kwargs.keys() - self.positional_only:
                if given not in known:
                    raise unexpected(name, given, known)
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{name}() {error}") from None

    def names(self, count: int) -> list[str]:
        """Return the names of ``count`` entries, ``args[0]`` and on for ``*args``."""
        rest = len(self.keyword_only) + (self.var_keyword is not None)
        extra = count - len(self.positional) - rest
        return [
            *self.positional,
            *(f"{self.var_positional}[{index}]" for index in range(extra)),
            *self.keyword_only,
            *([self.var_keyword] if self.var_keyword else []),
        ]

    def call(
        self, function: Callable[..., Any], entries: Sequence[Any], **extra: Any
    ) -> Any:
        """Call ``function``, whose parameters are these, with the entries of a call."""
        if self.simple:
            return function(*entries, **extra)
        named = len(self.keyword_only)
        end = len(entries) - named - (self.var_keyword is not None)
        keywords = dict(zip(self.keyword_only, entries[end : end + named], strict=True))
        if self.var_keyword is not None:
            keywords |= entries[-1]
        return function(*entries[:end], **keywords, **extra)


class Meta(NamedTuple):
    """What a cotangent shares with its argument."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Meta:
        """Read it off a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"a tensor of shape {tuple(self.shape)}, {dtype}, {self.device}"


def is_differentiable(leaf: Any) -> bool:
    """Whether a value can have a gradient: floating and complex tensors can."""
    return isinstance(leaf, torch.Tensor) and (
        leaf.dtype.is_floating_point or leaf.dtype.is_complex
    )


class CallSignature:
    """One call's values laid flat.

    Attributes:
        count: Number of entries.
        metas: Per leaf: shape, dtype and device where it is differentiable, else None.
        needs: Per leaf: whether its gradient is wanted.
    """

    __slots__ = (
        "count",
        "has_sizes",
        "leaf_counts",
        "metas",
        "needs",
        "parameters",
        "spec",
    )

    def __init__(
        self,
        parameters: Parameters,
        entries: Sequence[Any],
        leaves: Sequence[Any],
        spec: trees.Spec | None,
        needs: tuple[bool, ...],
    ) -> None:
        self.parameters = parameters
        self.count = len(entries)
        self.spec = spec  # None: every entry is a leaf
        self.has_sizes = spec is not None and trees.has_sizes(spec)
        self.leaf_counts = (
            None
            if spec is None
            else [len(trees.flatten(entry)[0]) for entry in entries]
        )
        self.metas = tuple(
            Meta.of(leaf) if is_differentiable(leaf) else None for leaf in leaves
        )
        self.needs = needs

    @property
    def names(self) -> list[str]:
        """The names of the entries."""
        return self.parameters.names(self.count)

    def entries(self, leaves: Sequence[Any]) -> Sequence[Any]:
        """Return the values of a call in their containers."""
        if self.spec is None:
            return leaves
        values = trees.unflatten(leaves, self.spec)
        return trees.with_sizes(values, self.spec) if self.has_sizes else values

    def needs_tree(self, needs: Iterable[bool]) -> tuple[Any, ...]:
        """Return ``needs`` in the shape of the arguments."""
        return tuple(self.entries(tuple(needs)))

    def paths(self) -> list[str]:
        """Return one key path per leaf, such as ``args.params['w']``."""
        if self.spec is None:
            return [f"args.{name}" for name in self.names]
        skeleton = self.entries(range(sum(self.leaf_counts or ())))
        return [
            path
            for name, entry in zip(self.names, skeleton, strict=True)
            for path in trees.paths(entry, f"args.{name}")
        ]


def describe(paths: Sequence[str], leaves: Sequence[Any]) -> str:
    """Describe the values of a call in one line: shapes, dtypes, constants."""
    parts = []
    for path, leaf in zip(paths, leaves, strict=True):
        name = path.removeprefix("args.")
        if isinstance(leaf, torch.Tensor):
            dtype = str(leaf.dtype).removeprefix("torch.")
            parts.append(f"{name}: {tuple(leaf.shape)} {dtype}")
        elif isinstance(leaf, (bool, int, str)):
            parts.append(f"{name}: {leaf!r}")
        elif leaf is not None:
            parts.append(f"{name}: {type(leaf).__name__}")
    return ", ".join(parts)


_LEAVES = {torch.Tensor, type(None), bool, int, float, str}  # to ask takes a while


def flatten_entries(
    entries: tuple[Any, ...],
) -> tuple[Sequence[Any], trees.Spec | None]:
    """Lay the values of a call flat; the structure is None if they are flat already."""
    for entry in entries:
        if not (type(entry) in _LEAVES or trees.is_leaf(entry)):
            return trees.flatten(entries)
    return entries, None
