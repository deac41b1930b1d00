"""ggnvp in one run of the model: what forward mode sees otherwise must not show."""

import gc
import warnings
import weakref

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradtools as gt
from gradtools.second_order import products
from gradtools.second_order.dual_numbers import dual


def jacobian_by_rows(f, w):
    """Return the Jacobian of plain reverse mode, row by row."""
    x = w.detach().requires_grad_()
    out = f(x)
    rows = []
    for place in range(out.numel()):
        (row,) = torch.autograd.grad(
            out.reshape(-1)[place], x, retain_graph=True, allow_unused=True
        )
        rows.append(torch.zeros_like(x) if row is None else row)
    return torch.stack([row.reshape(-1) for row in rows])


def gauss_newton(f, w, v):
    """Multiply with J.T @ J, for a loss that is half the square."""
    matrix = jacobian_by_rows(f, w)
    return (matrix.T @ (matrix @ v.reshape(-1))).reshape(w.shape)


def half_square(out):
    return out.square().sum() / 2


class Doubled(torch.autograd.Function):
    """Forward mode and reverse mode of this Function do not agree."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 3 * g


@gt.custom_vjp(contract=gt.Surrogate())
def tripled(x):
    """Return x; its gradient is deliberately not the derivative."""
    return x * 1.0


@tripled.def_bwd
def _(residuals, g):
    return 3 * g


def with_a_norm_that_is_constant(w):
    with torch.no_grad():
        scale = w.norm()
    return w * scale


def with_a_hook(w):
    y = w * 2
    y.register_hook(lambda g: 5 * g)
    return y.sin()


def with_a_gradient_inside(w):
    x = torch.linspace(-1, 1, 4, dtype=w.dtype).requires_grad_()
    energy = (F.layer_norm(x * w, (4,)) ** 3).sum()
    return torch.autograd.grad(energy, x, create_graph=True)[0]


def in_place(w):
    y = w * 2
    y.view(2, 2)[0].mul_(w[:2])
    y.add_(w.square())
    return y


def with_integers(w):
    values, places = w.square().topk(3)
    return values * (places + 1)


W = torch.tensor([0.5, -1.0, 2.0, 0.3], dtype=torch.float64)
V = torch.tensor([1.0, 0.5, -0.7, 0.2], dtype=torch.float64)
TABLE = torch.arange(12.0, dtype=torch.float64).reshape(3, 4).sin()
MODELS = {
    "no_grad": with_a_norm_that_is_constant,
    "a hook": with_a_hook,
    "a gradient inside": with_a_gradient_inside,
    "in place": in_place,
    "integers": with_integers,
    "detach": lambda w: w * w.detach().exp() + w.data.sin(),
    "identity": lambda w: w,
    "a view": lambda w: w.view(2, 2).T,
    "an unused one": lambda w: torch.stack([w[0] ** 2, w.detach().sum()]),
    "a Function": lambda w: Doubled.apply(w).sin(),
    "a surrogate": lambda w: tripled(w).sin(),
    "a checkpoint": lambda w: checkpoint(torch.sin, w * 2, use_reentrant=False),
    "layer_norm": lambda w: F.layer_norm(w * TABLE, (4,), w, w.square()),
    "batch_norm": lambda w: F.batch_norm(w * TABLE, None, None, w, w, True),
    "instance_norm": lambda w: F.instance_norm((w * TABLE)[None], weight=w[:3]),
    "group_norm": lambda w: F.group_norm(
        (w * TABLE).reshape(1, 6, 2), 2, w[0] * w.new_ones(6)
    ),
    "logcumsumexp": lambda w: torch.logcumsumexp(w * TABLE, 1),
    "weight_norm": lambda w: torch._weight_norm(w * TABLE, w[:3, None] + 3, 0),
    "cdist": lambda w: torch.cdist(w * TABLE, TABLE + 1),
    "prod": lambda w: torch.zeros(2, dtype=w.dtype).scatter_reduce(
        0, torch.tensor([0, 1, 0, 1]), w, "prod", include_self=False
    ),
    "cholesky_inverse": lambda w: torch.cholesky_inverse(
        torch.diag(w.abs() + 1) + w.outer(w).tril(-1)
    ),
    "solve": lambda w: torch.linalg.solve(torch.diag(w) + w.outer(w), w),
    "det": lambda w: torch.linalg.det(torch.diag(w) + w.outer(w))[None],
    "linear": lambda w: F.linear(w * TABLE[:, None], TABLE * w, w[:3]).tanh(),
    "linear, of data": lambda w: F.linear(TABLE, TABLE * w, w[:3]).tanh(),
    "linear, its bias alone": lambda w: F.linear(TABLE, TABLE, w[:3]).tanh(),
    "linear, its weight alone": lambda w: F.linear(TABLE, weight=TABLE * w).tanh(),
    "linear, of a frozen layer": lambda w: F.linear(w, TABLE, TABLE[:, 0]).tanh(),
    "matmul": lambda w: ((TABLE * w) @ (w * TABLE).T).tanh(),
    "matmul, of data": lambda w: torch.matmul(TABLE, w) * (w @ TABLE.T),
    "matmul, from the right": lambda w: w.__rmatmul__(TABLE) * torch.mv(TABLE, w),
    "bmm": lambda w: torch.bmm(TABLE[None] * w, (TABLE * w).T[None]).tanh(),
    "conv1d, unbatched": lambda w: F.conv1d(
        TABLE, (w[:3] * TABLE[:, :2, None]).movedim(1, 0), w[:2], padding="same"
    ).tanh(),
    "conv2d": lambda w: F.conv2d(
        (w * TABLE)[None, None], w.view(1, 1, 2, 2), w[:1], stride=2, padding=1
    ).tanh(),
    "conv2d, its bias alone": lambda w: F.conv2d(
        TABLE[None, None], TABLE[:2, :2][None, None], bias=w[:1]
    ).tanh(),
    "conv_transpose2d": lambda w: F.conv_transpose2d(
        TABLE[None, None], w.view(1, 1, 2, 2), None, 2
    ).tanh(),
    "attention": lambda w: F.scaled_dot_product_attention(
        *[(w * TABLE * k)[None, None] for k in (1, 2, 3)]
    ),
    "embedding_bag": lambda w: F.embedding_bag(
        torch.tensor([0, 2, 1]), w * TABLE, torch.tensor([0, 2])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_product_is_that_of_reverse_mode(name):
    model = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = gt.ggnvp(model, half_square, (W,), (V,))[0]
        again = gt.ggnvp_fn(model, half_square, W)(V)
    if name != "attention":  # its fused kernel has no second derivative by hand
        assert torch.allclose(found, gauss_newton(model, W, V))
    assert torch.allclose(found, again)


def test_a_model_of_plain_operators_runs_once():
    calls = []

    def model(w):
        calls.append(1)
        return w.sin()

    gt.ggnvp(model, half_square, (W,), (V,))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("vector", "is_copied"),
    [
        (torch.stack([V, 2 * V])[1], False),
        (torch.stack([V, 2 * V], dim=1)[:, 1], True),  # not contiguous
        (V, False),
    ],
)
def test_a_row_of_a_block_is_taken_as_it_is(vector, is_copied):
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(dual(W, vector)).tangent
        assert (tangent.data_ptr() != vector.data_ptr()) == is_copied
        assert torch.equal(tangent, vector)
    found = gt.ggnvp(torch.sin, half_square, (W,), (vector,))[0]
    assert torch.allclose(found, W.cos().square() * vector)


def test_a_row_outlives_its_block():
    block = torch.stack([V, 2 * V])
    row = weakref.ref(block)
    with forward_ad.dual_level():
        moved = dual(W, block[1])
        del block
        gc.collect()
        assert row() is None
        assert torch.equal(forward_ad.unpack_dual(moved).tangent, 2 * V)


def test_random_numbers_are_drawn_once():
    torch.manual_seed(0)
    found = gt.ggnvp(lambda w: F.dropout(w * 2, 0.5), half_square, (W,), (V,))[0]
    torch.manual_seed(0)
    mask = F.dropout(torch.full_like(W, 2.0), 0.5)
    assert torch.allclose(found, mask.square() * V)


def test_buffers_are_updated_once():
    net = torch.nn.BatchNorm1d(4).double().requires_grad_(False)
    gt.ggnvp(lambda w: net(w * TABLE), half_square, (W,), (V,))
    assert net.num_batches_tracked == 1


def test_a_captured_parameter_gets_its_gradient():
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    found = gt.ggnvp(lambda w: scale * w.sin(), half_square, (W,), (V,))[0]
    (slope,) = torch.autograd.grad(found.sum(), scale)
    assert torch.allclose(slope, (2 * scale * W.cos().square() * V).sum())


def test_a_tensor_that_the_loss_captures_gets_its_gradient():
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    loss = lambda out: scale**2 * half_square(out)
    found = gt.ggnvp(torch.sin, loss, (W,), (V,))[0]
    (slope,) = torch.autograd.grad(found.sum(), scale)
    assert torch.allclose(slope, (2 * scale * W.cos().square() * V).sum())


def test_vectors_keep_their_graph_under_no_grad():
    start = V.clone().requires_grad_()
    vector = start * 2
    with torch.no_grad():
        found = gt.ggnvp(lambda w: F.dropout(w, 0.0), half_square, (W,), (vector,))[0]
    assert vector.grad_fn is not None
    assert torch.allclose(found, 2 * V)


@pytest.mark.parametrize("surroundings", [torch.no_grad, torch.inference_mode])
def test_it_serves_where_no_gradient_is_wanted(surroundings):
    with surroundings():
        w = W.clone()
        found = gt.ggnvp(torch.sin, half_square, (w,), (V.clone(),))[0]
    assert torch.allclose(found, W.cos().square() * V)


def test_it_composes_with_vmap_and_grad():
    several = torch.stack([V, 2 * V])
    each = gt.vmap(lambda v: gt.ggnvp(torch.sin, half_square, (W,), (v,))[0])(several)
    assert torch.allclose(each, W.cos().square() * several)
    slope = gt.grad(lambda w: gt.ggnvp(torch.sin, half_square, (w,), (V,))[0].sum())(W)
    assert torch.allclose(slope, -2 * W.cos() * W.sin() * V)


def test_aux_and_constants_come_back():
    found, aux = gt.ggnvp(
        lambda w: (w.sin(), {"twice": w * 2}), half_square, (W,), (V,), has_aux=True
    )
    assert torch.allclose(found[0], W.cos().square() * V)
    assert torch.equal(aux["twice"], 2 * W)
    assert not aux["twice"].requires_grad


def test_an_error_of_the_model_is_its_own():
    def model(w):
        raise RuntimeError("out of cheese")

    with pytest.raises(RuntimeError, match="out of cheese"):
        gt.ggnvp(model, half_square, (W,), (V,))


def test_forward_mode_is_what_serves_plain_operators(monkeypatch):
    monkeypatch.setattr(products, "_by_graphs", None)
    found = gt.ggnvp(torch.sin, half_square, (W,), (V,))[0]
    assert torch.allclose(found, W.cos().square() * V)


def quartic(w):
    return (w**4).sum() + (w.sin() * w.roll(1)).sum()


@pytest.mark.parametrize("chances", [1, 15])
def test_blocks_are_right_whichever_way_has_its_turn(chances):
    op = gt.hvp_fn(quartic, W)
    block = torch.eye(4, dtype=W.dtype)
    wanted = torch.autograd.functional.hessian(quartic, W)
    for _ in range(chances):
        assert torch.allclose(op.block(block), wanted)
        assert torch.allclose(op.block(block[:3]), wanted[:3])


def test_a_function_that_is_another_each_time_is_not_run_again_for_a_block():
    calls = []

    def f(w):
        calls.append(1)
        return len(calls) * (w**4).sum()

    op = gt.hvp_fn(f, W)
    for _ in range(15):
        found = op.block(torch.eye(4, dtype=W.dtype))
        assert torch.allclose(found, torch.diag(12 * W.square()))
    assert len(calls) <= 2


def test_random_numbers_of_an_operator_stay_those_of_its_graph():
    op = gt.hvp_fn(lambda w: F.dropout(w, 0.5).pow(4).sum(), W)
    wanted = torch.stack([op(v) for v in torch.eye(4, dtype=W.dtype)])
    for _ in range(15):
        assert torch.allclose(op.block(torch.eye(4, dtype=W.dtype)), wanted)


def test_a_constant_under_no_grad_is_one_in_blocks_too():
    f = lambda w: (with_a_norm_that_is_constant(w) ** 2).sum()
    op = gt.hvp_fn(f, W)
    wanted = torch.stack([op(v) for v in torch.eye(4, dtype=W.dtype)])
    for _ in range(15):
        assert torch.allclose(op.block(torch.eye(4, dtype=W.dtype)), wanted)
