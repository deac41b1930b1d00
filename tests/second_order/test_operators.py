"""hvp_fn and ggnvp_fn: curvature at a point, for many products."""

import gc
import weakref

import numpy as np
import pytest
import torch
from scipy.sparse import linalg
from torch.testing import assert_close

import gradtools as gt


@pytest.fixture
def trees():
    torch.manual_seed(0)
    d, y = {"a": torch.randn(3), "b": torch.randn(2, 2)}, torch.tensor(0.5)
    v = {"a": torch.randn(3), "b": torch.randn(2, 2)}, torch.tensor(2.0)
    return (d, y), v


def f(d, y):
    return (d["a"] ** 3).sum() * y**2 + (torch.tanh(d["b"]) * d["a"][:2]).sum() * y


def dense(op):
    return op @ torch.eye(op.shape[0])


def test_three_products_value_and_gradient(trees):
    primals, v = trees
    op = gt.hvp_fn(f, *primals)
    for scale in (1.0, -2.0, 0.5):
        scaled = torch.utils._pytree.tree_map(lambda t, s=scale: s * t, v)
        assert_close(op(*scaled), gt.hvp(f, primals, scaled))
    assert_close(op.value, f(*primals))
    assert_close(op.grad, torch.func.grad(f, (0, 1))(*primals))
    assert not op.value.requires_grad
    assert repr(op) == "<Hessian of 8 numbers>"


@pytest.mark.on_cpu
def test_flat_vectors_and_matrices(trees):
    primals, v = trees
    op = gt.hvp_fn(f, *primals)
    H = dense(op)
    assert_close(H, H.T)
    flat = op.flatten(v)
    assert_close(op.unflatten(flat), v)
    assert_close(op @ flat, H @ flat)
    assert_close(
        op @ torch.stack([flat, 2 * flat], 1),
        torch.stack([H @ flat] * 2, 1) * torch.tensor([1.0, 2.0]),
    )
    assert_close(op @ v, op(*v))
    assert op.dtype is torch.float64
    assert op.device.type == "cpu"


def test_a_matrix_for_a_primal():
    x = torch.randn(3, 3)
    op = gt.hvp_fn(lambda x: (x**3).sum(), x)
    assert_close(op @ x, 6 * x * x)
    assert_close(dense(op), torch.diag(6 * x.flatten()))


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"chunk": 3}, {"memory": 1}])
def test_a_block_is_the_products_of_its_vectors(trees, options):
    primals, v = trees
    op = gt.hvp_fn(f, *primals)
    scales = torch.linspace(-1, 1, 10)
    block = torch.utils._pytree.tree_map(
        lambda t: scales.reshape(-1, *[1] * t.dim()) * t, v
    )
    found = op.block(*block, **options)
    for place, scale in enumerate(scales):
        one = op(*torch.utils._pytree.tree_map(lambda t, s=scale: s * t, v))
        assert_close(torch.utils._pytree.tree_map(lambda t, p=place: t[p], found), one)


def test_a_function_that_vmap_refuses_is_taken_one_by_one():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return Square.apply(x) * g * 3

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return 2 * torch.tensor(x.tolist()) * g

    x = torch.randn(3)
    op = gt.hvp_fn(lambda x: Cube.apply(x).sum(), x)
    V = torch.randn(4, 3)
    assert_close(op.block(V, chunk=4), 6 * x * V)


@pytest.mark.on_cpu
def test_scipy_takes_it():
    Q = torch.randn(6, 6)
    A = Q @ Q.T + torch.eye(6)
    op = gt.hvp_fn(lambda x: x @ A @ x / 2, torch.zeros(6))
    operator = op.to_scipy()
    b = torch.randn(6)
    x, info = linalg.cg(operator, b.numpy(), rtol=1e-12)
    assert info == 0
    assert_close(torch.as_tensor(x), torch.linalg.solve(A, b))
    values = linalg.eigsh(operator, 2, return_eigenvectors=False)
    assert_close(torch.as_tensor(values), torch.linalg.eigvalsh(A)[-2:])
    assert operator.shape == (6, 6)


def test_closing_frees_the_graph_and_ends_products():
    class Big:
        pass

    x = torch.randn(4)
    held = []

    def f(x):
        y = torch.exp(x)
        held.append(weakref.ref(y))
        return (y * y).sum()

    with gt.hvp_fn(f, x) as op:
        assert held[0]() is not None or op._products is not None
        op(x)
    gc.collect()
    assert held[0]() is None
    with pytest.raises(gt.TransformError, match="has been closed"):
        op(x)
    assert "closed" in repr(op)


