"""The fidelity certificate: how far a derived model has moved from the one that it was made of.

Both read the golden texts that ship with the package; compared are their distributions at every token. Past a
threshold the step that made the model refuses to hand it on.
"""

# T tokens  V vocabulary

from __future__ import annotations

import json
import math
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import torch

from steelyard import __version__
from steelyard.checkpoint import manifest
from steelyard.data.rows import TokenRow
from steelyard.errors import CheckpointError, FidelityError
from steelyard.evaluate.answers import LEAST_AGREEMENT
from steelyard.evaluate.likelihood import packs
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.text.tokenizer import Tokenizer

MAX_TOKENS = 512
LOGITS = 1 << 25
"""Of each model in memory at a time."""


class Thresholds(msgspec.Struct, frozen=True, kw_only=True):
    """What a derived model may lose."""

    bits_per_byte: float = 0.02
    """Largest relative rise of bits per byte."""
    kl: float | None = None
    """Largest mean KL divergence in nats, if any."""
    agreement: float = LEAST_AGREEMENT
    """Of networks that are no language models: see `answers.AnswersCertificate`."""


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, against which parent, and whether it is within the thresholds."""

    parent: str
    """Id of the model that this one was made of."""
    prompts: int
    prompts_sha256: str
    tokens: int
    kl_mean: float
    """Mean over the tokens of KL(parent || derived), nats."""
    kl_max: float
    max_logit_error: float
    """Largest difference of a logit, each token's logits taken relative to their mean."""
    bits_per_byte_before: float
    bits_per_byte_after: float
    bits_per_byte_change: float
    """Relative."""
    top1_agreement: float
    """Share of tokens at which both find the same token likeliest."""
    bytes_before: int
    bytes_after: int
    thresholds: Thresholds
    passed: bool
    accepted: bool = False
    """Handed on past a threshold, because it was asked for."""
    code: str = f"steelyard {__version__}"

    def summary(self) -> str:
        """One line for people."""
        return (
            f"KL {self.kl_mean:.4f} nats, max logit error {self.max_logit_error:.2f}, the same likeliest token at "
            f"{self.top1_agreement:.1%} of places, bits per byte "
            f"{self.bits_per_byte_before:.4f} -> {self.bits_per_byte_after:.4f} ({self.bits_per_byte_change:+.2%}), "
            f"bytes {self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB "
            f"({self.bytes_after / self.bytes_before:.2f}x)"
        )


def golden_texts() -> list[str]:
    """The 32 texts that ship with the package."""
    content = resources.files("steelyard.evaluate").joinpath("golden/texts.json").read_text("utf-8")
    texts: list[str] = json.loads(content)
    return texts


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("model*.safetensors"))


@torch.inference_mode()
def compare(
    parent: Decoder,
    derived: Decoder,
    tokenizer: Tokenizer,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Read the golden texts with both models.

    Args:
        parent: the model before.
        derived: the model after, of the same vocabulary.
        tokenizer: theirs.
        report: told (texts done, of how many).

    Returns:
        The measured fields of a `Certificate`.

    Raises:
        CheckpointError: the tokenizer makes nothing of the golden texts.
    """
    texts = golden_texts()
    most, begin = min(MAX_TOKENS, parent.config.context), tokenizer.beginning
    rows = [
        TokenRow(tokens=tokens, trained=[place >= max(1, len(begin)) for place in range(len(tokens))])
        for tokens in ([*begin, *tokenizer.encode_plain(text)][:most] for text in texts)
        if len(tokens) > max(1, len(begin))
    ]
    if not rows:
        raise CheckpointError("the tokenizer makes no tokens of the golden texts: nothing can be certified")
    size = sum(len(tokenizer.decode(row.tokens).encode()) for row in rows)
    kl_sum = kl_max = logit_error = before = after = same = 0.0
    count, done, step = 0, 0, max(1, LOGITS // parent.config.vocabulary)
    for batch in packs(rows):
        states = [
            decoder(batch.token_ids, batch.positions, PackedAttention(batch.lengths))[batch.places]
            for decoder in (parent, derived)
        ]
        for first in range(0, len(batch.targets), step):
            part = slice(first, first + step)
            logits = [parent.logits(states[0][part]).float(), derived.logits(states[1][part]).float()]
            p, q = (x.log_softmax(-1) for x in logits)  # [T, V]
            kl = (p.exp() * (p - q)).sum(-1)
            kl_sum, kl_max = kl_sum + float(kl.sum()), _largest(kl, kl_max)
            centred = [x - x.mean(-1, keepdim=True) for x in logits]
            logit_error = _largest((centred[0] - centred[1]).abs(), logit_error)
            targets = batch.targets[part, None]
            before -= float(p.gather(1, targets).sum())
            after -= float(q.gather(1, targets).sum())
            same += float((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(targets)
        done += len(batch.lengths)
        report(done, len(rows))
    bits = 1 / math.log(2) / size
    return {
        "prompts": len(texts),
        "prompts_sha256": _digest(texts),
        "tokens": count,
        "kl_mean": kl_sum / count,
        "kl_max": kl_max,
        "max_logit_error": logit_error,
        "bits_per_byte_before": before * bits,
        "bits_per_byte_after": after * bits,
        "bits_per_byte_change": after / before - 1,
        "top1_agreement": same / count,
    }


def _largest(values: torch.Tensor, before: float) -> float:
    """The largest of all; not a number once one is not."""
    return float(torch.cat([values.flatten(), torch.tensor([before])]).max())


def judge(measured: dict[str, Any], thresholds: Thresholds, accept: bool = False, **fields: Any) -> Certificate:
    """A certificate of what was measured. A figure that is not a number never passes.

    Args:
        measured: what `compare` returned.
        thresholds: what may be lost.
        accept: hand it on past a threshold.
        fields: the certificate's other fields.
    """
    passed = bool(measured["bits_per_byte_change"] <= thresholds.bits_per_byte)
    if thresholds.kl is not None:
        passed = passed and bool(measured["kl_mean"] <= thresholds.kl)
    accepted = accept and not passed
    return Certificate(**measured, thresholds=thresholds, passed=passed, accepted=accepted, **fields)


def demand(certificate: Certificate) -> None:
    """Refuse a certificate that is past its thresholds and was not accepted.

    Raises:
        FidelityError: with the figures and what to do.
    """
    if certificate.passed or certificate.accepted:
        return
    limits = f"{certificate.thresholds.bits_per_byte:+.3%} bits per byte"
    if certificate.thresholds.kl is not None:
        limits += f", KL {certificate.thresholds.kl}"
    raise FidelityError(
        f"the compressed model is past its thresholds ({limits}): {certificate.summary()}; nothing was written. "
        "Use --accept to keep it all the same"
    )


def _digest(texts: list[str]) -> str:
    return manifest.digest({str(index): text for index, text in enumerate(texts)}).removeprefix("sha256:")
