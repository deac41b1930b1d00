"""Diagonals, traces and eigenvalues, against the matrix."""

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from gradtools.second_order.operators import CurvatureOperator

N = 40


def generator(seed=0):
    return torch.Generator(torch.empty(()).device).manual_seed(seed)


def matrix(decay):
    """Return a symmetric matrix whose eigenvalues fall like a power."""
    basis = torch.linalg.qr(torch.randn(N, N, generator=generator()))[0]
    values = torch.arange(1, N + 1).to(torch.float64) ** -decay
    return basis @ torch.diag(values) @ basis.T


def quadratic(A):
    return lambda x: x @ A @ x / 2


def trace(A, method, samples, seed):
    return gt.hessian_trace(
        quadratic(A),
        torch.zeros(N),
        method=method,
        samples=samples,
        generator=generator(seed),
    )


def test_an_exact_diagonal_in_the_structure_of_the_primals():
    def f(d, y):
        return (d["a"] ** 3).sum() * y + (d["a"] * y**2).sum()

    d, y = {"a": torch.randn(3, 50)}, torch.tensor(2.0)
    value, stderr = gt.hessian_diag(f, d, y)
    assert_close(value[0]["a"], 6 * d["a"] * y)
    assert_close(value[1], 2 * d["a"].sum())
    assert (stderr[0]["a"] == 0).all()


def test_an_exact_trace():
    A = matrix(1.0)
    value, stderr = gt.hessian_trace(quadratic(A), torch.zeros(N), method="exact")
    assert_close(value, A.trace())
    assert stderr == 0


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_an_estimated_trace_is_unbiased_and_its_error_honest(method):
    A = matrix(0.5)
    found = [trace(A, method, 18, seed) for seed in range(300)]
    values = torch.stack([estimate.value for estimate in found])
    errors = torch.stack([estimate.stderr for estimate in found])
    assert abs(values.mean() - A.trace()) < 4 * values.std() / len(found) ** 0.5
    assert 0.6 < errors.square().mean().sqrt() / values.std() < 1.7


def test_low_rank_methods_are_better_where_the_spectrum_decays():
    A = matrix(2.0)
    spread = {
        method: torch.stack([trace(A, method, 24, seed).value for seed in range(100)])
        .sub(A.trace())
        .square()
        .mean()
        for method in ("hutchinson", "hutch++", "xtrace")
    }
    assert spread["hutch++"] < spread["hutchinson"] / 20
    assert spread["xtrace"] < spread["hutch++"]


@pytest.mark.parametrize(("method", "samples"), [("hutch++", 3 * N), ("xtrace", 2 * N)])
def test_with_products_enough_they_are_exact(method, samples):
    A = matrix(1.0)
    assert_close(trace(A, method, samples, 0).value, A.trace())


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_the_number_of_products_is_kept(method, monkeypatch):
    count = 0
    block = CurvatureOperator.block

    def counted(self, *vectors, **options):
        nonlocal count
        count += len(vectors[0])
        return block(self, *vectors, **options)

    monkeypatch.setattr(CurvatureOperator, "block", counted)
    trace(matrix(1.0), method, 20, 0)
    assert count <= 20


def test_an_estimated_diagonal_and_its_error():
    A = matrix(0.5)
    value, stderr = gt.hessian_diag(
        quadratic(A),
        torch.zeros(N),
        method="hutchinson",
        samples=400,
        generator=generator(),
    )
    off = (value - A.diagonal()) / stderr
    assert off.abs().max() < 5
    assert 0.6 < off.std() < 1.6


def test_a_generator_makes_it_repeatable():
    A = matrix(1.0)
    assert trace(A, "xtrace", 10, 3) == trace(A, "xtrace", 10, 3)
    assert trace(A, "xtrace", 10, 3) != trace(A, "xtrace", 10, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "hutch"}, "there is no method 'hutch'"),
        ({"method": "xtrace", "samples": 3}, "was given 3 samples"),
        ({"samples": 1.5}, "was given 1.5 samples"),
    ],
)
def test_what_cannot_be_estimated_is_refused(options, words):
    with pytest.raises(gt.DefinitionError, match=words):
        gt.hessian_trace(quadratic(matrix(1.0)), torch.zeros(N), **options)
    with pytest.raises(gt.DefinitionError, match="no method 'xtrace'"):
        gt.hessian_diag(quadratic(matrix(1.0)), torch.zeros(N), method="xtrace")


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
@pytest.mark.parametrize("which", ["LA", "SA"])
def test_eigenvalues_and_vectors(method, which):
    A = matrix(1.0) - 0.3 * torch.eye(N)
    values, vectors = gt.hessian_eigs(
        lambda d: quadratic(A)(d["x"].flatten()),
        {"x": torch.zeros(4, 10)},
        k=3,
        which=which,
        method=method,
        generator=generator(),
    )
    exact = torch.linalg.eigvalsh(A)
    assert_close(
        values, exact.flip(0)[:3] if which == "LA" else exact[:3], atol=1e-5, rtol=1e-5
    )
    for value, vector in zip(values, vectors["x"], strict=True):
        flat = vector.flatten()
        assert_close(A @ flat, value * flat, atol=1e-4, rtol=1e-4)
        assert_close(flat.norm(), torch.tensor(1.0))


