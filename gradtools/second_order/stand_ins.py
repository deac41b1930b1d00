"""Functions that torch differentiates wrongly or not at all, and what stands in.

What is here is what ``tests/benchmarks/second_order_operators.py`` finds among all of
torch's operators:

- the fused ``_weight_norm`` has a wrong second derivative;
- ``layer_norm``, ``batch_norm`` and ``instance_norm`` take the mean and the deviation
  for constants in their second derivative, so that a third is wrong, and so are dual
  numbers through a backward, and the backward of a batched one;
- ``logcumsumexp`` has a third one that is NaN;
- ``linear_cross_entropy`` by chunks keeps gradients of its own making;
- ``cdist``, ``pdist``, ``embedding_bag`` and ``hardsigmoid`` have no second derivative,
  the fused kernels of ``scaled_dot_product_attention`` neither that nor forward mode;
- ``cholesky_inverse``, ``triangular_solve`` and ``scatter_reduce`` by products are
  wrong in forward mode.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gradtools import torch_compat

__all__ = [
    "WRONG_IN_FORWARD_MODE",
    "StandIns",
    "StandInsOfForwardMode",
    "is_always",
    "stand_in_of",
    "wrong_at",
]

Tensor = torch.Tensor


class StandIns(TorchFunctionMode):
    """Call other functions in the place of those that torch differentiates wrongly."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        stand_in = stand_in_of(func)
        function = func if stand_in is None else stand_in.function
        return function(*args, **(kwargs or {}))


class StandInsOfForwardMode(StandIns):
    """The same; and say of some functions that they have no forward mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        is_wrong = WRONG_IN_FORWARD_MODE.get(name)
        if is_wrong is not None and is_wrong(*args, **(kwargs or {})):
            raise NotImplementedError(f"the forward AD of {name} is wrong")
        return super().__torch_function__(func, types, args, kwargs)


class StandIn(NamedTuple):
    """What to call in the place of a function.

    Attributes:
        function: Of the same arguments.
        nodes: How the function shows in a graph.
        order: The first derivative that is wrong, or missing, of those nodes.
    """

    function: Callable[..., Any]
    nodes: tuple[str, ...] = ()
    order: int = 2


def wrong_at(order: int) -> frozenset[str]:
    """Return the nodes of a graph that are wrong or missing at an order."""
    return _WRONG[min(order, 3)]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend, by plain operators."""
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        allowed = torch.zeros((), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, allowed, -torch.inf)
    return torch_compat.attention_by_operators(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )[0]


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Scale v to the norms g."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def layer_norm(
    input: Tensor,  # torch's own name, and a keyword
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Normalize the last dimensions."""
    dims, x = tuple(range(-len(normalized_shape), 0)), _wide(input)
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    normal = (x - mean) * torch.rsqrt(variance + eps)
    return _scaled(normal, weight, bias).to(input.dtype)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalize by the statistics of the batch, or the running ones."""
    x = _wide(input)
    if training or running_mean is None or running_var is None:
        dims = (0, *range(2, input.dim()))
        variance, mean = torch.var_mean(x, dims, correction=0)
        if running_mean is not None and running_var is not None:
            count = input.numel() // input.shape[1]
            with torch.no_grad():
                unbiased = variance.detach() * count / max(count - 1, 1)
                running_mean.mul_(1 - momentum).add_(mean.detach() * momentum)
                running_var.mul_(1 - momentum).add_(unbiased * momentum)
    else:
        mean, variance = running_mean, running_var
    shape = (1, -1, *[1] * (input.dim() - 2))
    normal = (x - mean.view(shape)) * torch.rsqrt(variance.view(shape) + eps)
    return _scaled(
        normal,
        None if weight is None else weight.view(shape),
        None if bias is None else bias.view(shape),
    ).to(input.dtype)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Normalize each channel of each sample."""
    if not use_input_stats:
        return batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps
        )
    dims, x = tuple(range(2, input.dim())), _wide(input)
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    if running_mean is not None and running_var is not None:
        count = input[0, 0].numel()
        with torch.no_grad():
            unbiased = variance.detach() * count / max(count - 1, 1)
            for running, batch in ((running_mean, mean), (running_var, unbiased)):
                average = batch.detach().flatten(1).mean(0)
                running.mul_(1 - momentum).add_(average * momentum)
    shape = (1, -1, *[1] * len(dims))
    return _scaled(
        (x - mean) * torch.rsqrt(variance + eps),
        None if weight is None else weight.view(shape),
        None if bias is None else bias.view(shape),
    ).to(input.dtype)


def _torchs_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Take the arguments in the order of ``torch.batch_norm``."""
    return batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps
    )


