"""What pruning and rounding by second order share: how a change of one weight is made good by others (Hassibi and Stork
1993; Frantar and Alistarh 2022).
"""

# M inputs

from __future__ import annotations

import torch

DAMPING = 0.01
"""Added to the diagonal, of its mean."""


def inverse_factor(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """U with U^T U the inverse of the damped `gram`: `[M, M]`, upper."""
    damped = gram.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += damping * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
