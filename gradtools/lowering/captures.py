"""What a rule's functions use without getting it as an argument.

A tensor that needs a gradient and reaches a rule through a closure, a global, a default
or ``self`` would get none, silently: :class:`Watch` finds it while the function runs.
:func:`free_variables` reads the same names from a function without running it; it gives
the finding its name, and torch.compile the scalars to guard on.
"""

from __future__ import annotations

import dis
import functools
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from gradtools import torch_compat, trees
from gradtools.errors import CapturedTensorError, Violation
from gradtools.rules.rule import Rule

__all__ = [
    "PLAIN",
    "Watch",
    "captured",
    "follow",
    "free_variables",
    "hidden_numbers",
    "hidden_tensors",
    "is_without_gradient",
    "name_of",
    "names_used",
    "needs_gradient",
    "refuse_hidden_parameters",
    "tensors_used",
]


class Watch(TorchFunctionMode):
    """Raise when a tensor that needs a gradient was not handed to the function.

    Args:
        rule: The rule, for the message.
        role: Which of its functions runs.
        arguments: The values that the function was given.
    """

    def __init__(self, rule: Rule, role: str, arguments: Iterable[Any]) -> None:
        super().__init__()
        self.rule = rule
        self.role = role
        self.function = getattr(rule, role)
        self.level = torch_compat.innermost_level()
        self.found: CapturedTensorError | None = None
        self.known: dict[int, weakref.ref[torch.Tensor]] = {}
        values = list(arguments)
        self.arguments = [value for value in values if isinstance(value, torch.Tensor)]
        self.objects = [value for value in values if not isinstance(value, PLAIN)]
        for tensor in self.arguments:
            self.remember(tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        is_property = getattr(func, "__name__", "") == "__get__"
        if not (is_property or is_without_gradient(func)):
            self.refuse(_tensors_in((args, kwargs)))
        result = func(*args, **kwargs)
        produced = list(_tensors_in(result))
        if is_property and produced:
            self.refuse(_tensors_in(args))
        for tensor in produced:
            self.remember(tensor)
        return result

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Raise again what was found: torch's ``**`` makes another error of it."""
        super().__exit__(kind, error, traceback)
        if self.found is not None and error is not self.found:
            raise self.found from None

    def refuse(self, tensors: Iterable[torch.Tensor], place: str = "") -> None:
        """Raise for a tensor that is owed a gradient and did not come as an argument.

        Args:
            tensors: What the function uses, or returned.
            place: Where it stands in what the function returned.
        """
        for tensor in tensors:
            if needs_gradient(tensor) and not self.is_known(tensor):
                within = (tensor, *torch_compat.unwrapped_to(self.level, tensor))
                places = (place_of(t, self.function, self.objects) for t in within)
                where = next(filter(None, places), unnamed(tensor))
                self.found = captured(self.rule, self.role, place + where)
                raise self.found

    def remember(self, tensor: torch.Tensor) -> None:
        """Take a tensor for known: an argument, or made from arguments."""
        for made in (tensor, *torch_compat.unwrapped_to(self.level, tensor)):
            key = id(made)
            self.known[key] = weakref.ref(made, functools.partial(self.forget, key))

    def forget(self, key: int, _: Any) -> None:
        """Let a tensor go that is no more; its number may be given to another one."""
        self.known.pop(key, None)

    def is_known(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is an argument, or was made inside."""
        reference = self.known.get(id(tensor))
        if reference is not None and reference() is tensor:
            return True
        # A transform that is opened inside wraps what it is given. Its number may be
        # that of one outside, which is set aside while the function runs.
        inside = next(torch_compat.unwrapped_to(self.level, tensor), None)
        return (
            inside is not None
            and (self.is_known(inside) or not needs_gradient(inside))
            and torch_compat.is_at_open_level(tensor)
            and place_of(tensor, self.function, self.objects) is None
        )


def is_without_gradient(function: Any) -> bool:
    """Whether a torch function may be asked of a captured tensor.

    Its metadata (a property that gives no tensor is metadata too), something else of
    its shape, and its value where that is asked outright.
    """
    return getattr(function, "__name__", "") in _WITHOUT_GRADIENT


_WITHOUT_GRADIENT = frozenset(
    {
        "__format__", "__hash__", "__len__", "__repr__", "detach", "dim",
        "element_size", "empty_like", "full_like", "get_device", "is_complex",
        "is_contiguous", "is_floating_point", "ndimension", "nelement",
        "new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "numel",
        "ones_like", "rand_like", "randn_like", "size", "stride", "zeros_like",
    }
)  # fmt: skip


def captured(rule: Rule, role: str, where: str) -> CapturedTensorError:
    """Return the error for a tensor that came past the arguments."""
    return CapturedTensorError(
        f"{rule.name}: {role} uses a tensor that needs a gradient without getting it "
        "as an argument, so its gradient would be lost",
        rule=rule.where,
        function=rule.which(role),
        violations=[
            Violation(where, "an argument of the rule", "a captured tensor"),
        ],
        fix="Pass it as an argument (gradtools.closure_convert finds all of them), or "
        "capture tensor.detach() if it is a constant.",
    )


def needs_gradient(tensor: torch.Tensor) -> bool:
    """Whether a captured tensor would be owed a gradient."""
    return (
        tensor.requires_grad
        or torch_compat.is_wrapped(tensor)
        or (torch_compat.forward_ad_active() and torch_compat.has_tangent(tensor))
    )


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)


# Free variables. A path leads from a function to one of them, by steps that
# torch.compile can follow as well: ("cell", 0), ("global", "K"), ("attribute",
# "__self__"), ("item", 1).

Path = tuple[tuple[str, Any], ...]


def follow(value: Any, path: Path) -> Any:
    """Return what a path leads to; None for a closure variable not assigned yet."""
    for kind, key in path:
        if kind == "cell":
            value = value.__closure__[key].cell_contents
        elif kind == "global":
            value = value.__globals__[key]
        elif kind == "item":
            value = value[key]
        else:
            value = getattr(value, key)
    return value


def free_variables(function: Any) -> dict[str, Path]:
    """Return what a function uses beside its arguments: a label and a path for each.

    Closure cells, globals that its code names, defaults, what a partial holds, the
    object of a bound method; for Python functions among them, theirs as well.
    """
    found: dict[str, Path] = {}
    _collect(function, (), found, set())
    return found


def names_used(function: Any) -> frozenset[str]:
    """Return every attribute name in the code of a function and of those it calls."""
    names: set[str] = set()
    seen: set[int] = set()
    _collect(function, (), {}, seen, names)
    return frozenset(names)


def _collect(
    function: Any,
    path: Path,
    found: dict[str, Path],
    seen: set[int],
    names: set[str] | None = None,
) -> None:
    if id(function) in seen or _is_library(function):
        return
    seen.add(id(function))

    def take(label: str, *steps: tuple[str, Any]) -> None:
        value = follow(function, steps)
        if isinstance(value, _CALLABLE):
            _collect(value, (*path, *steps), found, seen, names)
        elif not _is_library(value):
            found.setdefault(label, (*path, *steps))

    if isinstance(function, functools.partial):
        take("function of the partial", ("attribute", "func"))
        for index in range(len(function.args)):
            take(f"partial argument {index}", ("attribute", "args"), ("item", index))
        for name in function.keywords:
            take(
                f"partial argument {name!r}", ("attribute", "keywords"), ("item", name)
            )
    elif isinstance(function, types.MethodType):
        take("method", ("attribute", "__func__"))
        found.setdefault("self", (*path, ("attribute", "__self__")))
    elif isinstance(function, types.FunctionType):
        code, of = function.__code__, f" of {function.__name__}"
        if names is not None:
            names |= _names_in(code)
        for index, name in enumerate(code.co_freevars):
            if _is_assigned((function.__closure__ or ())[index]):
                take(f"closure variable {name!r}{of}", ("cell", index))
        for name in _globals_in(code) & function.__globals__.keys():
            take(f"global {name!r}", ("global", name))
        defaults = function.__defaults__ or ()
        for index in range(len(defaults)):
            parameter = code.co_varnames[code.co_argcount - len(defaults) + index]
            take(
                f"default of parameter {parameter!r}{of}",
                ("attribute", "__defaults__"),
                ("item", index),
            )
        for name in function.__kwdefaults__ or {}:
            take(
                f"default of parameter {name!r}{of}",
                ("attribute", "__kwdefaults__"),
                ("item", name),
            )


_CALLABLE = (types.FunctionType, types.MethodType, functools.partial)
_LIBRARIES = frozenset({"torch", "numpy", "math", "gradtools", "builtins", "functools"})


def _is_library(value: Any) -> bool:
    if isinstance(value, types.ModuleType):
        name = value.__name__
    elif isinstance(value, (type, types.BuiltinFunctionType, types.FunctionType)):
        name = getattr(value, "__module__", None) or ""
    else:
        return False  # a partial or a bound method may hold what is the user's
    return name.split(".")[0] in _LIBRARIES or isinstance(value, type)


def _is_assigned(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@functools.lru_cache(maxsize=1024)
def _globals_in(code: types.CodeType) -> frozenset[str]:
    return frozenset(
        instruction.argval
        for inner in _codes(code)
        for instruction in dis.get_instructions(inner)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    )


def _names_in(code: types.CodeType) -> frozenset[str]:
    return frozenset(name for inner in _codes(code) for name in inner.co_names)


def place_of(
    tensor: torch.Tensor, function: Any, objects: Iterable[Any] = ()
) -> str | None:
    """Say through which name, or which argument, a tensor reached a function."""
    places = [
        (label, follow(function, steps))
        for label, steps in free_variables(function).items()
    ]
    places += [(f"an argument of type {type(o).__name__}: ", o) for o in objects]
    for label, value in places:
        for path, found in _reachable(value, "", 3, set()):
            if found is tensor:
                return label + path
    return None


def name_of(tensor: torch.Tensor, function: Any, objects: Iterable[Any] = ()) -> str:
    """Say where a function has a tensor from, or else what it looks like."""
    return place_of(tensor, function, objects) or unnamed(tensor)


def unnamed(tensor: torch.Tensor) -> str:
    """Describe a tensor that no name leads to."""
    return f"a tensor of shape {tuple(tensor.shape)} that is no argument"


def _reachable(
    value: Any, path: str, depth: int, seen: set[int], kinds: Any = torch.Tensor
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors that an object holds, each with the path to it."""
    if isinstance(value, kinds):
        yield path, value
        return
    if depth == 0 or id(value) in seen or isinstance(value, _WITHOUT_TENSORS):
        return
    seen.add(id(value))
    for key, child in _parts(value):
        yield from _reachable(child, path + key, depth - 1, seen, kinds)


_WITHOUT_TENSORS = (
    type(None), bool, int, float, complex, str, bytes, type, types.ModuleType,
    torch.dtype, torch.device, torch.Size,
)  # fmt: skip
PLAIN = (torch.Tensor, *_WITHOUT_TENSORS)


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, torch.nn.Module):
        return _parts_of_module(value)
    if isinstance(value, _CALLABLE):
        return _parts_of_callable(value)
    if isinstance(value, types.BuiltinFunctionType):  # tensor.mul, say
        return [(".__self__", value.__self__)]
    if isinstance(value, (set, frozenset)):
        return [("{...}", child) for child in value]
    below = trees.children(value)
    return _attributes(value) if below is None else below


def _parts_of_module(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    tensors = (*module.named_parameters(), *module.named_buffers())
    yield from ((f".{name}", tensor) for name, tensor in tensors)
    for prefix, inner in module.named_modules():
        for name, own in vars(inner).items():
            if not name.startswith("_"):
                yield f".{prefix}.{name}".replace("..", "."), own


def _parts_of_callable(function: Any) -> Iterator[tuple[str, Any]]:
    for label, steps in free_variables(function).items():
        yield f" {label}", follow(function, steps)
    if _is_library(function):  # a pullback of torch.func's, say
        for cell in getattr(function, "__closure__", None) or ():
            if _is_assigned(cell):
                yield " closure", cell.cell_contents


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from (
        (f".{name}", child) for name, child in getattr(value, "__dict__", {}).items()
    )
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)


def hidden_tensors(value: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the floating tensors that an object holds inside, each with its path."""
    return [
        (path, tensor)
        for path, tensor in _reachable(value, "", 4, set())
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex
    ]


def tensors_used(
    value: Any, names: frozenset[str], depth: int = 4, *, is_self: bool = False
) -> Iterator[torch.Tensor]:
    """Yield the tensors that code reaches from a value by these attribute names.

    This is for every call: it goes to few places and runs no code of the user's. All
    parameters of a module count, as it may be called, but not those of ``self``.
    """
    if isinstance(value, torch.Tensor):
        yield value
        return
    if depth == 0 or isinstance(value, _WITHOUT_TENSORS):
        return
    if isinstance(value, torch.nn.Module):
        parts = _named_parts(value, names)
        parts += [] if is_self else value.parameters()
    elif isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (tuple, list, set, frozenset)):
        parts = list(value)
    elif isinstance(value, (*_CALLABLE, types.BuiltinFunctionType)):
        parts = [child for _, child in _parts(value)]
    else:
        parts = _named_parts(value, names)
    for part in parts:
        yield from tensors_used(part, names, depth - 1)


def _named_parts(value: Any, names: frozenset[str]) -> list[Any]:
    """Return the attributes of an object that have these names, properties aside."""
    own = getattr(value, "__dict__", {})
    places = [
        own,
        *(own.get(f"_{k}", {}) for k in ("parameters", "buffers", "modules")),
    ]
    found = [place[name] for place in places for name in names & place.keys()]
    slots = (name for name in names if _is_slot(getattr(type(value), name, None)))
    return found + [getattr(value, name, None) for name in slots]


def _is_slot(descriptor: Any) -> bool:
    return isinstance(descriptor, types.MemberDescriptorType)


def hidden_numbers(value: Any) -> list[Any]:
    """Return the numbers and arrays, no tensors, that an object is or holds inside."""
    return [number for _, number in _reachable(value, "", 4, set(), _NUMBERS)]


_NUMBERS = (float, complex, np.ndarray, np.generic)


def may_hide_parameters(leaf: Any) -> bool:
    """Whether an argument is a module or another callable with a state of its own."""
    return callable(leaf) and not isinstance(leaf, (torch.Tensor, type))


def refuse_hidden_parameters(
    rule: Rule, paths: list[str], leaves: Iterable[Any]
) -> None:
    """Raise for a module or callable argument with parameters that need a gradient."""
    violations = []
    for index, leaf in enumerate(leaves):
        if not may_hide_parameters(leaf) or (index == 0 and rule.is_method):
            continue  # what self holds and the rule uses, Watch finds
        hidden = [
            path for path, tensor in hidden_tensors(leaf) if needs_gradient(tensor)
        ]
        if hidden:
            kind, path = type(leaf).__name__, hidden[0].lstrip(".")
            got = f"a {kind} whose {path} needs a gradient"
            violations.append(
                Violation(paths[index], "a value without parameters", got)
            )
    if violations:
        raise CapturedTensorError(
            f"{rule.name}: an argument holds parameters that need a gradient, and "
            "would "
            "get none",
            rule=rule.where,
            violations=violations,
            fix="Pass the parameters as arguments of their own: call the module "
            "through "
            "torch.func.functional_call, or convert it with gradtools.closure_convert.",
        )
