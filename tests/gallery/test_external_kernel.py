"""Kernels in C, of numpy and scipy, and in Triton: no gradient without numbers."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import gradtools as gt
from tests.gallery.conftest import EXAMPLES

needs_cc = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


@pytest.fixture
def c(gallery):
    return gallery("c_kernel")


def around(external, bwd):
    """Return a new external around the kernel of one, with another rule."""
    kernel = external.kernel
    new = gt.external(kernel.function, out=kernel.out, dtypes=torch.float32)
    new.def_bwd(bwd)
    return new


def points():
    return torch.linspace(-2, 2, 5)


@needs_cc
class TestC:
    def test_value_gradient_of_each_and_hessian(self, c):
        found, x = c["main"](), points()
        assert_close(found["value"], 0.5 * x**2 + 1)
        assert_close(found["vmap(grad)"], x)
        assert_close(found["hessian"], torch.ones_like(x))

    def test_the_figures_of_the_kernel_itself_are_in_the_report(self, c, capsys):
        c["main"]()
        report = c["parabola"].reports[0]
        assert report.outcome == "passed"
        assert str(report) in capsys.readouterr().out
        asked = {e.question: e.error for e in report.evidence}
        error = asked["derivative in x by differences"]
        assert 1e-9 < error < 1e-4  # of float32, for the kernel takes no other

    @pytest.mark.parametrize(
        ("factor", "says"),
        [
            (0.5, r"it is 0\.5\d* times what it should be"),  # the 2 of 2x forgotten
            (-1, "it has the wrong sign"),
            (1.02, r"it is 1\.02\d* times what it should be"),
        ],
    )
    def test_a_wrong_bwd_in_c_is_an_error_with_figures(self, c, factor, says):
        def bwd(residuals, g):
            (x, alpha, _), _ = residuals
            return c["slope"](g, x, factor * alpha), None, None

        wrong = around(c["parabola"], bwd)
        with pytest.raises(gt.GradientMismatchError, match=says) as caught:
            wrong(points().requires_grad_(), 0.5, 1.0)
        element, direction = caught.value.violations
        place = int(element.where.removeprefix("args.x[").removesuffix("]"))
        right, said = (
            float(text.partition(",")[0]) for text in (element.expected, element.got)
        )
        assert said / right == pytest.approx(factor, rel=1e-2)
        assert abs(right) < 1.6 * abs(points()[place])  # 2 alpha x, a cotangent to 1.5
        assert "by differences" in direction.expected
        assert "of its size (allowed: " in direction.got

    def test_a_wrong_kernel_for_bwd_is_found_where_torch_code_is_right(self, c):
        """The C itself is wrong: n numbers are asked for, one less is written."""

        def bwd(residuals, g):
            (x, alpha, _), _ = residuals
            out = torch.zeros_like(x)
            pointers = (t.data_ptr() for t in (out, x, g.contiguous()))
            c["library"].backward(*pointers, alpha, x.numel() - 1)
            return out, None, None

        with pytest.raises(gt.GradientMismatchError, match=r"args\.x is not the deri"):
            around(c["parabola"], bwd)(points().requires_grad_(), 0.5, 1.0)

    def test_the_full_check_tells_half_a_percent_in_single_precision(self, c):
        def bwd(residuals, g):
            (x, alpha, _), _ = residuals
            return c["slope"](g, x, 1.005 * alpha), None, None

        with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
            around(c["parabola"], bwd).gradcheck(points(), 0.5, 1.0)

    def test_a_second_derivative_that_got_lost_is_an_error(self, c):
        def bwd(residuals, g):
            (x, alpha, _), _ = residuals
            return c["slope"](g, x.detach(), alpha), None, None

        parabola = around(c["parabola"], bwd)
        first = torch.func.grad(lambda x: parabola(x, 0.5, 1.0).sum())
        with pytest.raises(gt.TransformError, match="bwd cannot be differentiated"):
            torch.func.grad(lambda x: first(x).sum())(points())

    def test_without_a_check_the_report_says_so(self, c):
        wrong = around(c["parabola"], lambda residuals, g: (g, None, None))
        with gt.gradcheck_policy("off"):
            wrong(points().requires_grad_(), 0.5, 1.0)
        (report,) = wrong.reports
        assert report.outcome == "not checked"
        assert "the policy is off" in str(report)

    def test_another_dtype_does_not_reach_it(self, c):
        with pytest.raises(gt.DefinitionError, match="does not take this dtype"):
            c["parabola"](points().double(), 0.5, 1.0)

    @pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
    def test_a_compiled_training_step(self, c, backend):
        """The rule is a marker: ten times the derivative."""

        def bwd(residuals, g):
            (x, alpha, _), _ = residuals
            return c["slope"](g, x, 10 * alpha), None, None

        parabola, x = around(c["parabola"], bwd), points().requires_grad_()
        step = torch.compile(
            lambda x: parabola(x, 0.5, 1.0).sum(), fullgraph=True, backend=backend
        )
        with gt.gradcheck_policy("off"):
            (gradient,) = torch.autograd.grad(step(x), x)
        assert_close(gradient, 10 * x.detach())

    def test_the_script_says_nothing_else(self):
        """No warning that something was left unchecked, in single precision."""
        # torch 2.15 shows that its own torch.jit.script is deprecated.
        options = ["-W", "error::UserWarning", "-W", "ignore::FutureWarning"]
        ran = subprocess.run(
            [sys.executable, *options, EXAMPLES / "c_kernel.py"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stderr == ""
        assert "passed in" in ran.stdout


@pytest.fixture
def of_numpy(gallery):
    return gallery("numpy_kernel")


def test_the_banded_solver_is_the_dense_one_to_second_order(of_numpy):
    found = of_numpy["main"]()
    assert found.pop("interpolation") == "passed"
    assert set(found) == {f"{n}, gap to the dense solver" for n in ("grad", "hessian")}
    assert max(found.values()) < 1e-15
    bands, b = torch.tensor([[0.0, 1, 1], [4, 4, 4], [1, 1, 0]]), torch.randn(2, 3)
    solved = torch.func.vmap(of_numpy["solve_tridiagonal"], (None, 0))(bands, b)
    assert_close(solved @ of_numpy["dense"](bands).T, b)


def test_the_interpolation_has_the_gradients_of_its_formula(of_numpy):
    x, xs, ys = torch.rand(7).double(), torch.rand(5).sort()[0].double(), torch.rand(5)
    ys = ys.double()
    left = (torch.searchsorted(xs, x) - 1).clamp(0, 3)

    def formula(x, xs, ys):
        share = (x - xs[left]) / (xs[left + 1] - xs[left])
        return ys[left] + share.clamp(0, 1) * (ys[left + 1] - ys[left])

    found, right = (
        torch.func.grad(lambda *args: f(*args).sin().sum(), (0, 1, 2))(x, xs, ys)
        for f in (of_numpy["interpolated"], formula)
    )
    assert_close(found, right)
    assert_close(of_numpy["interpolated"](x, xs, ys), formula(x, xs, ys))


def test_the_solver_itself_for_its_transpose_is_refused(of_numpy):
    solve = of_numpy["solve_tridiagonal"]
    wrong = gt.external(solve.kernel.function, out=solve.kernel.out, numpy=True)

    @wrong.def_bwd
    def _(residuals, g):
        (bands, _), x = residuals
        b_bar = wrong(bands, g)  # A^-1 g, and not A^-T g
        return -of_numpy["bands_of_outer_product"](b_bar, x), b_bar

    bands = torch.tensor([[0.0, 1, 2], [4, 5, 6], [0.5, 0.1, 0]], dtype=torch.float64)
    b = torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(gt.GradientMismatchError, match=r"args\.b is not the derivat"):
        wrong(bands, b)


def test_the_triton_script_says_where_it_did_not_run():
    environment = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "triton_kernel.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "not run: no CUDA device\n"


class TestTriton:
    """On a CUDA device, or on Triton's interpreter, as the script itself."""

    @pytest.fixture
    def triton(self, gallery):
        names = gallery("triton_kernel")
        if names["MISSING"]:
            pytest.skip(names["MISSING"])
        return names

    def test_the_gradients_are_those_of_torch(self, triton):
        assert max(triton["main"]().values()) < 1e-4

    def test_a_wrong_gradient_is_refused(self, triton):
        wrong = gt.external(
            triton["swiglu"].kernel.function,
            out=lambda a, b: a,
            vmap="broadcast_all",
        )
        wrong.def_bwd(lambda r, g: triton["swiglu_backward"](g, *r[0])[::-1])
        a, b = torch.randn(2, 3, 100, device=triton["DEVICE"], requires_grad=True)
        with pytest.raises(gt.GradientMismatchError, match="not the derivative"):
            wrong(a, b)
