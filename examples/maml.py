"""Few-shot learning of digits: MAML, by gradients of gradients.

A task is to tell three classes of digits apart from five images of each. The classes of
the last tasks were never seen before. The gradient goes through the steps of adaptation
(C. Finn, P. Abbeel and S. Levine, 2017).
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import gradtools as gt

SEEN, NEW = range(7), range(7, 10)


def tasks(classes, count, generator, shots=5):
    """Return images to adapt to and to be judged by, a row per task, and labels."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images) / 16
    rows = []
    for _ in range(count):
        order = torch.randperm(len(classes), generator=generator)
        parts = []
        for digit in torch.tensor(classes)[order[:3]]:
            (places,) = torch.where(torch.tensor(labels) == digit)
            order = torch.randperm(len(places), generator=generator)[: 2 * shots]
            parts.append(images[places[order]])
        x = torch.stack(parts)
        rows.append((x[:, :shots].flatten(0, 1), x[:, shots:].flatten(0, 1)))
    y = torch.arange(3).repeat_interleave(shots)
    return torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows]), y


def network(params, x):
    return torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params, x, y):
    return F.cross_entropy(network(params, x), y)


def adapted(params, x, y, steps=5, rate=0.5):
    for _ in range(steps):
        slope = gt.grad(loss)(params, x, y)
        params = {key: p - rate * slope[key] for key, p in params.items()}
    return params


def meta_loss(params, support, query, y):
    each = gt.vmap(lambda x, z: loss(adapted(params, x, y), z, y))
    return each(support, query).mean()


def accuracy(params, support, query, y):
    each = gt.vmap(lambda x, z: network(adapted(params, x, y), z).argmax(1) == y)
    return each(support, query).double().mean().item()


def main(steps=150, judged=100):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.2 * torch.randn(*shape, generator=generator).double()
    start = {"w1": draw(64, 32), "b1": draw(32), "w2": draw(32, 3), "b2": draw(3)}
    params = start
    for step in range(steps):
        batch = tasks(SEEN, 8, generator)
        value, slope = gt.value_and_grad(meta_loss)(params, *batch)
        params = {key: p - 0.3 * slope[key] for key, p in params.items()}
        if step % 50 == 0:
            print(f"step {step}: meta-loss {value.item():.3f}")
    new = tasks(NEW, judged, generator)
    found = {"random start": accuracy(start, *new), "learned": accuracy(params, *new)}
    print(found)
    return found


if __name__ == "__main__":
    main()
