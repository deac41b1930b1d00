"""Real kernels; those of the examples are in ``tests/gallery``."""

import importlib
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.rules.stating import gradients

needs_cxx = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_arrays_of_tensors_on_a_gpu_are_copies():
    square = gt.external(lambda x: x**2, out=torch.empty_like, numpy=True)
    square.def_bwd(lambda residuals, g: 2 * g * residuals[0][0])
    x = torch.linspace(-1, 1, 5, device="cuda").requires_grad_()
    out = square(x)
    assert out.is_cuda
    assert_close(gradients(out, x)[0], 2 * x.detach())