def _torchs_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Take the arguments in the order of ``torch.instance_norm``."""
    return instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def cdist(
    x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str | None = None
) -> Tensor:
    """Return the distances of all pairs."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """Return the distances of all pairs of rows, each once."""
    rows, columns = torch.triu_indices(
        len(input), len(input), 1, device=input.device
    ).unbind()
    return torch.linalg.vector_norm(input[rows] - input[columns], p, -1)


def logcumsumexp(input: Tensor, dim: int) -> Tensor:
    """Return the logarithm of the cumulative sum of exponentials, sum by sum."""
    count = input.shape[dim] if input.dim() else 1
    x = input.reshape(1, 1) if input.dim() == 0 else input.movedim(dim, -1)
    earlier = torch.ones(count, count, dtype=torch.bool, device=x.device).tril()
    sums = x.unsqueeze(-2).masked_fill(~earlier, -torch.inf).logsumexp(-1)
    return sums.reshape(()) if input.dim() == 0 else sums.movedim(-1, dim)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Return a sigmoid of three pieces."""
    out = functional.relu6(input + 3) / 6
    return input.copy_(out) if inplace else out


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Reduce bags of rows of a table, by way of the rows."""
    if padding_idx is not None:
        padding_idx %= len(weight)  # as in any index, -1 is the last row
    if input.dim() == 2:
        lengths = input.new_full((len(input),), input.shape[1])
        weights = None if per_sample_weights is None else per_sample_weights.flatten()
        input = input.flatten()
    else:
        begins = input.new_zeros(1) if offsets is None else offsets
        begins = begins[:-1] if include_last_offset else begins
        # The last bag ends with the input, whatever the last offset says.
        lengths = torch.cat([begins, begins.new_tensor([len(input)])]).diff()
        weights = per_sample_weights
    bags = torch.repeat_interleave(lengths)
    rows = functional.embedding(
        input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq
    )
    if weights is not None:
        rows = rows * weights.unsqueeze(-1)
    if padding_idx is not None:
        is_there = input != padding_idx
        bags, rows = bags[is_there], rows[is_there]
    out = rows.new_zeros((len(lengths), weight.shape[1]))
    if mode == "max":
        index = bags.unsqueeze(-1).expand_as(rows)
        return out.scatter_reduce(0, index, rows, "amax", include_self=False)
    out = out.index_add(0, bags, rows)
    if mode == "sum":
        return out
    sizes = torch.bincount(bags, minlength=len(lengths)).to(out.dtype)
    return out / sizes.clamp(min=1).unsqueeze(-1)


def linear_cross_entropy(*args: Any, **kwargs: Any) -> Tensor:
    """Compute the loss in one piece."""
    return functional.linear_cross_entropy(*args, **{**kwargs, "options": None})


def _wide(x: Tensor) -> Tensor:
    """Return what norms of short numbers are computed in, by torch as well."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def is_always(*args: Any, **kwargs: Any) -> bool:
    """Return True, whatever a function is given."""
    return True


def _is_product(*args: Any, **kwargs: Any) -> bool:
    given = (*args, *kwargs.values())
    return any(isinstance(value, str) and value == "prod" for value in given)


_BATCH_NORMS = tuple(
    f"{kind}BatchNormBackward0" for kind in ("Native", "Cudnn", "Miopen")
)
_LINEAR_CROSS_ENTROPY = tuple(
    f"GeneratedBackwardFor_torch_nn__linear_cross_entropy_batch_chunked{kind}Backward"
    for kind in ("_default", "_no_reduction_default")
)
STAND_INS: Mapping[str, StandIn] = {
    "_weight_norm": StandIn(weight_norm, ("WeightNormInterfaceBackward0",)),
    "layer_norm": StandIn(layer_norm, ("NativeLayerNormBackward0",), 3),
    "batch_norm": StandIn(batch_norm, _BATCH_NORMS, 3),
    "instance_norm": StandIn(instance_norm, (), 3),
    "logcumsumexp": StandIn(logcumsumexp, ("LogcumsumexpBackward0",), 3),
    "cdist": StandIn(cdist, ("CdistBackward0",)),
    "pdist": StandIn(pdist, ("PdistBackward0",)),
    "hardsigmoid": StandIn(hardsigmoid, ("HardsigmoidBackward0",)),
    "embedding_bag": StandIn(embedding_bag, ("EmbeddingBagBackward0",)),
    "linear_cross_entropy": StandIn(linear_cross_entropy, _LINEAR_CROSS_ENTROPY),
    # The switch of its backends comes first, where it can be thrown: see sound.
    "scaled_dot_product_attention": StandIn(attention),
}
_IN_TORCHS_OWN_ORDER: Mapping[str, StandIn | None] = {
    "batch_norm": STAND_INS["batch_norm"]._replace(function=_torchs_batch_norm),
    "instance_norm": STAND_INS["instance_norm"]._replace(
        function=_torchs_instance_norm
    ),
    "embedding_bag": None,  # it returns more, and has an error by name
}
"""Functions of ``torch`` whose namesakes in ``torch.nn.functional`` take others."""


def stand_in_of(func: Any) -> StandIn | None:
    """Return what is to be called in the place of a function of torch's, if any is."""
    name = getattr(func, "__name__", "")
    if name in _IN_TORCHS_OWN_ORDER and isinstance(func, types.BuiltinFunctionType):
        return _IN_TORCHS_OWN_ORDER[name]
    return STAND_INS.get(name)


_WRONG = {
    order: frozenset(
        node
        for stand_in in STAND_INS.values()
        if stand_in.order <= order
        for node in stand_in.nodes
    )
    for order in (1, 2, 3)
}
WRONG_IN_FORWARD_MODE: Mapping[str, Callable[..., bool]] = {
    "scatter_reduce": _is_product,
    "scatter_reduce_": _is_product,
    "cholesky_inverse": is_always,
    "triangular_solve": is_always,
}
