"""What a form of a decoder is measured by in a search: what it loses on held-out rows, how large and how fast it is."""

# G groups of rows

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch

from steelyard.data.rows import TokenRow
from steelyard.evaluate.certificate import dense_bytes, weight_bytes
from steelyard.evaluate.likelihood import negative_log_likelihood
from steelyard.infer import speed
from steelyard.models import weights
from steelyard.models.decoder import Decoder
from steelyard.models.opening import Opened
from steelyard.serve.energy import Energy
from steelyard.stages.compress import token_rows

HELD, PACK = 1 << 14, 512
"""Tokens that forms are measured on, and of a group of rows that is drawn as one."""
DRAWS = 1000


class Measuring:
    """Measures of forms against the model as it is.

    Args:
        opened: that model, its adapter merged.
        held: rows that nothing is judged by.

    Raises:
        DataError: a row.
    """

    def __init__(self, opened: Opened, held: Path) -> None:
        self.opened, self.energy = opened, Energy()
        self.counts_energy = bool(self.energy.joules())
        rows = token_rows(opened, held, HELD)
        self._rows = [[rows[place] for place in group] for group in _groups(rows)]
        self._before: torch.Tensor | None = None

    def whole(self) -> dict[str, float]:
        """Of the model as it is."""
        decoder = self.opened.decoder
        return {"loss": 0.0, "size": float(dense_bytes(decoder)), **self._speed(decoder)}

    def of(self, folder: Path) -> tuple[dict[str, float], tuple[float, float]]:
        """Of a form, and the interval of its loss."""
        if self._before is None:
            self._before = self._nats(self.opened.decoder)
        decoder = weights.load(folder)
        before, after = self._before, self._nats(decoder)
        places = torch.randint(len(after), (DRAWS, len(after)), generator=torch.Generator().manual_seed(0))
        lost = after[places].sum(1) / before[places].sum(1) - 1
        low, high = lost.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        loss = float(after.sum() / before.sum() - 1)
        return {"loss": loss, "size": float(weight_bytes(folder)), **self._speed(decoder)}, (low, high)

    def _speed(self, decoder: Decoder) -> dict[str, float]:
        joules = (lambda: sum(self.energy.joules().values())) if self.counts_energy else None
        values = msgspec.to_builtins(speed.measure(decoder, self.opened.tokenizer, joules))
        return {name: value for name, value in values.items() if value is not None}

    def _nats(self, decoder: Decoder) -> torch.Tensor:
        """`[G]` float64."""
        nats = [negative_log_likelihood(decoder, None, group)[0] for group in self._rows]
        return torch.tensor(nats, dtype=torch.float64)


def _groups(rows: Sequence[TokenRow]) -> list[list[int]]:
    """Places of rows in groups of some `PACK` tokens, in order."""
    groups: list[list[int]] = []
    size = PACK
    for place, row in enumerate(rows):
        if size >= PACK:
            groups.append([])
            size = 0
        groups[-1].append(place)
        size += len(row.tokens)
    return groups
