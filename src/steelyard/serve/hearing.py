"""What is asked of models that hear, and what it costs: pieces of a recording, some at a time. It shapes no answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import NamedTuple

from steelyard.errors import EngineUnavailableError
from steelyard.infer.request import Output, Request
from steelyard.infer.sound import Hearing, Hears, most_written, sound_tokens
from steelyard.serve.billing.bill import Bill, Payer
from steelyard.serve.billing.prices import NANO, Counts
from steelyard.serve.ids import fresh
from steelyard.serve.models import ServedModel
from steelyard.serve.sounds import Samples

TOGETHER = 4
"""Pieces of a recording that are asked at once: what this process and the engine hold of it."""


class Piece(NamedTuple):
    """Of a recording."""

    first: int
    """Samples before it."""
    samples: int
    output: Output


@dataclass
class Listening:
    """A recording that is heard."""

    id: str
    served: ServedModel
    samples: Samples
    hearing: Hearing
    step: int
    """Samples of a piece."""
    bill: Bill

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What was said in each piece, in their order, as soon as it is known.

        The budget is reserved before, and settled before the generator ends. Of who leaves, no further piece is heard.

        Raises:
            RateLimitError: too many tokens in a minute.
            QuotaError: the project's budget does not cover it.
            RequestError: the engine refuses a piece.
            EngineUnavailableError: the engine is not ready, or stopped meanwhile.
            StorageError: nothing could be reserved, or the settlement not be written yet.
        """
        payer = self.bill.payer
        timing = payer.meters.timing(self.served.id)
        trace = None if payer.trace is None else payer.trace.generation(self.served.id, self.id)
        spans = _spans(self.samples.count, self.step)
        ids = [f"{self.id}-{number}" for number in range(len(spans))]
        async with self.bill.metered(dict.fromkeys(ids, 1)) as meter:
            asked = 0
            try:
                while asked < len(ids):
                    chosen = range(asked, min(asked + TOGETHER, len(ids)))
                    requests = [self._request(ids[n], await self._read(*spans[n])) for n in chosen]
                    asked, told, found = chosen.stop, chosen.start, dict[str, Output]()
                    async with contextlib.aclosing(self.served.engine.submit(*requests, meter=meter)) as outputs:
                        async for together in outputs:
                            timing.take((0, output) for output in together)
                            if trace is not None:
                                trace.take(together)
                            found |= {output.id: output for output in together}
                            while told < asked and ids[told] in found:
                                yield Piece(*spans[told], found.pop(ids[told]))
                                told += 1
            except EngineUnavailableError:
                for id in ids[:asked]:  # of what it did not take it says nothing
                    if not self.served.engine.counts(id):
                        meter.lose(id)
                raise
            finally:
                for id in ids[asked:]:
                    meter.drop(id)
            await self.bill.settle(meter)
        timing.end(self.bill.cost / NANO, self.bill.counts.input_tokens)

    def _request(self, id: str, sound: bytes) -> Request:
        return Request(id=id, prompt=[], sound=sound, hearing=self.hearing, project=self.bill.payer.project)

    async def _read(self, first: int, samples: int) -> bytes:
        return await asyncio.to_thread(self.samples.piece, first, samples)


def listen(served: ServedModel, hears: Hears, payer: Payer, samples: Samples, hearing: Hearing) -> Listening:
    """What to ask of the engine for a recording."""
    answer_id = fresh("transcript-")
    spans = _spans(samples.count, hears.piece)
    written = hearing.beam * sum(most_written(hears, count) for _, count in spans)
    most = Counts(sum(sound_tokens(count) for _, count in spans), 0, written)
    bill = payer.bill(answer_id, served, most, "audio_transcriptions")
    return Listening(answer_id, served, samples, hearing, hears.piece, bill)


def _spans(count: int, step: int) -> list[tuple[int, int]]:
    """Where each piece begins, and how long it is; of nothing there is one, too."""
    return [(first, min(step, count - first)) for first in range(0, max(1, count), step)]
