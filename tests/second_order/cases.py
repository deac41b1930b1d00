"""Functions whose second derivatives are tested, tiny, and smooth where drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

L = torch.linalg


class Case(NamedTuple):
    """A real scalar function and where it is differentiated.

    Attributes:
        name: What it is.
        f: From the primals to a scalar.
        primals: Drawn in float64, with the seed fixed.
    """

    name: str
    f: Callable[..., torch.Tensor]
    primals: tuple[Any, ...]


CASES: list[Case] = []


def case(name: str, f: Callable[..., torch.Tensor], *primals: Any) -> None:
    """Add a function to the table."""
    CASES.append(Case(name, f, primals))


def through(name: str, f: Callable[..., torch.Tensor], *primals: Any) -> None:
    """Add a function of tensors, by a sum of sines that mixes all derivatives."""

    def scalar(*args: Any) -> torch.Tensor:
        out = f(*args)
        return (torch.sin(out + 0.3) * weights(out)).sum()

    case(name, scalar, *primals)


def of_module(
    name: str, module: nn.Module, *args: Any, pick: Any = lambda o: o
) -> None:
    """Add a module, as a function of its parameters and its first input."""
    params = {key: p.detach().clone() for key, p in module.named_parameters()}

    def scalar(params: Any, x: torch.Tensor) -> torch.Tensor:
        buffers = {key: b.clone() for key, b in module.named_buffers()}
        out = pick(functional_call(module, {**params, **buffers}, (x, *args[1:])))
        return (torch.sin(out + 0.3) * weights(out)).sum()

    case(name, scalar, params, args[0])


def weights(like: torch.Tensor) -> torch.Tensor:
    """Return numbers that are all different."""
    return torch.linspace(0.5, 1.5, like.numel(), dtype=like.dtype).reshape(like.shape)


torch.set_default_dtype(torch.float64)  # also for pytest's collection; conftest agrees
_before = torch.get_rng_state()
torch.manual_seed(1)
R = torch.randn
x, y = R(4, 3), R(4, 3)
square = R(3, 3) + 3 * torch.eye(3)
positive = square @ square.T + torch.eye(3)
labels = torch.tensor([0, 2, 1, 1])
chance = torch.rand(4, 3) * 0.8 + 0.1

# Losses.
case("mse_loss", lambda a, b: F.mse_loss(a, b**2), x, y)
case("smooth_l1_loss", lambda a: F.smooth_l1_loss(a**2, y), x)
case("huber_loss", lambda a: F.huber_loss(a**2, y, delta=0.7), x)
case("binary_cross_entropy", lambda p: F.binary_cross_entropy(p**2, chance), chance)
case(
    "binary_cross_entropy_with_logits",
    lambda a: F.binary_cross_entropy_with_logits(a, chance, pos_weight=chance[0] + 1),
    x,
)
case("cross_entropy", lambda a: F.cross_entropy(a, labels), x)
case(
    "cross_entropy with weights, smoothing and an ignored class",
    lambda a: F.cross_entropy(
        a**2, labels, chance[0], ignore_index=2, label_smoothing=0.1
    ),
    x,
)
case("cross_entropy with probabilities", lambda a: F.cross_entropy(a, chance), x)
case("nll_loss", lambda a: F.nll_loss(F.log_softmax(a, 1), labels), x)
case("kl_div", lambda a: F.kl_div(F.log_softmax(a, 1), chance, reduction="sum"), x)
case("gaussian_nll_loss", lambda m, v: F.gaussian_nll_loss(m, y, v), x, chance)
case("poisson_nll_loss", lambda a: F.poisson_nll_loss(a, chance), x)
case("soft_margin_loss", lambda a: F.soft_margin_loss(a, chance.sign()), x)
case(
    "cosine_embedding_loss",
    lambda a, b: F.cosine_embedding_loss(a, b, torch.ones(4)),
    x,
    y,
)
case(
    "triplet_margin_loss",
    lambda a, b: F.triplet_margin_loss(a, b, a.roll(1, 0), margin=9.0),
    x,
    y,
)
case("multi_label", lambda a: F.multilabel_soft_margin_loss(a, chance.round()), x)

# Norms.
through("layer_norm", lambda a, w, b: F.layer_norm(a, (3,), w, b), x, R(3), R(3))
through("layer_norm over two", lambda a: F.layer_norm(a, (4, 3)), x)
through("rms_norm", lambda a, w: F.rms_norm(a, (3,), w), x, R(3))
through("group_norm", lambda a, w: F.group_norm(a, 2, w), R(2, 4, 3), R(4))
through("instance_norm", F.instance_norm, R(2, 3, 4))
through(
    "batch_norm", lambda a, w: F.batch_norm(a, None, None, w, training=True), x, R(3)
)
through("local_response_norm", lambda a: F.local_response_norm(a, 2), R(2, 3, 4))
through("normalize", F.normalize, x)
through("_weight_norm", lambda v, g: torch._weight_norm(v, g, 0), x, R(4, 1))
of_module("weight_norm", nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), x)
of_module("BatchNorm in training", nn.BatchNorm1d(3), x)
of_module("BatchNorm in evaluation", nn.BatchNorm1d(3).eval(), x)
of_module("InstanceNorm", nn.InstanceNorm1d(3, affine=True), R(2, 3, 5))

# Networks.
sequence = R(5, 2, 3)
of_module("LSTM", nn.LSTM(3, 2, 2, bidirectional=True), sequence, pick=lambda o: o[0])
of_module("GRU", nn.GRU(3, 2, 2), sequence, pick=lambda o: o[0])
of_module("RNN", nn.RNN(3, 2), sequence, pick=lambda o: o[0])
of_module("Conv1d", nn.Conv1d(2, 3, 3, padding=1), R(2, 2, 5))
of_module(
    "Conv2d, strided, dilated, grouped",
    nn.Conv2d(4, 4, 3, 2, 2, 2, groups=2),
    R(1, 4, 6, 6),
)
of_module("Conv3d", nn.Conv3d(1, 2, 2), R(1, 1, 3, 3, 3))
of_module("ConvTranspose2d", nn.ConvTranspose2d(2, 2, 3, 2), R(1, 2, 3, 3))
of_module("Bilinear", nn.Bilinear(3, 3, 2), x, y)
of_module("PReLU", nn.PReLU(), x)
of_module(
    "MultiheadAttention",
    nn.MultiheadAttention(4, 2, batch_first=True),
    *[R(2, 3, 4)] * 3,
    pick=lambda o: o[0],
)
for first in (False, True):
    of_module(
        f"TransformerEncoderLayer, norm_first={first}",
        nn.TransformerEncoderLayer(
            4, 2, 8, 0.0, F.gelu, batch_first=True, norm_first=first
        ),
        R(2, 3, 4),
    )
of_module(
    "TransformerDecoderLayer",
    nn.TransformerDecoderLayer(4, 2, 8, 0.0, batch_first=True, activation=F.gelu),
    R(2, 3, 4),
    R(2, 3, 4),
)
of_module(
    "a small network",
    nn.Sequential(
        nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 2)
    ),
    x,
)
of_module(
    "a convolutional network",
    nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    ),
    R(2, 1, 6, 6),
)

# Attention.
q, k, v = (R(1, 2, 4, 3) for _ in range(3))
attend = F.scaled_dot_product_attention
through("attention", attend, q, k, v)
through("causal attention", lambda *a: attend(*a, is_causal=True), q, k, v)
mask = torch.eye(4, dtype=torch.bool) | (torch.rand(4, 4) > 0.5)
through("attention with a mask", lambda *a: attend(*a, attn_mask=mask), q, k, v)
through(
    "attention with a bias", lambda *a: attend(*a[:3], attn_mask=a[3]), q, k, v, R(4, 4)
)

# Pooling and images.
image = R(1, 2, 6, 6)
through("max_pool2d", lambda a: F.max_pool2d(a, 2), image)
through("avg_pool2d", lambda a: F.avg_pool2d(a, 3, 2, 1), image)
through("adaptive_avg_pool2d", lambda a: F.adaptive_avg_pool2d(a, 4), image)
through("lp_pool2d", lambda a: F.lp_pool2d(a**2 + 0.1, 3.0, 2), image)
through("unfold", lambda a: F.unfold(a, 3), image)
through("pixel_shuffle", lambda a: F.pixel_shuffle(a, 2), R(1, 4, 3, 3))
through(
    "bilinear interpolation",
    lambda a: F.interpolate(a, scale_factor=1.5, mode="bilinear"),
    image,
)
through(
    "bicubic interpolation",
    lambda a: F.interpolate(a, size=(4, 5), mode="bicubic"),
    image,
)
through(
    "grid_sample",
    lambda a, g: F.grid_sample(a, torch.tanh(g), align_corners=False),
    image,
    R(1, 3, 3, 2),
)
through(
    "affine_grid",
    lambda t: F.affine_grid(t, (1, 1, 3, 3), align_corners=False),
    R(1, 2, 3),
)

# Tables and distances.
index = torch.tensor([[0, 2, 1], [3, 3, 0]])
through("embedding", lambda t: F.embedding(index, t), x)
for mode in ("sum", "mean"):
    through(
        f"embedding_bag, {mode}",
        lambda t, mode=mode: F.embedding_bag(index, t, mode=mode),
        x,
    )
through(
    "embedding_bag with weights",
    lambda t, w: F.embedding_bag(index, t, mode="sum", per_sample_weights=w),
    x,
    R(2, 3),
)
through(
    "embedding_bag with offsets",
    lambda t: F.embedding_bag(index.flatten(), t, torch.tensor([0, 2])),
    x,
)
through("embedding_bag, max", lambda t: F.embedding_bag(index, t, mode="max") ** 2, x)
through("cdist", torch.cdist, x, y + 3)
through("cdist, p=1.5", lambda a, b: torch.cdist(a, b, 1.5), x, y + 3)
through("pdist", F.pdist, x)
through("cosine_similarity", F.cosine_similarity, x, y)
through("pairwise_distance", F.pairwise_distance, x, y)

# Linear algebra.
through("solve", L.solve, square, R(3))
through("det", torch.det, square)
through("slogdet", lambda A: torch.slogdet(A)[1], square)
through("inv", L.inv, square)
through("cholesky", lambda A: L.cholesky(A @ A.T + torch.eye(3)), square)
through(
    "cholesky_solve",
    lambda A, b: torch.cholesky_solve(b, L.cholesky(A @ A.T)),
    square,
    R(3, 2),
)
through("qr", lambda A: L.qr(A)[1].abs(), square)
through("eigvalsh", lambda A: L.eigvalsh(A + A.T), square)
through("eigenvectors", lambda A: L.eigh(A + A.T)[1] ** 2, square)
through("singular values", L.svdvals, square)
through("lstsq", lambda A, b: L.lstsq(A, b).solution, x, R(4, 1))
through("pinv", L.pinv, x)
through("matrix_exp", lambda A: torch.matrix_exp(A / 3), square)
through("matrix_power", lambda A: L.matrix_power(A, 3), square / 3)
through(
    "solve_triangular",
    lambda A, b: L.solve_triangular(A, b, upper=True),
    square,
    R(3, 2),
)
through("lu", lambda A: L.lu_solve(*L.lu_factor(A), A.T), square)
through("nuclear norm", lambda A: L.matrix_norm(A, "nuc"), square)
through("vector_norm, p=3", lambda a: L.vector_norm(a, 3, 1), x)

# Reductions, selections, special functions.
through("logsumexp", lambda a: torch.logsumexp(a, 1), x)
through("logcumsumexp", lambda a: torch.logcumsumexp(a, 1), x)
through("softmax", lambda a: torch.softmax(a, 1), x)
through("cumprod", lambda a: torch.cumprod(a, 1), x)
through("prod with a zero", lambda a: torch.prod(a, 1), x * (x > -0.4))
through("std", lambda a: torch.std(a, 1), x)
through("gather", lambda a: torch.gather(a**2, 1, index.T[:, :1].expand(3, 3)), square)
through("index_add", lambda a, b: a.index_add(0, labels, b**2), x, y)
through(
    "scatter_reduce, mean",
    lambda a, b: a.scatter_reduce(0, labels[:, None].expand(4, 3), b**2, "mean"),
    x,
    y,
)
through("sort", lambda a: torch.sort(a, 1)[0] ** 2, x)
through("topk", lambda a: torch.topk(a, 2)[0] ** 2, x)
through("where", lambda a, b: torch.where(a > 0, a**2, b**3), x, y)
through("fft", lambda a: torch.fft.rfft(a).abs(), x)
through("complex numbers", lambda a, b: (torch.complex(a, b) ** 3).real, x, y)
through("a complex argument", lambda z: (z * z * z.conj()).real, torch.complex(x, y))
through(
    "erf, lgamma and digamma",
    lambda p: torch.erf(p) + torch.lgamma(p) + torch.digamma(p),
    chance,
)
through("Bessel functions", lambda p: torch.special.i0e(p) + torch.i0(p), chance + 1)
through("gelu, both", lambda a: F.gelu(a) + F.gelu(a, approximate="tanh"), x)
through("silu, mish and softplus", lambda a: F.silu(a) + F.mish(a) + F.softplus(a), x)
through("elu, selu and celu", lambda a: F.elu(a) + F.selu(a) + F.celu(a, 0.7), x)
through("hardsigmoid", lambda a: F.hardsigmoid(a) * a, x)
through("pow", lambda a, b: a**b, chance, y)
through("einsum", lambda a, b: torch.einsum("ij,ik,il->jkl", a, b, a), x, y)


# Forms of functions and arguments.
class Cube(torch.autograd.Function):
    """A Function in the old style, whose backward can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the cube."""
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        """Return the gradient."""
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grads[0]


through("an old Function", Cube.apply, x)
through(
    "a checkpoint",
    lambda a, b: checkpoint(
        lambda a, b: torch.tanh(a * b) ** 2, a, b, use_reentrant=False
    ),
    x,
    y,
)
case("a linear function", lambda a: (a * y).sum(), x)
case("a function that ignores an argument", lambda a, b: (b**3).sum(), x, y)
case(
    "integers among the arguments",
    lambda a, n, i: (a**n).sum() + a[i].prod(),
    x,
    3,
    torch.tensor([1, 2]),
)
case(
    "trees",
    lambda t: (t["a"] ** 2 * t["b"][0]).sum() + t["b"][1] ** 3,
    {"a": x, "b": [y, torch.tensor(2.0)]},
)
case("a scalar", lambda a: torch.sin(a) * a, torch.tensor(0.7))
case("an empty tensor", lambda a, b: (a**2).sum() + (b**3).sum(), torch.empty(0, 3), x)
tied = {"w": R(3, 3), "b": R(3)}
case(
    "tied weights",
    lambda p: F.mse_loss(torch.tanh(x @ p["w"] + p["b"]) @ p["w"].T, x),
    tied,
)
through("dropout with p=0", lambda a: F.dropout(a, 0.0) ** 2, x)
torch.set_rng_state(_before)
torch.set_default_dtype(torch.float32)
