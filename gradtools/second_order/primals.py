"""What a function is differentiated in: the tensors among its arguments, laid flat."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gradtools import trees
from gradtools.errors import DefinitionError, Violation
from gradtools.lowering.boundary import is_tracing
from gradtools.rules.signature import Meta, is_differentiable

__all__ = ["Argnums", "Flat", "Primals", "Tensors", "as_tuple", "name_of"]

Tensors = Sequence[torch.Tensor]
Argnums = int | tuple[int, ...] | None


def name_of(function: Any) -> str:
    """Return what a function is called in messages."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


def as_tuple(args: Any, who: str, word: str = "primals") -> tuple[Any, ...]:
    """Return the arguments of a function, or say that they must be a tuple."""
    if isinstance(args, (tuple, list)):
        return tuple(args)
    raise DefinitionError(
        f"{who}: {word} must be a tuple with one entry per argument of the function, "
        f"not {_described(args)}",
        fix=f"Put it in a tuple: ({word.removesuffix('s')},).",
    )


class Primals:
    """The arguments of a call, and which of their tensors are differentiated.

    The floating and complex tensors in the chosen arguments are: their *leaves*.
    Everything else takes part as it is, and has ``None`` in every derivative.

    Args:
        args: The arguments of the function.
        argnums: Which of them count: all as a tuple (None), one by itself (an int), or
            a tuple of some.
        who: Who asks, for messages.
    """

    def __init__(self, args: Sequence[Any], argnums: Argnums, who: str) -> None:
        self.who = who
        self.args = tuple(args)
        self.argnums = self._checked(argnums)
        if self.argnums is None:
            chosen: Any = self.args
        elif isinstance(self.argnums, int):
            chosen = self.args[self.argnums]
        else:
            chosen = tuple(self.args[number] for number in self.argnums)
        # A trace does not go through what is remembered.
        self.flatten = trees.flatten if is_tracing() else trees.flatten_plain
        self.every, self.spec = self.flatten(chosen)
        self.places = [i for i, x in enumerate(self.every) if is_differentiable(x)]
        self.leaves: list[torch.Tensor] = [self.every[i] for i in self.places]
        self._are_all = len(self.places) == len(self.every)
        if not self.leaves:
            raise DefinitionError(
                f"{who}: there is no floating or complex tensor to differentiate in "
                f"among {', '.join(map(_described, self.every)) or 'no arguments'}",
                fix="Give numbers as tensors: torch.tensor(2.0).",
            )

    def _checked(self, argnums: Argnums) -> Argnums:
        count = len(self.args)
        numbers = argnums if isinstance(argnums, (tuple, list)) else (argnums,)
        for number in () if argnums is None else numbers:
            if not isinstance(number, int) or not -count <= number < count:
                raise DefinitionError(
                    f"{self.who}: argnums names argument {number!r}, and there are "
                    f"{count}",
                    fix=f"Use numbers from 0 to {count - 1}.",
                )
        if isinstance(argnums, int):
            return argnums % count
        if argnums is None:
            return None
        chosen = tuple(number % count for number in argnums)
        if len(set(chosen)) < len(chosen):
            raise DefinitionError(
                f"{self.who}: argnums names an argument twice: {argnums!r}",
                fix="Name each once: its derivative would be given to one of the two.",
            )
        return chosen

    def with_leaves(self, leaves: Tensors) -> tuple[Any, ...]:
        """Return the arguments with other tensors in the place of the leaves."""
        chosen = self._filled(leaves, self.every)
        if self.argnums is None:
            return chosen
        args = list(self.args)
        pairs = (
            [(self.argnums, chosen)]
            if isinstance(self.argnums, int)
            else zip(self.argnums, chosen, strict=True)
        )
        for number, value in pairs:
            args[number] = value
        return tuple(args)

    def tree(self, values: Sequence[Any]) -> Any:
        """Return values, one per leaf, in the structure of the chosen arguments."""
        return self._filled(values, [None] * len(self.every))

    def _filled(self, values: Sequence[Any], rest: Sequence[Any]) -> Any:
        if not self._are_all:
            every = list(rest)
            for place, value in zip(self.places, values, strict=True):
                every[place] = value
            values = every
        return trees.unflatten_plain(values, self.spec)

    def paths(self) -> list[str]:
        """Return the key path of every leaf, differentiated or not."""
        return trees.paths(trees.unflatten(range(len(self.every)), self.spec))

    def tangents(self, given: Any, word: str = "tangents") -> list[torch.Tensor]:
        """Return one tensor per leaf from a tree like the chosen arguments.

        None in the place of a leaf stands for zeros.

        Raises:
            DefinitionError: The structure, a shape, a dtype or a device is another.
        """
        return self._fitted(given, word, ())

    def block(
        self, given: Any, word: str = "vectors"
    ) -> tuple[list[torch.Tensor], int]:
        """Return the same for tangents with a leading dimension, and its length."""
        sizes = {
            len(leaf)
            for leaf in trees.flatten(given)[0]
            if isinstance(leaf, torch.Tensor) and leaf.dim()
        }
        if len(sizes) != 1:
            raise DefinitionError(
                f"{self.who}: a block of vectors has one leading dimension, the same "
                f"for all of its tensors; theirs are {sorted(sizes)}",
                fix="Stack the vectors: torch.stack([v1, v2]) for each tensor.",
            )
        (count,) = sizes
        return self._fitted(given, word, (count,)), count

    def _fitted(
        self, given: Any, word: str, leading: tuple[int, ...]
    ) -> list[torch.Tensor]:
        if isinstance(given, list) and not isinstance(self.argnums, int):
            given = tuple(given)  # like the primals, see as_tuple
        try:
            values = trees.flatten_like(given, self.spec)
        except ValueError as error:
            raise DefinitionError(
                f"{self.who}: the {word} have another structure than the primals",
                violations=[
                    Violation(word, _sketch(self.every, self.spec), _sketched(given))
                ],
                fix="Give one tensor, or None for zeros, for each tensor of the "
                "primals.",
            ) from error
        violations = []
        fitted = []
        for place, primal in zip(self.places, self.leaves, strict=True):
            value = values[place]
            shape = (*leading, *primal.shape) if leading else primal.shape
            if value is None:
                fitted.append(primal.new_zeros(shape))
            elif (
                isinstance(value, torch.Tensor)
                and value.shape == shape
                and value.dtype is primal.dtype
                and value.device == primal.device
            ):
                fitted.append(value)
            else:
                meta = Meta.of(primal)._replace(shape=torch.Size(shape))
                where = word + self.paths()[place]
                violations.append(Violation(where, str(meta), _described(value)))
        if violations:
            raise DefinitionError(
                f"{self.who}: the {word} do not fit the primals",
                violations=violations,
                fix="Each must have the shape, dtype and device of its primal.",
            )
        return fitted

    def flat(self, f: Callable[..., Any], *, has_aux: bool = False) -> Flat:
        """Return the function as one of the leaves alone."""
        return Flat(f, self, has_aux=has_aux)


