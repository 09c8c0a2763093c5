"""Distillation losses from stored top-k labels: the KL of many classification heads at once, with its gradient.

    >>> import torch
    >>> from repcon_kernels import HeadSpec, multi_head_kl
    >>> heads = [HeadSpec(start=0, classes=10, k=2), HeadSpec(start=10, classes=4, k=4, temperature=2.0, tail_column=1)]
    >>> logits = torch.zeros(3, 14, requires_grad=True)                       # one linear layer for all heads
    >>> ids = [torch.tensor([[7, 1]] * 3), torch.tensor([[2, 0, 1, 3]] * 3)]    # by falling probability
    >>> logp = [                                                               # k log-probabilities, then log-tails
    ...     torch.tensor([[0.5, 0.3, 0.2]] * 3).log(),
    ...     torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0, 0.0]] * 3).log(),          # all classes stored: no tail
    ... ]
    >>> losses = multi_head_kl(logits, heads, ids, logp, weights=torch.ones(2))
    >>> losses.sum().backward()
    >>> [round(loss, 4) for loss in losses.tolist()], logits.grad.shape
    ([0.857, 0.1222], torch.Size([3, 14]))

The "reference" implementation defines the loss; "torch" and "triton" are fast. `cut_crops` crops and resizes decoded
images. The package works on tensors alone. Importing it does not import Triton.
"""

from repcon_kernels.crop_resize import cut_crops
from repcon_kernels.functional import IMPLEMENTATIONS, multi_head_kl
from repcon_kernels.kl_div.heads import LOG_TAIL_FLOOR, TAILS, HeadSpec
from repcon_kernels.linear_kl_div import linear_kl

__all__ = ["IMPLEMENTATIONS", "LOG_TAIL_FLOOR", "TAILS", "HeadSpec", "cut_crops", "linear_kl", "multi_head_kl"]
