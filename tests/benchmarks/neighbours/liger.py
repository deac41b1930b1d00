"""Liger-Kernel: Triton kernels for training language models. They need a GPU.

The arguments follow the docstrings of the classes; sizes are small, and in float32.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.neighbours import Case

ROWS, WIDTH, VOCABULARY = 8, 64, 128


class _Maker:
    """Tensors on a device, drawn from a generator of their own."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(11)

    def new(self, *shape: int, needy: bool = True) -> torch.Tensor:
        value = torch.randn(shape, generator=self.generator).to(self.device)
        return value.requires_grad_(needy)

    def labels(self, *shape: int, below: int = VOCABULARY) -> torch.Tensor:
        return torch.randint(below, shape, generator=self.generator).to(self.device)

    def chances(self, *shape: int, needy: bool = False) -> torch.Tensor:
        return self.new(*shape, needy=False).softmax(-1).requires_grad_(needy)

    def log_chances(self, *shape: int, needy: bool = True) -> torch.Tensor:
        return self.new(*shape, needy=False).log_softmax(-1).requires_grad_(needy)


def _rope(m: _Maker) -> tuple[Any, ...]:
    length, width = 8, 32
    angle = m.new(1, length, width // 2, needy=False)
    angle = torch.cat([angle, angle], -1)
    q, k = m.new(2, 4, length, width), m.new(2, 2, length, width)
    return q, k, angle.cos(), angle.sin()


def _mrope(m: _Maker) -> tuple[Any, ...]:
    length, width = 8, 32
    angle = m.new(3, 2, length, width // 2, needy=False)
    angle = torch.cat([angle, angle], -1)
    q, k = m.new(2, 4, length, width), m.new(2, 2, length, width)
    return q, k, angle.cos(), angle.sin(), [4, 6, 6]


def _llama4_rope(m: _Maker) -> tuple[Any, ...]:
    angle = m.new(8, 16, needy=False)
    turns = torch.polar(torch.ones_like(angle), angle)
    return m.new(2, 8, 4, 32), m.new(2, 8, 2, 32), turns


def _grpo(m: _Maker) -> tuple[Any, ...]:
    logits = m.new(2, 9, VOCABULARY)  # one more than there are completions
    chosen = m.labels(2, 8)
    logp = logits.detach()[:, :-1].log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
    mask = torch.ones(2, 8, dtype=torch.int64, device=m.device)
    advantages = m.new(2, needy=False)
    return (
        *(logits, logp.contiguous(), logp.contiguous() - 0.1, chosen, advantages, mask),
        *(1.0, 0.04, 0.2, 0.2, False),
    )


def _moe(m: _Maker) -> tuple[Any, ...]:
    index = torch.stack([torch.randperm(4)[:2] for _ in range(ROWS)])
    return (
        m.new(ROWS, WIDTH),
        m.new(4, 2 * WIDTH, WIDTH),
        m.new(4, WIDTH, WIDTH),
        index.to(m.device, torch.int32),
        m.chances(ROWS, 2, needy=True),
    )


def _mhc(m: _Maker) -> tuple[Any, ...]:
    streams, width = 4, 32
    many = streams * streams + 2 * streams
    scalars = [torch.full((), 0.5, device=m.device).requires_grad_() for _ in range(3)]
    return (
        m.new(ROWS, streams, width),
        m.new(streams * width, many),
        m.new(many),
        *scalars,
        *(True, 5, 1e-6, 1e-4, 1e-6, 2.0),
    )


def _shards(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module(x)


# class: (module under liger_kernel.ops, arguments)
_CLASSES: dict[str, tuple[str, Callable[[_Maker], tuple[Any, ...]]]] = {
    "LigerSiLUMulFunction": (
        "swiglu",
        lambda m: (m.new(ROWS, WIDTH), m.new(ROWS, WIDTH)),
    ),
    "LigerFusedGateUpSiLUMulFunction": ("swiglu", lambda m: (m.new(ROWS, 2 * WIDTH),)),
    "LigerGELUMulFunction": (
        "geglu",
        lambda m: (m.new(ROWS, WIDTH), m.new(ROWS, WIDTH)),
    ),
    "LigerReLUSquaredFunction": ("relu_squared", lambda m: (m.new(ROWS, WIDTH),)),
    "LigerSoftmaxFunction": ("softmax", lambda m: (m.new(ROWS, WIDTH),)),
    "LigerSparsemaxFunction": ("sparsemax", lambda m: (m.new(ROWS, WIDTH), -1)),
    "LigerDyTFunction": (
        "dyt",
        lambda m: (m.new(ROWS, WIDTH), m.new(1), m.new(WIDTH), m.new(WIDTH)),
    ),
    "LigerRMSNormFunction": (
        "rms_norm",
        lambda m: (m.new(ROWS, WIDTH), m.new(WIDTH), 1e-6, 0.0, "llama", True),
    ),
    "LigerFusedAddRMSNormFunction": (
        "fused_add_rms_norm",
        lambda m: (m.new(ROWS, WIDTH), m.new(ROWS, WIDTH), m.new(WIDTH), 1e-6),
    ),
    "LigerModulatedRMSNormFunction": (
        "modulated_rms_norm",
        lambda m: (
            *(m.new(2, ROWS, WIDTH), m.new(WIDTH)),
            *(m.new(2, WIDTH), m.new(2, WIDTH), 1e-6),
        ),
    ),
    "LigerLayerNormFunction": (
        "layer_norm",
        lambda m: (m.new(ROWS, WIDTH), m.new(WIDTH), m.new(WIDTH), 1e-6),
    ),
    "LigerGroupNormFunction": (
        "group_norm",
        lambda m: (m.new(2, 8, WIDTH), m.new(8), m.new(8), 8, 4, 1e-6),
    ),
    "LigerPolyNormFunction": (
        "poly_norm",
        lambda m: (m.new(ROWS, WIDTH), m.new(3), m.new(), 1e-6, True),
    ),
    "LigerCrossEntropyFunction": (
        "cross_entropy",
        lambda m: (m.new(ROWS, VOCABULARY), m.labels(ROWS), None),
    ),
    "LigerFusedLinearCrossEntropyFunction": (
        "fused_linear_cross_entropy",
        lambda m: (m.new(ROWS, WIDTH), m.new(VOCABULARY, WIDTH), m.labels(ROWS)),
    ),
    "LigerFusedCETVDFunction": (
        "fused_ce_tvd",
        lambda m: (
            m.new(ROWS, VOCABULARY),
            m.new(ROWS, VOCABULARY, needy=False),
            m.labels(ROWS),
        ),
    ),
    "LigerJSDFunction": (
        "jsd",
        lambda m: (
            m.log_chances(ROWS, VOCABULARY),
            m.log_chances(ROWS, VOCABULARY, needy=False),
        ),
    ),
    "LigerFusedLinearJSDFunction": (
        "fused_linear_jsd",
        lambda m: (
            *(m.new(ROWS, WIDTH), m.new(VOCABULARY, WIDTH)),
            *(m.new(ROWS, WIDTH, needy=False), m.new(VOCABULARY, WIDTH, needy=False)),
        ),
    ),
    "LigerKLDivLossFunction": (
        "kl_div",
        lambda m: (m.log_chances(ROWS, VOCABULARY), m.chances(ROWS, VOCABULARY)),
    ),
    "LigerFusedLinearKLDivFunction": (
        "fused_linear_kl_div",
        lambda m: (
            *(m.new(ROWS, WIDTH), m.new(VOCABULARY, WIDTH)),
            m.chances(ROWS, VOCABULARY),
        ),
    ),
    "LigerTVDLossFunction": (
        "tvd",
        lambda m: (
            m.chances(ROWS, VOCABULARY, needy=True),
            m.chances(ROWS, VOCABULARY),
        ),
    ),
    "GrpoLossFunction": ("grpo_loss", _grpo),
    "LigerRopeFunction": ("rope", _rope),
    "LigerQwen2VLMRopeFunction": ("qwen2vl_mrope", _mrope),
    "LigerLlama4RopeFunction": ("llama4_rope", _llama4_rope),
    "LigerEmbeddingFunction": (
        "experimental.embedding",
        lambda m: (m.new(VOCABULARY, WIDTH), m.labels(ROWS)),
    ),
    "LigerAttnResFunction": (
        "attn_res",
        lambda m: (m.new(3, 2, ROWS, WIDTH), m.new(WIDTH), m.new(WIDTH), 1e-6),
    ),
    "LigerMultiTokenAttentionFunction": (
        "multi_token_attention",
        lambda m: (m.new(2, 4, 16, 16), m.new(4, 4, 3, 3), m.new(4), 1, 1),
    ),
    "LigerFusedNeighborhoodAttentionFunction": (
        "fused_neighborhood_attention",
        lambda m: (m.new(1, 2, 32, 32), m.new(1, 2, 32, 32), m.new(1, 2, 32, 32), 7, 1),
    ),
    "LigerFusedMoEFunction": ("fused_moe", _moe),
    "LigerMHCCoeffsFunction": ("mhc", _mhc),
    "LigerMHCPreFunction": ("mhc", lambda m: (m.new(ROWS, 4, 32), m.new(ROWS, 4))),
    "LigerMHCPostResFunction": (
        "mhc",
        lambda m: (
            *(m.new(ROWS, 4, 32), m.new(ROWS, 32)),
            *(m.new(ROWS, 4), m.new(ROWS, 4, 4)),
        ),
    ),
    "LigerMLPFunction": (
        "mlp",
        lambda m: (
            *(m.new(2, ROWS, WIDTH), m.new(2 * WIDTH, WIDTH)),
            *(m.new(2 * WIDTH, WIDTH), m.new(WIDTH, 2 * WIDTH)),
        ),
    ),
    "LigerTiledMLPFunction": (
        "tiled_mlp",
        lambda m: (
            *(_shards, torch.nn.Linear(WIDTH, WIDTH).to(m.device)),
            *(m.new(2, ROWS, WIDTH), 2),
        ),
    ),
}


def _case(name: str, device: str) -> Case:
    where, arguments = _CLASSES[name]
    module = importlib.import_module(f"liger_kernel.ops.{where}")
    return Case(getattr(module, name), arguments(_Maker(device)))


CASES: dict[str, Callable[[str], Case]] = {
    f"liger_kernel {name}": lambda device, name=name: _case(name, device)
    for name in _CLASSES
}
