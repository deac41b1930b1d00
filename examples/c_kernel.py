"""A kernel in C under a rule: ``out = alpha * x**2 + beta``, compiled here and now.

``external`` says what comes out and which dtype goes in; the rule is in C as well. The
first call with a gradient checks it on the kernel itself, in float32.
"""

import ctypes
import subprocess
import tempfile

import torch

import gradtools as gt

SOURCE = """
void forward(float *out, const float *x, float alpha, float beta, long n) {
    for (long i = 0; i < n; i++) out[i] = alpha * x[i] * x[i] + beta;
}
void backward(float *out, const float *x, const float *g, float alpha, long n) {
    for (long i = 0; i < n; i++) out[i] = 2 * alpha * x[i] * g[i];
}
"""


def compiled(source):
    """Compile C with the system's compiler, and load it."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/kernel.so"
        command = ["cc", "-O3", "-shared", "-fPIC", "-o", path, "-x", "c", "-"]
        subprocess.run(command, input=source, text=True, check=True)
        return ctypes.CDLL(path)


library = compiled(SOURCE)
POINTER, FLOAT, LONG = ctypes.c_void_p, ctypes.c_float, ctypes.c_long
library.forward.argtypes = [POINTER, POINTER, FLOAT, FLOAT, LONG]
library.backward.argtypes = [POINTER, POINTER, POINTER, FLOAT, LONG]


@gt.external(out=lambda g, x, alpha: torch.empty_like(x), dtypes=torch.float32)
def slope(g, x, alpha):
    out = torch.empty_like(x)
    library.backward(out.data_ptr(), x.data_ptr(), g.data_ptr(), alpha, x.numel())
    return out


@slope.def_bwd  # linear in g and in x: its derivative is itself
def _(residuals, c):
    (g, x, alpha), _ = residuals
    return slope(c, x, alpha), slope(c, g, alpha), None


@gt.external(out=lambda x, alpha, beta: torch.empty_like(x), dtypes=torch.float32)
def parabola(x, alpha, beta):
    out = torch.empty_like(x)
    library.forward(out.data_ptr(), x.data_ptr(), alpha, beta, x.numel())
    return out


@parabola.def_bwd
def _(residuals, g):
    (x, alpha, _), _ = residuals
    return slope(g, x, alpha), None, None


def main():
    x = torch.linspace(-2, 2, 5, dtype=torch.float32)
    loss = lambda x: parabola(x, 0.5, 1.0).sum()
    found = {
        "value": parabola(x, 0.5, 1.0),
        "vmap(grad)": torch.func.vmap(torch.func.grad(loss))(x),
        "hessian": torch.func.hessian(loss)(x).diagonal(),
    }
    print({name: value.tolist() for name, value in found.items()}, parabola.reports[0])
    return found


if __name__ == "__main__":
    main()