def test_gauss_newton_as_an_operator(trees):
    (d, _), (v, _) = trees
    model = lambda d: torch.tanh(d["b"] @ d["a"][:2]) * d["a"].sum()
    loss = lambda out: torch.logsumexp(out, 0)
    op = gt.ggnvp_fn(model, loss, d)
    flat = op.flatten(d)
    J = torch.func.jacrev(lambda w: model(op.unflatten(w)))(flat)
    H = torch.func.jacrev(torch.func.jacrev(loss))(model(d))
    assert_close(dense(op), J.T @ H @ J)
    for _ in range(3):
        assert_close(op(v), gt.ggnvp(model, loss, (d,), (v,))[0])
    assert_close(op.value, loss(model(d)))
    assert_close(op.grad, torch.func.grad(lambda d: loss(model(d)))(d))


def test_sums_over_batches():
    data = torch.randn(9, 3)
    w, v = torch.randn(3), torch.randn(3)
    g = lambda w, rows: (torch.tanh(rows @ w) ** 2).sum()
    whole = gt.hvp_fn(lambda w: g(w, data), w)
    op = gt.hvp_fn(g, w, batches=data.split(2))
    assert_close(op.value, whole.value)
    assert_close(op.grad, whole.grad)
    for _ in range(3):
        assert_close(op(v), whole(v))
    assert_close(dense(op), dense(whole))
    model, loss = lambda w, rows: rows @ w, lambda out, rows: (out**4).sum()
    op = gt.ggnvp_fn(model, loss, w, batches=data.split(2))
    whole = gt.ggnvp_fn(lambda w: model(w, data), lambda out: loss(out, data), w)
    assert_close(dense(op), dense(whole))


def test_a_bar_shows_the_batches_go_by(capsys):
    w = torch.randn(3)
    op = gt.hvp_fn(lambda w, x: (w * x).sum() ** 2, w, batches=[w, w], progress=True)
    op(w)
    assert "hvp_fn: product" in capsys.readouterr().out


def test_within_transforms():
    x, v = torch.randn(4, 3), torch.randn(4, 3)
    product = lambda x, v: gt.hvp_fn(lambda x: (x**4).sum(), x)(v)
    assert_close(torch.func.vmap(product)(x, v), 12 * x**2 * v)
    assert_close(torch.func.grad(lambda x: product(x, v).sum())(x), 24 * x * v)


def test_third_derivatives_through_an_operator():
    x = torch.randn(3, requires_grad=True)
    v = torch.randn(3)
    op = gt.hvp_fn(lambda x: (x**4).sum(), x)
    (third,) = torch.autograd.grad(op(v).sum(), x)
    assert_close(third, 24 * x.detach() * v)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda op, x: op(x, x), "of 1 primals, and 2 vectors"),
        (lambda op, x: op @ torch.ones(7), r"the tensor has shape \(7,\)"),
        (lambda op, x: op.block(x.expand(2, 3), chunk=0), "chunk must be a positive"),
        (lambda op, x: op.block({"a": x}), "the vectors do not fit"),
        (lambda op, x: op(x[:2]), "the tangents do not fit"),
        (
            lambda op, x: gt.hvp_fn(lambda z: z.abs().sum(), x + 1j * x).to_scipy(),
            "linear over the real ones alone",
        ),
        (lambda op, x: gt.hvp_fn(torch.sum, x, batches=iter([])), "an iterator"),
        (lambda op, x: gt.hvp_fn(torch.sum, x, batches=[]), "no batches to sum"),
        (
            lambda op, x: gt.hvp_fn(lambda a, b: (a * b).sum(), x, x.float()).dtype,
            "no dtype in common: torch.float32, torch.float64",
        ),
    ],
)
def test_what_means_nothing_is_refused(call, words):
    x = torch.randn(3)
    with pytest.raises(gt.DefinitionError, match=words):
        call(gt.hvp_fn(lambda x: (x**3).sum(), x), x)


def test_a_missing_extra_says_how_it_is_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.sparse.linalg", None)
    with pytest.raises(gt.DefinitionError, match=r"pip install gradtools\[scipy\]"):
        gt.hvp_fn(lambda x: (x**3).sum(), torch.randn(3)).to_scipy()


def test_a_block_of_no_vectors():
    op = gt.hvp_fn(lambda x: (x**3).sum(), torch.randn(3))
    assert op.block(torch.zeros(0, 3)).shape == (0, 3)
    assert (op @ torch.zeros(3, 0)).shape == (3, 0)


def test_scipy_multiplies_complex_vectors_as_well():
    x = torch.randn(3)
    found = gt.hvp_fn(lambda x: (x**3).sum(), x).to_scipy() @ np.array([1, 1j, 2 + 1j])
    assert_close(torch.tensor(found), 6 * x * torch.tensor([1, 1j, 2 + 1j]))


def test_a_block_in_a_compiled_function():
    x, V = torch.randn(3), torch.randn(4, 3)
    products = lambda x, V: gt.hvp_fn(lambda x: (x**3).sum(), x).block(V)
    compiled = torch.compile(products, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, V), 6 * x * V)
