"""How many tokens go through a network for an explanation, at most: what is reserved before. No torch.

A pass back counts as two more; rows that are alike are computed once, so it may be less.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from steelyard.errors import RequestError
from steelyard.infer.request import Explain

INTEGRAL = 16
"""Places on the way from nothing to the input where integrated gradients looks."""
GRID = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the units that have gone or come, where faithfulness is measured."""
DRAWN = 3
"""Random orders beside that of an explanation."""
MOST = 1 << 18
"""Tokens that one explanation computes: minutes of a small model."""
MOST_OWN = 32
"""Tokens of an answer of the model's own."""
LONGEST = 1024
"""Of an input, its answer included: a pass over a block or a window is a piece, which nobody interrupts, and scores of
attention are held whole."""
MOST_ANSWER = 256
"""Tokens of an answer."""


def check(explain: Explain, tokens: int, units: int | None = None, param: str = "input") -> int:
    """`most`, of an input that is not too large: `tokens` with the longest answer.

    Raises:
        RequestError: it is; the field is named.
    """
    check_answers([explain.answer], "target")
    check_answers(explain.against, "against")
    if tokens > LONGEST:
        reason = f"{tokens} tokens, {LONGEST} are explained at the most: shorten it"
        raise RequestError(reason, param=param, code="context_length_exceeded")
    count = most(explain, tokens, units)
    if count > MOST:
        advice = "take the method 'lrp'" if explain.method != "lrp" else "say 'faithfulness': false"
        reason = f"the explanation would compute {count} tokens, {MOST} are the limit: shorten the input, or {advice}"
        raise RequestError(reason, param=param, code="context_length_exceeded")
    return count


def longest_answer(explain: Explain) -> int:
    """Tokens of the longest answer that is explained or compared with."""
    own = 0 if explain.answer or explain.against or explain.target is not None else explain.own
    return max(own, *map(len, (explain.answer, *explain.against)))


def fitting_own(explain: Explain, tokens: int, context: int) -> int:
    """How many tokens of an answer of its own fit after a prompt of so many, what is computed of them included."""
    own = max(1, min(MOST_OWN, LONGEST - tokens, context - tokens + 1))
    while own > 1 and most(msgspec.structs.replace(explain, own=own), tokens + own) > MOST:
        own //= 2
    return own


def check_answers(answers: Sequence[Sequence[int]], param: str) -> None:
    """Raises RequestError: one is too long to be explained, or compared with."""
    longest = max(map(len, answers), default=0)
    if longest > MOST_ANSWER:
        reason = f"the answer has {longest} tokens; {MOST_ANSWER} are explained at the most"
        raise RequestError(reason, param=param, code="context_length_exceeded")


def in_windows(tokens: int, window: int | None, around: int) -> int:
    """Tokens of a text that is read in windows, what stands around each of them counted every time."""
    if window is None or tokens <= window:
        return tokens
    inside = max(1, window - around)
    return tokens + around * (-(-(tokens - around) // inside) - 1)


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
    wanted = 0 if explain.answer or explain.target is not None else len(explain.against) or max(1, explain.own)
    back = explain.method in ("lrp", "gradient_x_input", "integrated_gradients")
    seen = 3 if explain.lens and not back else 0
    compared = sum(len(prompt) + len(answer) for prompt, answer in explain.rows)
    return (passes + wanted + seen + bool(explain.rows)) * tokens + compared
