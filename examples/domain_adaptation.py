"""Features that forget: gradient reversal (Y. Ganin et al., 2016), on digits.

Half of the digits come from another scanner, with twice the contrast. A second head
tells the scanners apart; its gradient reaches the features reversed, so they forget
what the head learns, and keep what names the digit. The head gets its own as it is.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

import gradtools as gt

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
torch.manual_seed(0)
scanner = torch.randint(2, (len(y),))
x = x * (1 + scanner[:, None])
train, test = slice(0, 1200), slice(1200, None)


def trained(reversal):
    """Return how well features serve to name the digit, and to tell the scanner."""
    torch.manual_seed(1)
    features = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16), nn.Tanh())
    names = nn.Linear(16, 10)
    tells = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    network = nn.ModuleList([features, names, tells])
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(40):
        for rows in torch.randperm(1200).split(100):
            z = features(x[rows])
            loss = F.cross_entropy(names(z), y[rows])
            loss = loss + F.cross_entropy(tells(reversal(z)), scanner[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    z = features(x).detach()
    probe = LogisticRegression(C=100, max_iter=2000).fit(z[train], scanner[train])
    right = names(z[test]).argmax(1) == y[test]
    return right.double().mean().item(), probe.score(z[test], scanner[test])


found = {"as it is": trained(lambda z: z), "reversed": trained(gt.reverse_grad)}
for name, (digit, told) in found.items():
    print(
        f"gradient {name}: digit {digit:.1%}, scanner told by a fresh probe {told:.1%}"
    )
