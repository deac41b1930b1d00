"""Conjugate gradients, against torch.linalg.solve."""

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from gradtools.second_order import cg as module

N = 12


@pytest.fixture(name="A")
def positive_definite():
    torch.manual_seed(0)
    Q = torch.randn(N, N)
    return Q @ Q.T + torch.eye(N)


@pytest.fixture
def b():
    torch.manual_seed(1)
    return torch.randn(N)


@pytest.mark.parametrize("form", ["matrix", "function", "operator"])
def test_a_positive_definite_system(A, b, form):
    forms = {
        "matrix": A,
        "function": lambda v: A @ v,
        "operator": gt.hvp_fn(lambda x: x @ A @ x / 2, torch.zeros(N)),
    }
    x, info = gt.cg(forms[form], b, rtol=1e-10)
    assert_close(x, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-8)
    assert info.converged
    assert info.iterations <= N + 5
    assert info.residual_norm <= 1e-10 * b.norm()
    assert not info.negative_curvature


def test_damping_a_start_and_a_preconditioner(A, b):
    exact = torch.linalg.solve(A + 0.5 * torch.eye(N), b)
    x, info = gt.cg(A, b, x0=exact, damping=0.5)
    assert_close(x, exact)
    assert info.iterations == 0
    inverse = torch.linalg.inv(A + 0.5 * torch.eye(N))
    x, info = gt.cg(A, b, M=inverse, damping=0.5, rtol=1e-10)
    assert_close(x, exact)
    assert info.iterations <= 2


def test_too_few_steps_are_reported(A, b):
    _, info = gt.cg(A, b, maxiter=3)
    assert not info.converged
    assert info.iterations == 3


def test_negative_curvature_is_reported_and_ends_the_search(A, b):
    x, info = gt.cg(A - 8 * torch.eye(N), b)
    assert info.negative_curvature
    assert not info.converged
    assert torch.isfinite(x).all()


def test_a_right_hand_side_of_zeros(A):
    x, info = gt.cg(A, torch.zeros(N))
    assert_close(x, torch.zeros(N))
    assert info.converged
    assert info.iterations == 0


def test_a_batch_stops_system_by_system(A):
    b = torch.stack([torch.zeros(N), A[0], torch.randn(N)])
    x, info = gt.cg(A, b, batch_dims=1, rtol=1e-10)
    assert_close(x, torch.linalg.solve(A, b.T).T, rtol=1e-7, atol=1e-8)
    assert info.converged.shape == (3,)
    assert info.iterations[0] == 0
    assert info.iterations[2] > 3


def test_trees_and_a_batch_of_trees():
    def product(t):
        return {"a": 3 * t["a"], "b": 2 * t["b"] + t["b"].flip(-1)}

    one = {"a": torch.randn(2, 2), "b": torch.randn(3)}
    x, _ = gt.cg(product, one, rtol=1e-12)
    assert_close(product(x), one)
    two = {key: torch.stack([value, -2 * value]) for key, value in one.items()}
    x2, info = gt.cg(product, two, batch_dims=1, rtol=1e-12)
    assert_close(x2["a"][1], -2 * x["a"])
    assert info.converged.tolist() == [True, True]


def test_vmap_over_matrices_and_right_hand_sides(A):
    matrices = torch.stack([A, 2 * A, A + torch.eye(N)])
    b = torch.randn(3, N)
    x, info = torch.func.vmap(lambda A, b: gt.cg(A, b, rtol=1e-10))(matrices, b)
    assert_close(x, torch.linalg.solve(matrices, b), rtol=1e-7, atol=1e-8)
    assert info.converged.all()


def test_in_a_compiled_function(A, b):
    compiled = torch.compile(
        lambda b: gt.cg(A, b, maxiter=2 * N, rtol=1e-10)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    assert_close(compiled(b), torch.linalg.solve(A, b), rtol=1e-7, atol=1e-8)


def test_a_compiled_loop_needs_a_length(A, b):
    compiled = torch.compile(lambda b: gt.cg(A, b)[0], fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"Give maxiter=|DefinitionError"):
        compiled(b)


def test_a_hermitian_system():
    Q = torch.randn(4, 4, dtype=torch.complex128)
    A = Q @ Q.mH + torch.eye(4)
    b = torch.randn(4, dtype=torch.complex128)
    x, info = gt.cg(A, b, rtol=1e-12)
    assert_close(A @ x, b)
    assert info.converged


@pytest.mark.on_cpu
def test_an_accelerator_is_asked_every_eight_steps(A, b, monkeypatch):
    looks = []
    monkeypatch.setattr(module, "is_over", lambda active: looks.append(active) or False)
    gt.cg(A, b, maxiter=16)
    assert len(looks) == 16  # an answer of the CPU costs nothing
    looks.clear()
    meta = torch.empty(N, device="meta")
    gt.cg(lambda v: v, meta, maxiter=16)
    assert len(looks) == 2


def test_a_product_of_another_structure_is_refused(b):
    with pytest.raises(gt.DefinitionError, match=r"the product A\(x\) do not fit"):
        gt.cg(lambda v: v[:3], b)
    with pytest.raises(gt.DefinitionError, match="the x0 do not fit the primals"):
        gt.cg(lambda v: v, b, x0=(b, b))


@pytest.mark.parametrize("size", [300.0, 1e-4])
def test_short_numbers_whose_squares_are_none(size):
    b = torch.full((N,), size, dtype=torch.float16)
    x, info = gt.cg(lambda v: 2 * v, b)
    assert_close(x, b / 2)
    assert info.converged


def test_a_norm_beyond_the_dtype_is_not_taken_for_convergence():
    _, info = gt.cg(lambda v: 2 * v, torch.full((N,), 1e20, dtype=torch.float32))
    assert not info.converged


def test_a_number():
    x, info = gt.cg(lambda v: 2 * v, torch.tensor(3.0))
    assert_close(x, torch.tensor(1.5))
    assert info.converged


@pytest.mark.parametrize(
    ("b", "options", "words"),
    [
        (torch.ones(N, N), {}, r"\(12, 12\) and a right-hand side of shape \(12, 12\)"),
        (torch.ones(N, 2), {}, r"of shape \(12, 2\) make no system"),
        ({"b": torch.ones(N)}, {}, r"a right-hand side of type dict make no system"),
        (torch.ones(N), {"M": torch.ones(N, 2)}, r"\(12, 2\) and a right-hand side"),
        (torch.ones(N), {"batch_dims": 2}, "no 2 leading dimensions in common"),
        (torch.ones(N), {"batch_dims": -1}, "no -1 leading dimensions in common"),
        (torch.ones(N), {"damping": torch.ones(N)}, r"damping has shape \(12,\)"),
    ],
)
def test_what_makes_no_system_is_refused(A, b, options, words):
    with pytest.raises(gt.DefinitionError, match=words):
        gt.cg(A if options.get("batch_dims", 0) == 0 else lambda v: v, b, **options)
