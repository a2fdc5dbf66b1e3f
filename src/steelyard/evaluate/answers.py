"""The certificate of a derived network that is no language model: do it and its parent answer the same rows alike?"""

# R rows  C classes  D width

from __future__ import annotations

import msgspec
import torch

from steelyard import __version__
from steelyard.errors import FidelityError

LEAST_AGREEMENT = 0.97


class AnswersCertificate(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, against which parent, and whether it is within the threshold."""

    parent: str
    """Id of the model that this one was made of."""
    rows: int
    """Of a tagger: words."""
    agreement: float
    """Share of the rows for which both find the same class likeliest; of embeddings the mean cosine of both."""
    divergence: float
    """Mean KL(parent || derived) of the classes, nats; of embeddings 1 less the mean cosine."""
    divergence_max: float
    bytes_before: int
    bytes_after: int
    least_agreement: float
    passed: bool
    accepted: bool = False
    """Handed on past the threshold, because it was asked for."""
    code: str = f"steelyard {__version__}"

    def summary(self) -> str:
        """One line for people."""
        return (
            f"agrees with its parent by {self.agreement:.2%} over {self.rows} rows, divergence {self.divergence:.5f} "
            f"(at most {self.divergence_max:.4f}), bytes {self.bytes_before / 1e6:.2f} -> {self.bytes_after / 1e6:.2f} "
            f"MB ({self.bytes_after / self.bytes_before:.2f}x)"
        )

    def demand(self) -> None:
        """Refuse what is past its threshold and was not accepted.

        Raises:
            FidelityError: with the figures and what to do.
        """
        if not (self.passed or self.accepted):
            raise FidelityError(
                f"the compressed model is past its threshold ({self.least_agreement:.2%}): {self.summary()}; nothing "
                "was written. Use --accept to keep it all the same"
            )


def certify(
    before: torch.Tensor,
    after: torch.Tensor,
    *,
    vectors: bool,
    least_agreement: float = LEAST_AGREEMENT,
    accept: bool = False,
    parent: str,
    sizes: tuple[int, int],
) -> AnswersCertificate:
    """A certificate. A figure that is not a number never passes.

    Args:
        before: log-probabilities `[R, C]` by the parent, or (`vectors`) embeddings `[R, D]` of length 1.
        after: the same by the derived network.
        vectors: whether they are embeddings.
        least_agreement: what has to be reached.
        accept: hand it on past that.
        parent: its id.
        sizes: bytes of both.
    """
    if vectors:
        each = 1 - (before.double() * after.double()).sum(-1)
        agreement = float(1 - each.mean())
    else:
        p, q = before.double(), after.double()
        each = (p.exp() * (p - q)).where(p != -torch.inf, 0).sum(-1)  # what can never be said
        agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    passed = bool(agreement >= least_agreement) and bool(each.isfinite().all())
    return AnswersCertificate(
        parent=parent,
        rows=len(before),
        agreement=agreement,
        divergence=float(each.mean()),
        divergence_max=float(each.max()),
        bytes_before=sizes[0],
        bytes_after=sizes[1],
        least_agreement=least_agreement,
        passed=passed,
        accepted=accept and not passed,
    )
