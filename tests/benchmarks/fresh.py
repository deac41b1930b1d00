"""One fresh process of the benchmark ``start``: ``python -m tests.benchmarks.fresh``.

It imports nothing before it looks at the clock but torch, for whatever else it imported
would be there already when gradtools asks for it.
"""

import gc
import sys
import time

import torch


def milliseconds_since(begin):
    """Return what it says."""
    return (time.perf_counter() - begin) * 1e3


def state(gt):
    """State a rule."""

    @gt.custom_vjp
    def swish(x, beta):
        return x * torch.sigmoid(beta * x)

    @swish.def_fwd
    def _(x, beta):
        s = torch.sigmoid(beta * x)
        return x * s, (x, beta, s)

    @swish.def_bwd
    def _(residuals, g):
        x, beta, s = residuals
        ds = s * (1 - s)
        return g * (s + x * beta * ds), (g * x * x * ds).sum()

    return swish


def main():
    """Measure, and print what was found as JSON."""
    torch.set_num_threads(1)
    # Python looks through all that torch has made, 90 ms, once in 70,000 new objects:
    # where that falls is chance, and it is had before the clock starts.
    gc.collect()
    before = set(sys.modules)
    begin = time.perf_counter()
    import gradtools as gt

    found = {"import": milliseconds_since(begin)}
    loaded = set(sys.modules) - before
    begin = time.perf_counter()
    rule = state(gt)
    found["definition"] = milliseconds_since(begin)
    begin = time.perf_counter()
    unchecked = state(gt)
    found["again"] = milliseconds_since(begin)
    found["dynamo"] = sum(name.startswith("torch._dynamo") for name in sys.modules)
    known = {"gradtools", *sys.stdlib_module_names}
    found["foreign"] = sorted(
        name for name in loaded if name.partition(".")[0] not in known
    )
    x, beta = torch.ones(4, requires_grad=True), torch.tensor(1.0)
    torch.sigmoid(beta * x).sum().backward()  # autograd's own first time
    with gt.gradcheck_policy("off"):
        begin = time.perf_counter()
        unchecked(x, beta)
        found["unchecked call"] = milliseconds_since(begin)
    begin = time.perf_counter()
    rule(x, beta)
    found["first call"] = milliseconds_since(begin)

    import json

    print(json.dumps(found))


if __name__ == "__main__":
    main()
