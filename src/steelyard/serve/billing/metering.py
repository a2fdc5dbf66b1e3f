"""What a request comes to: counted as the engine's messages arrive, settled when the engine has said its last.

The meter outlives the request: whoever asked may be gone, the engine may die, the money is settled all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Future

from steelyard.infer.request import Aborted, Output
from steelyard.serve.billing.ledger import Ledger, Reservation
from steelyard.serve.billing.prices import Counts

PERSIST_SECONDS = 1.0
"""How much generation a crash of this process may lose count of."""


class Meter:
    """Counts the requests of one reservation.

    Args:
        ledger: where it is settled.
        reservation: what was reserved for it.
        choices: how many of each request have to end, by the request's id.
        lost_is_free: whether an answer that the engine broke off costs nothing, since it will be asked for again.
    """

    def __init__(
        self, ledger: Ledger, reservation: Reservation, choices: dict[str, int], *, lost_is_free: bool = False
    ) -> None:
        self.reservation = reservation
        self.began = False
        """Whether an engine has been asked."""
        self._ledger, self._open = ledger, dict(choices)
        self._lost_is_free, self._lost = lost_is_free, False
        self._input: dict[str, tuple[int, int]] = {}
        self._output: dict[tuple[str, int], int] = {}
        self._settled: Future[int | None] | None = None
        self._over: asyncio.Future[Future[int | None]] = asyncio.get_running_loop().create_future()

    def begin(self) -> None:
        """From here on the engine says when it is over."""
        self.began = True

    def count(self, output: Output) -> bool:
        """Take in what the engine says of a choice; returns whether its request is over."""
        if output.prompt_tokens:
            cached = output.cached_tokens if output.choice == 0 else self._input.get(output.id, (0, 0))[1]
            self._input[output.id] = output.prompt_tokens, cached
        self._output[output.id, output.choice] = output.completion_tokens + output.rejected_tokens
        if output.finish_reason is not None:
            self._open[output.id] -= 1
            if self._open[output.id] == 0:
                self._end(output.id)
                return True
        return False

    def abort(self, aborted: Aborted) -> None:
        """A request was given up, having come to this."""
        self._input[aborted.id] = aborted.prompt_tokens, aborted.cached_tokens
        for choice, generated in enumerate(aborted.completion_tokens):
            self._output[aborted.id, choice] = generated
        self._end(aborted.id)

    def lose(self, request_id: str) -> None:
        """The engine failed or is gone: what is counted is all that there will be."""
        self._lost = True
        self._end(request_id)

    def drop(self, request_id: str) -> None:
        """A request was never sent: it comes to nothing."""
        self._end(request_id)

    @property
    def counts(self) -> Counts:
        """What it has come to."""
        return Counts(
            sum(tokens for tokens, _ in self._input.values()),
            sum(cached for _, cached in self._input.values()),
            sum(self._output.values()),
        )

    def close(self) -> None:
        """Settle at once, whatever is still open; for one that never began."""
        self._open.clear()
        self._settle()

    async def settled(self) -> int:
        """The cost in nano-dollars, once every request is over and the entry would survive a crash.

        Raises:
            StorageError: the entry could not be written; it is tried again every second, and when the server starts.
        """
        settled = await asyncio.shield(self._over)
        return await asyncio.wrap_future(settled) or 0

    def _end(self, request_id: str) -> None:
        self._open.pop(request_id, None)
        if not self._open:
            self._settle()

    def _settle(self) -> None:
        if self._settled is None:
            free = self._lost and self._lost_is_free
            note = "the engine broke it off" if self._lost else ""
            self._settled = self._ledger.settle(self.reservation.id, self.counts, note, free=free)
            if not self._over.done():
                self._over.set_result(self._settled)

    def retry(self) -> bool:
        """Settle again if that failed, as on a full disk; returns whether it is settled now."""
        assert self._settled is not None
        if self._settled.done() and self._settled.exception() is not None:
            self._settled = None
            self._settle()
            return False
        return self._settled.done()


class Metering:
    """Makes meters, and persists now and then what the open ones have come to."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._open: dict[str, tuple[Meter, float, Counts]] = {}
        self._ending: set[Meter] = set()
        """Over, and not known to be in the ledger yet."""

    @contextlib.asynccontextmanager
    async def metered(
        self, reservation: Reservation, choices: dict[str, int], *, lost_is_free: bool = False
    ) -> AsyncIterator[Meter]:
        """A meter over a fresh reservation.

        Raises:
            QuotaError: the budget does not cover it.
            StorageError: nothing was reserved.
        """
        await self.ledger.reserve(reservation)
        meter = Meter(self.ledger, reservation, choices, lost_is_free=lost_is_free)
        self._open[reservation.id] = meter, time.monotonic(), Counts()
        meter._over.add_done_callback(lambda _: self._end(meter))
        try:
            yield meter
        finally:
            if not meter.began:
                meter.close()

    @property
    def open(self) -> int:
        """How many reservations are open here."""
        return len(self._open)

    async def persist(self) -> None:
        """Write down what the open reservations have come to, every `PERSIST_SECONDS`, for ever."""
        while True:
            await asyncio.sleep(PERSIST_SECONDS)
            self._ending = {meter for meter in self._ending if not meter.retry()}
            for answer in list(self._changed()):
                with contextlib.suppress(Exception):  # the settlement will say
                    await asyncio.wrap_future(answer)

    async def drained(self, seconds: float) -> None:
        """Wait until nothing is open, but no longer than this."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for meter, _, _ in list(self._open.values()):
                    with contextlib.suppress(Exception):
                        await meter.settled()

    def _end(self, meter: Meter) -> None:
        del self._open[meter.reservation.id]
        self._ending.add(meter)

    def _changed(self) -> Iterable[Future[None]]:
        now = time.monotonic()
        for reservation, (meter, since, told) in list(self._open.items()):
            counts = meter.counts
            if counts != told and now - since >= PERSIST_SECONDS:
                self._open[reservation] = meter, since, counts
                yield self.ledger.progress(reservation, counts)
