"""Domain adaptation by gradient reversal (Y. Ganin et al., 2016), on digits.

The classifier sees labels of clean digits only, and is judged on inverted ones with
noise. A second head tells the domains apart; the reversed gradient makes the features
forget what it learns. For the head it is the plain gradient.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import gradtools as gt

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
torch.manual_seed(0)
clean, other = x[:900], x[900:] * 0.5 + 0.3 + 0.1 * torch.randn(897, 64)
