"""On whose bill something goes: from who asks to a reservation, from a meter to what it cost."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from steelyard.serve.billing.ledger import Reservation, Service
from steelyard.serve.billing.metering import Meter, Metering
from steelyard.serve.billing.prices import Counts, Price, PriceList, Quote
from steelyard.serve.meters import RequestMeters
from steelyard.serve.models import ServedModel
from steelyard.serve.rate_limits import Admission, RateLimits

if TYPE_CHECKING:
    from steelyard.serve.spans import RequestTrace


@dataclass(frozen=True)
class BatchLine:
    """A request that is a line of a batch."""

    id: str
    """Of its reservation."""
    paid: bool = False
    """It was paid before its answer was lost."""


@dataclass(frozen=True)
class Payer:
    """A project that has been let in with a request."""

    project: str
    key_id: str
    admission: Admission
    metering: Metering
    limits: RateLimits
    prices: PriceList
    meters: RequestMeters
    line: str | None = None
    """The reservation's id of a batch's line: half price, idle slots, no limits; None: a request of its own."""
    free: bool = False
    """A line that was paid before its answer was lost."""
    trace: RequestTrace | None = None
    """Where OpenTelemetry is told what the engine did for the request; None: it is not."""

    def bill(self, id: str, served: ServedModel, most: Counts, service: Service = "completions") -> Bill:
        """A bill for what comes to `most` at most, at the prices of now."""
        quote = Quote(0, Price()) if self.free else self.prices.quote(*served.names, batch=self.line is not None)
        quote = quote.of_explanations if service == "explanations" else quote
        id = self.line or id
        reservation = Reservation(id, self.project, self.key_id, served.id, service, quote, quote.most(most))
        return Bill(self, reservation, most)


@dataclass
class Bill:
    """What is paid for one answer."""

    payer: Payer
    reservation: Reservation
    most: Counts
    counts: Counts = field(default_factory=Counts)
    """What it has come to, once it is settled."""
    cost: int = 0
    """Nano-dollars, likewise."""

    @contextlib.asynccontextmanager
    async def metered(self, choices: dict[str, int]) -> AsyncIterator[Meter]:
        """Reserve the most that it may cost, and count from here on.

        Raises:
            RateLimitError: too many tokens in a minute.
            QuotaError: the budget does not cover it.
            StorageError: nothing was reserved.
        """
        payer, tokens = self.payer, self.most.input_tokens + self.most.output_tokens
        if payer.line is None:
            payer.limits.take(payer.admission, payer.project, self.reservation.model, tokens)
        again = payer.line is not None
        async with payer.metering.metered(self.reservation, choices, lost_is_free=again) as meter:
            try:
                yield meter
            finally:
                payer.admission.unused -= meter.counts.input_tokens + meter.counts.output_tokens

    async def settle(self, meter: Meter) -> None:
        """Wait until what the meter counted is in the ledger. Raises as `Meter.settled` does."""
        self.cost = await meter.settled()
        self.counts = meter.counts
