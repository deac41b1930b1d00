"""A layer that is a fixed point, trained on digits: ``z = tanh(W z + U x + b)``.

Its derivative comes from the equation, not from the iterations that solved it: memory
does not grow with their number (S. Bai, J. Kolter and V. Koltun, "Deep equilibrium
models", 2019). W is kept small enough for the iteration to converge.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import gradtools as gt


def contraction(w):
    return 0.9 * w / torch.linalg.matrix_norm(w, 2).clamp(min=0.9)


def layer(z, p, x):
    return torch.tanh(z @ contraction(p["w"]).T + x @ p["u"].T + p["b"])


def iterated(init, p, x, steps=60):
    z, w, drive = init, contraction(p["w"]).T, x @ p["u"].T + p["b"]
    for _ in range(steps):
        z = torch.tanh(z @ w + drive)
    return z


equilibrium = gt.custom_fixed_point(layer)(iterated)


def loss(p, x, y, solve=equilibrium):
    z = solve(x.new_zeros(len(x), len(p["b"])), p, x)
    return F.cross_entropy(z @ p["v"].T, y)


def kept_by_forward(solve, p, x, y, steps):
    """Return the bytes that autograd keeps for a backward."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    leaves = {key: value.clone().requires_grad_() for key, value in p.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(leaves, x, y, solve(lambda *args: iterated(*args, steps)))
    return sum(kept.values())


def main(epochs=40, rate=0.5):
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images) / 16, torch.tensor(labels)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).double()
    p = {"w": draw(24, 24) / 8, "u": draw(24, 64) / 8, "v": draw(10, 24) / 5}
    p["b"] = torch.zeros(24).double()
    by_rule = gt.grad(loss)(p, x[:50], y[:50])
    by_unrolling = gt.grad(loss)(p, x[:50], y[:50], solve=lambda *a: iterated(*a, 200))
    gap = max((by_rule[key] - by_unrolling[key]).abs().max().item() for key in p)
    for _ in range(epochs):
        for rows in torch.randperm(1400, generator=generator).split(100):
            slope = gt.grad(loss)(p, x[rows], y[rows])
            p = {key: value - rate * slope[key] for key, value in p.items()}
    z = equilibrium(x.new_zeros(len(x), 24), p, x)
    right = ((z @ p["v"].T).argmax(1) == y)[1400:]
    found = {"gap": gap, "accuracy": right.double().mean().item()}
    rule = gt.custom_fixed_point(layer)
    for name, solve in (("rule", rule), ("unrolled", lambda solver: solver)):
        few, many = (kept_by_forward(solve, p, x[:50], y[:50], n) for n in (20, 200))
        found[f"memory of 200 steps over 20, {name}"] = many / few
    print(found)
    return found


if __name__ == "__main__":
    main()
