"""How many tokens go through a network for an explanation, at most: what is reserved before. No torch.

A pass back counts as two more; rows that are alike are computed once, so it may be less.
"""

from __future__ import annotations

from steelyard.infer.request import Explain

INTEGRAL = 16
"""Places on the way from nothing to the input where integrated gradients looks."""
GRID = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the units that have gone or come, where faithfulness is measured."""
DRAWN = 3
"""Random orders beside that of an explanation."""
MOST = 1 << 18
"""Tokens of one explanation: minutes of a small model."""


def most(explain: Explain, tokens: int, units: int | None = None) -> int:
    """Of an input of so many tokens, its answer included, in so many units at the most; None: as many as tokens."""
    passes = {
        "lrp": 3,
        "gradient_x_input": 3,
        "integrated_gradients": 3 * (INTEGRAL + 2),
        "occlusion": (tokens if units is None else units) + 2,
        "random": 0,
    }[explain.method]
    if explain.faithfulness:
        passes += 2 * (1 + DRAWN) * len(GRID)
    wanted = explain.target is None and not explain.answer
    back = explain.method in ("lrp", "gradient_x_input", "integrated_gradients")
    seen = 3 if explain.lens and not back else 0
    return (passes + wanted + seen) * tokens