class Flat:
    """A function of the leaves of its arguments, which gives back flat tensors.

    Each call returns ``(outputs, aux)``, tuples of tensors: those among the outputs
    that can have a derivative, and all of aux. What else there is stays here until the
    trees are put together again.
    """

    def __init__(self, f: Callable[..., Any], primals: Primals, has_aux: bool) -> None:
        self.f, self.primals, self.has_aux = f, primals, has_aux

    def __call__(self, *leaves: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Call the function."""
        out = self.f(*self.primals.with_leaves(leaves))
        aux = None
        if self.has_aux:
            if not (isinstance(out, tuple) and len(out) == 2):
                raise DefinitionError(
                    f"{self.primals.who}: with has_aux=True {name_of(self.f)} must "
                    f"return a pair (output, aux), not {_described(out)}",
                    fix="Return (output, aux), or leave has_aux out.",
                )
            out, aux = out
        tensors, self.aux = (
            trees.Structure.split(aux) if self.has_aux else ((), _NO_AUX)
        )
        every, self.spec = self.primals.flatten(out)
        self.able = [is_differentiable(x) for x in every]
        # Not all of them: the graph behind the others would live as long as this.
        self.constants = [
            None if able else x for x, able in zip(every, self.able, strict=True)
        ]
        outputs = (x for x, able in zip(every, self.able, strict=True) if able)
        return tuple(outputs), tuple(tensors)

    def scalar_as_tuple(self, *leaves: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Return the same with the scalar as the only one of the outputs."""
        value, aux = self.scalar(*leaves)
        return (value,), aux

    def scalar(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, Tensors]:
        """Call the function, and refuse what is no real scalar."""
        outputs, aux = self(*leaves)
        if len(self.able) == 1 and len(outputs) == 1:
            (value,) = outputs
            if value.dim() == 0 and not value.dtype.is_complex:
                return value, aux
        got = iter(outputs)
        every = (
            next(got) if able else constant
            for able, constant in zip(self.able, self.constants, strict=True)
        )
        raise DefinitionError(
            f"{self.primals.who}: {name_of(self.f)} must return one real scalar, not "
            + (", ".join(map(_described, every)) or "nothing"),
            fix="Sum or average it; gt.vjp, gt.jvp and gt.jacrev take any output.",
        )

    def output(self, values: Sequence[Any], *, constants: bool = True) -> Any:
        """Return values, one per output, in the structure of what f returned."""
        rest = iter(values)
        return trees.unflatten(
            [
                next(rest) if able else (constant if constants else None)
                for able, constant in zip(self.able, self.constants, strict=True)
            ],
            self.spec,
        )

    def with_aux(self, result: Any, aux: Tensors) -> Any:
        """Return a result, and aux where the function has one."""
        return (result, self.aux.rebuild(aux)) if self.has_aux else result


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(Meta.of(value))
    return f"a value of type {type(value).__name__}"


def _sketch(leaves: Sequence[Any], spec: trees.Spec) -> str:
    marks = [_Mark("*" if is_differentiable(leaf) else "None") for leaf in leaves]
    return repr(trees.unflatten(marks, spec))


def _sketched(tree: Any) -> str:
    return _sketch(*trees.flatten(tree))


_NO_AUX = trees.Structure.split(None)[1]


class _Mark:
    """Stands for a leaf in the sketch of a structure."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text