def test_the_largest_in_absolute_value_of_a_small_one():
    A = torch.diag(torch.tensor([1.0, -5.0, 2.0]))
    values, _ = gt.hessian_eigs(quadratic(A), torch.zeros(3), k=2, which="LM")
    assert_close(values, torch.tensor([-5.0, 2.0]))


def test_eigenvalues_that_do_not_converge_are_an_error():
    with pytest.raises(gt.TransformError, match=r"of 5 eigenvalues converged"):
        gt.hessian_eigs(quadratic(matrix(0.1)), torch.zeros(N), k=5, maxiter=1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k is 0, and there are 40 eigenvalues"),
        ({"which": "SM"}, "there is no 'SM'"),
        ({"method": "lobpcg", "which": "LM"}, "finds the largest or the smallest"),
    ],
)
def test_what_eigenvalues_cannot_be_asked_for(options, words):
    with pytest.raises(gt.DefinitionError, match=words):
        gt.hessian_eigs(quadratic(matrix(1.0)), torch.zeros(N), **options)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("samples", [8, 20, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_of_low_rank_has_its_trace_exactly(rank, samples, dtype):
    W = torch.randn(N, rank, dtype=dtype, generator=generator())
    value, stderr = gt.hessian_trace(
        lambda x: (x @ W).square().sum() / 2 + x.sum(),
        torch.zeros(N, dtype=dtype),
        method="xtrace",
        samples=samples,
        generator=generator(1),
    )
    assert_close(value, W.square().sum())
    assert stderr <= 1e-4


WEIGHTS = torch.arange(100.0, dtype=torch.float64)


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(("sign", "which"), [(-1, "LA"), (1, "SA")])
def test_what_is_mapped_to_zero_is_among_the_eigenvalues(method, k, sign, which):
    f = lambda x: sign * (WEIGHTS * x**2).sum() / 2  # the first parameter is dead
    values, vectors = gt.hessian_eigs(
        f, torch.randn(100), k=k, which=which, method=method, generator=generator()
    )
    assert_close(values, sign * WEIGHTS[:k], atol=1e-6, rtol=1e-6)
    assert vectors[0, 0].abs() > 1 - 1e-6


@pytest.mark.parametrize("method", ["lanczos", "lobpcg"])
@pytest.mark.parametrize(("k", "which"), [(1, "LA"), (3, "SA"), (33, "LA")])
def test_a_hessian_of_zeros_has_eigenvalues_too(method, k, which):
    values, vectors = gt.hessian_eigs(
        torch.sum, torch.zeros(100), k=k, which=which, method=method
    )
    assert (values == 0).all()
    assert_close(vectors @ vectors.T, torch.eye(k))


@pytest.mark.parametrize("size", [4, 100])
def test_a_hessian_that_is_not_finite_is_an_error(size):
    with pytest.raises(gt.TransformError, match="are not finite"):
        gt.hessian_eigs(lambda x: (x**1.5).sum(), torch.zeros(size))


def test_complex_numbers_have_no_matrix():
    z = torch.randn(3, dtype=torch.complex128)
    for estimate in (gt.hessian_diag, gt.hessian_trace, gt.hessian_eigs):
        with pytest.raises(gt.DefinitionError, match="linear over the real ones alone"):
            estimate(lambda z: (z**3).sum().real, z)


def test_no_numbers_at_all():
    x = torch.zeros(0)
    assert gt.hessian_diag(torch.sum, x).value.shape == (0,)
    for method in ("exact", "hutchinson", "hutch++", "xtrace"):
        assert gt.hessian_trace(torch.sum, x, method=method).value == 0


def test_an_error_of_arpack_says_in_which_dtype(monkeypatch):
    linalg = pytest.importorskip("scipy.sparse.linalg")

    def fail(*args, **kwargs):
        raise linalg.ArpackError(-9999)

    monkeypatch.setattr(linalg, "eigsh", fail)
    with pytest.raises(gt.TransformError, match="Lanczos failed in float64: ARPACK"):
        gt.hessian_eigs(quadratic(matrix(1.0)), torch.zeros(N))
