"""A rule becomes ``torch.autograd.Function`` classes."""
