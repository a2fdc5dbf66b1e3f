"""How likely a model finds given tokens: loss, perplexity, bits per byte."""

# V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F

from steelyard.data.packing import Pack, bins, pack
from steelyard.data.rows import TokenRow
from steelyard.errors import DataError
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter

PACK_TOKENS = 2048
CHUNK = 512


def packs(rows: Sequence[TokenRow], capacity: int = PACK_TOKENS) -> Iterator[Pack]:
    """Rows in packs of at most `capacity` tokens."""
    for group in bins([len(row.tokens) for row in rows], capacity):
        yield pack([rows[index] for index in group])


@torch.inference_mode()
def negative_log_likelihood(
    decoder: Decoder,
    adapter: Adapter | None,
    rows: Sequence[TokenRow],
    report: Callable[[int], None] = lambda tokens: None,
) -> tuple[float, int]:
    """Sum of -log p over the trained tokens of `rows` in nats, and their number.

    Args:
        decoder: the model.
        adapter: worn by every row, or None.
        rows: what to score.
        report: told the tokens done after each forward pass.
    """
    total, count, done = 0.0, 0, 0
    for batch in packs(rows):
        hidden_states = decoder(batch.token_ids, batch.positions, PackedAttention(batch.lengths), adapter)
        states = hidden_states[batch.places]
        for chunk, targets in zip(states.split(CHUNK), batch.targets.split(CHUNK), strict=True):  # type: ignore[no-untyped-call]
            total += float(F.cross_entropy(decoder.logits(chunk).float(), targets, reduction="sum"))
        count += len(batch.targets)
        done += len(batch.token_ids)
        report(done)
    return total, count


def windows(
    tokens: Sequence[int], context: int = 1024, stride: int = 512, beginning: Sequence[int] = ()
) -> list[TokenRow]:
    """Overlapping rows of a long text, so that each token but the first is scored once.

    All but those of the first window are scored with at least `context - stride` tokens before them.

    Args:
        tokens: the text's.
        context: most tokens of a row.
        stride: by how many of the text a row is ahead of the one before.
        beginning: begins every row and is not scored (see `Tokenizer.beginning`); with it the first token is.

    Raises:
        DataError: fewer than two tokens.
    """
    context -= len(beginning)
    assert 0 < stride < context, "the first token of a window is never scored"
    if len(tokens) < 2:
        raise DataError("the text is too short: at least two tokens are needed")
    rows, done = [], 0 if beginning else 1
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        trained = [*(False for _ in beginning), *(place >= done for place in range(begin, end))]
        rows.append(TokenRow(tokens=[*beginning, *tokens[begin:end]], trained=trained))
        done = end
        if end == len(tokens):
            break
    return rows


def summary(nats: float, tokens: int, size: int | None = None) -> dict[str, float]:
    """Loss, perplexity and, for a text of `size` bytes, bits per byte."""
    found = {"loss": nats / tokens, "perplexity": math.exp(min(nats / tokens, 700.0)), "tokens": float(tokens)}
    if size is not None:
        found["bits_per_byte"] = nats / math.log(2) / size
    return found
