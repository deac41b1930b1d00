"""Real kernels: C through ctypes, C++ extensions, scipy, Triton; the examples."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients

EXAMPLES = Path(__file__).parents[2] / "examples"

needs_cc = pytest.mark.skipif(
    not (shutil.which("cc") or shutil.which("gcc")), reason="no C compiler"
)
needs_cxx = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)

    def load(name):
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


@needs_cc
class TestC:
    @pytest.fixture
    def c(self, example):
        return example("c_kernel")

    def test_the_example_shows_what_it_promises(self, c, capsys):
        found = c.main()
        x = torch.linspace(-2, 2, 5, dtype=torch.float32)
        assert_close(found["value"], 0.5 * x**2 + 1)
        assert_close(found["vmap(grad)"], x)
        assert_close(found["hessian"], torch.ones_like(x))
        assert "passed in" in capsys.readouterr().out
        assert {report.outcome for report in c.parabola.reports} == {"passed"}
        asked = {e.question: e for e in c.parabola.reports[0].evidence}
        error = asked["derivative in x by differences"].error
        assert 1e-9 < error < 1e-2  # in float32: the kernel takes no other

    def test_what_must_not_be_possible(self, c):
        """A gradient that nobody has compared with the kernel."""

        @gt.external(out=c.parabola.kernel.out, dtypes=torch.float32)
        def parabola(x, alpha, beta):
            return c.parabola.kernel.function(x, alpha, beta)

        @parabola.def_bwd
        def _(residuals, g):
            (x, alpha, _), _ = residuals
            return c.slope(g, x, alpha / 2), None, None  # the 2 of 2x forgotten

        x = torch.linspace(-2, 2, 5, dtype=torch.float32).requires_grad_()
        with pytest.raises(gt.GradientMismatchError, match=r"0\.5.* times what it"):
            parabola(x, 0.5, 1.0)

    def test_another_dtype_does_not_reach_it(self, c):
        x = torch.linspace(-2, 2, 5, dtype=torch.float64)
        with pytest.raises(gt.DefinitionError, match="does not take this dtype"):
            c.parabola(x, 0.5, 1.0)

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_a_compiled_training_step(self, c, backend):
        """The rule is a marker: ten times the derivative."""

        @gt.external(out=c.parabola.kernel.out, dtypes=torch.float32)
        def parabola(x, alpha, beta):
            return c.parabola.kernel.function(x, alpha, beta)

        @parabola.def_bwd
        def _(residuals, g):
            (x, alpha, _), _ = residuals
            return c.slope(g, x, 10 * alpha), None, None

        x = torch.linspace(-2, 2, 7, dtype=torch.float32).requires_grad_()
        step = torch.compile(
            lambda x: parabola(x, 0.5, 1.0).sum(), fullgraph=True, backend=backend
        )
        with gt.gradcheck_policy("off"):
            assert_close(gradients(step(x), x)[0], 10 * x.detach())


CPP = """
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/pybind.h>
#include <cmath>

at::Tensor soft(const at::Tensor& x, double k) {
    auto out = at::empty_like(x);
    const double* from = x.data_ptr<double>();
    double* to = out.data_ptr<double>();
    for (int64_t i = 0; i < x.numel(); i++)
        to[i] = from[i] / (1 + k * std::abs(from[i]));
    return out;
}
PYBIND11_MODULE(soft_ext, m) { m.def("soft", &soft); }
"""  # torch/extension.h would do as well, in three times the time


@needs_cxx
def test_a_cpp_extension(tmp_path):
    """Built by setuptools in a process of its own: this one has no ninja to ask for."""
    (tmp_path / "soft.cpp").write_text(CPP)
    (tmp_path / "setup.py").write_text(
        "from setuptools import setup\n"
        "from torch.utils.cpp_extension import BuildExtension, CppExtension\n"
        "setup(name='soft_ext', ext_modules=[CppExtension('soft_ext', ['soft.cpp'],\n"
        "    extra_compile_args=['-O0'])],\n"
        "    cmdclass={'build_ext': BuildExtension.with_options(use_ninja=False)})\n"
    )
    built = subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"CC": "g++", "CXX": "g++"},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    sys.path.insert(0, str(tmp_path))
    try:
        extension = importlib.import_module("soft_ext")
    finally:
        sys.path.remove(str(tmp_path))
    soft = gt.external(extension.soft, out=lambda x, k: torch.empty_like(x))

    @soft.def_bwd
    def _(residuals, g):
        (x, k), _ = residuals
        return g / (1 + k * x.abs()) ** 2, None

    x = torch.linspace(-2, 2, 5).requires_grad_()
    right = 1 / (1 + 0.5 * x.detach().abs()) ** 2
    assert_close(gradients(soft(x, 0.5), x)[0], right)
    assert soft.reports[0].outcome == "passed"
    each = torch.func.vmap(torch.func.grad(lambda x: soft(x, 0.5)))
    assert_close(each(x.detach()), right)
    step = torch.compile(
        torch.func.grad(lambda x: soft(x, 0.5).sum()),
        fullgraph=True,
        backend="aot_eager",
    )
    assert_close(step(x.detach()), right)


def test_numpy_and_scipy(example):
    module = example("numpy_kernel")
    found = module.main()
    assert found.pop("interpolation") == "passed"
    assert max(found.values()) < 1e-15
    bands, b = torch.tensor([[0.0, 1, 1], [4, 4, 4], [1, 1, 0]]), torch.randn(2, 3)
    solved = torch.func.vmap(module.solve_tridiagonal, (None, 0))(bands, b)
    assert_close(solved @ module.dense(bands).T, b)


def test_a_simulator_with_an_approximate_gradient(example, capsys):
    errors, refused = example("simulator").main()
    assert set(errors) == {"error in speed", "error in angle"}
    assert all(0.02 < error < 0.06 for error in errors.values())
    assert "budget 1.0e-01" in capsys.readouterr().out
    assert isinstance(refused, gt.GradientMismatchError)
    assert "outside the budget of its contract" in refused.what


def test_the_triton_example_says_where_it_did_not_run(example, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = example("triton_kernel")
    if module.MISSING is None:
        pytest.skip("there is a CUDA device: test_triton runs it")
    assert module.main() is None
    assert capsys.readouterr().out in (
        "not run: no CUDA device\n",
        "not run: no triton\n",
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton(example):
    found = example("triton_kernel").main()
    assert max(found.values()) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_arrays_of_tensors_on_a_gpu_are_copies():
    square = gt.external(lambda x: x**2, out=torch.empty_like, numpy=True)
    square.def_bwd(lambda residuals, g: 2 * g * residuals[0][0])
    x = torch.linspace(-1, 1, 5, device="cuda").requires_grad_()
    out = square(x)
    assert out.is_cuda
    assert_close(gradients(out, x)[0], 2 * x.detach())
