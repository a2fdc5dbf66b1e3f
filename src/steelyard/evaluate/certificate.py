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
from typing import Any, Literal

import msgspec
import torch

from steelyard import __version__
from steelyard.checkpoint import manifest
from steelyard.data.packing import bins, pack
from steelyard.data.rows import TokenRow
from steelyard.errors import CheckpointError, FidelityError
from steelyard.evaluate.answers import LEAST_AGREEMENT
from steelyard.evaluate.likelihood import PACK_TOKENS
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.text.tokenizer import Tokenizer

MAX_TOKENS = 512
REMEMBERED, PROMPT = 4, 32
"""Of how many golden texts the beginning is remembered, for whoever serves the model, and how many tokens of each."""
DRAWS = 1000
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
    task: float = 0.02
    """Largest fall of accuracy on rows of a task; where they have no labels, largest relative rise of the loss."""


class TaskDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a task's rows say of both."""

    measure: Literal["accuracy", "loss"]
    before: float
    after: float

    @property
    def lost(self) -> float:
        """Accuracy, absolute; loss, relative."""
        return self.before - self.after if self.measure == "accuracy" else self.after / self.before - 1


class SignOff(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody stands for a model as it is."""

    by: str
    at: str
    """UTC."""
    note: str = ""


class GoldenPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """The beginning of a golden text, and what the derived model holds of it."""

    tokens: list[int]
    nats: list[float]
    """-log p of its last tokens: of all but the first, or but those that the tokenizer puts before every text."""


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
    bits_per_byte_interval: tuple[float, float] | None = None
    """Of the change, 95%, by drawing the texts anew."""
    top1_agreement: float
    """Share of tokens at which both find the same token likeliest."""
    bytes_before: int
    bytes_after: int
    tasks: dict[str, TaskDelta] = {}
    """By the file of their rows."""
    golden: list[GoldenPrompt] = []
    """What an engine that loads the model has to find, too."""
    thresholds: Thresholds
    passed: bool
    accepted: bool = False
    """Handed on past a threshold, because it was asked for."""
    sign_offs: list[SignOff] = []
    code: str = f"steelyard {__version__}"

    def summary(self) -> str:
        """One line for people."""
        return (
            f"KL {self.kl_mean:.4f} nats, max logit error {self.max_logit_error:.2f}, the same likeliest token at "
            f"{self.top1_agreement:.1%} of places, bits per byte "
            f"{self.bits_per_byte_before:.4f} -> {self.bits_per_byte_after:.4f} ({self.bits_per_byte_change:+.2%}), "
            + "".join(
                f"{name}: {delta.measure} {delta.before:.4f} -> {delta.after:.4f}, "
                for name, delta in self.tasks.items()
            )
            + f"bytes {self.bytes_before / 1e6:.1f} -> {self.bytes_after / 1e6:.1f} MB "
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


def dense_bytes(decoder: Decoder) -> int:
    """Bytes of a dense model's weights, shared ones counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in decoder.parameters())


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
    kl_sum = kl_max = logit_error = same = 0.0
    done, step = 0, max(1, LOGITS // parent.config.vocabulary)
    nats = {place: torch.empty(0) for place in range(len(rows))}
    """Of each text, `[2, T]`: -log p of its tokens by the parent and the derived model."""
    for places in bins([len(row.tokens) for row in rows], PACK_TOKENS):
        batch, both = pack([rows[place] for place in places]), []
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
            both.append(-torch.stack([x.gather(1, batch.targets[part, None])[:, 0] for x in (p, q)]))
            same += float((p.argmax(-1) == q.argmax(-1)).sum())
        trained = [rows[place].targets for place in places]
        nats |= zip(places, torch.split(torch.cat(both, 1), trained, dim=1), strict=True)
        done += len(batch.lengths)
        report(done, len(rows))
    sums = torch.stack([each.double().sum(1) for each in nats.values()])  # [texts, 2]
    before, after = sums.sum(0).tolist()
    count, bits = sum(each.shape[1] for each in nats.values()), 1 / math.log(2) / size
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
        "bits_per_byte_interval": _interval(sums),
        "top1_agreement": same / count,
        "golden": [
            GoldenPrompt(
                tokens=row.tokens[:PROMPT],
                nats=[round(x, 4) for x in nats[place][1, : sum(row.trained[:PROMPT])].tolist()],
            )
            for place, row in enumerate(rows[:REMEMBERED])
        ],
    }


def _interval(sums: torch.Tensor) -> tuple[float, float]:
    """Of the relative change, from sums `[texts, 2]` before and after."""
    places = torch.randint(len(sums), (DRAWS, len(sums)), generator=torch.Generator().manual_seed(0))
    drawn = sums[places].sum(1)  # [draws, 2]
    change = drawn[:, 1] / drawn[:, 0] - 1
    low, high = change.quantile(torch.tensor([0.025, 0.975], dtype=change.dtype)).tolist()
    return low, high


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
    passed = passed and all(delta.lost <= thresholds.task for delta in fields.get("tasks", {}).values())
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
    if certificate.tasks:
        limits += f", {certificate.thresholds.task} of a task's accuracy, or of its loss"
    if certificate.thresholds.kl is not None:
        limits += f", KL {certificate.thresholds.kl}"
    raise FidelityError(
        f"the compressed model is past its thresholds ({limits}): {certificate.summary()}; nothing was written. "
        "Use --accept to keep it all the same"
    )


def _digest(texts: list[str]) -> str:
    return manifest.digest({str(index): text for index, text in enumerate(texts)}).removeprefix("sha256:")
