"""Domain adaptation by gradient reversal (Y. Ganin et al., 2016), on digits.

The labels of one domain are known, those of the other, faded and noisy, are not. A
second head tells the domains apart. Its gradient reaches the features reversed, so they
forget what it learns; the head itself gets it as it is.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import gradtools as gt

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
torch.manual_seed(0)
order = torch.randperm(len(y))
known, other = order[:900], order[900:]
faded = 0.6 - 0.5 * x[other] + 0.1 * torch.randn(len(other), 64)


def trained(reversal, seed):
    torch.manual_seed(seed)
    features = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
    classify, tell = nn.Linear(32, 10), nn.Linear(32, 1)
    parameters = [*features.parameters(), *classify.parameters(), *tell.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    for _ in range(40):
        for rows in torch.randperm(897).split(100):
            here, there = features(x[known[rows]]), features(faded[rows])
            domains = torch.tensor([0.0, 1.0]).repeat_interleave(len(rows))
            told = tell(reversal(torch.cat([here, there])))[:, 0]
            loss = F.cross_entropy(classify(here), y[known[rows]])
            loss = loss + F.binary_cross_entropy_with_logits(told, domains)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    right = classify(features(faded)).argmax(1) == y[other]
    return right.double().mean().item()


seeds = range(3)
without = [trained(gt.stop_gradient, seed) for seed in seeds]
reversed_ = [trained(gt.reverse_grad, seed) for seed in seeds]
print("accuracy on the other domain, of three runs each")
print("without", [f"{a:.1%}" for a in without])
print("with gradient reversal", [f"{a:.1%}" for a in reversed_])
