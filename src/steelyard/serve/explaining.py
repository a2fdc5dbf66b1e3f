"""What is asked of an engine for explanations, and what it costs: an entry of the ledger of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import msgspec

from steelyard.errors import EngineUnavailableError, RequestError
from steelyard.infer import effort
from steelyard.infer.request import Explain, Explanation, Output, Request
from steelyard.serve.billing.bill import Bill, Payer
from steelyard.serve.billing.metering import Meter
from steelyard.serve.billing.prices import NANO, Counts
from steelyard.serve.examples import Shown
from steelyard.serve.ids import fresh
from steelyard.serve.learnt import Learnt
from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.explanations import (
    Believed,
    Explained,
    ExplainedTarget,
    ExplainedToken,
    ExplainedUnit,
    ExplanationUsage,
    Likely,
    Neighbour,
)
from steelyard.text.reasoning import parted
from steelyard.text.source import Source

SECONDS = 900.0
"""How long explanations may take."""


@dataclass
class Asked:
    """Explanations that are wanted of some sources, and reserved for."""

    served: ServedModel
    bill: Bill
    sources: list[Source]
    explains: list[Explain]
    meter: Meter
    shown: Sequence[Shown]
    """Of each what the engine reads."""

    @property
    def id(self) -> str:
        """Of all together."""
        return self.bill.reservation.id

    async def answers(self, learnt: Learnt | None = None) -> list[Explained]:
        """Ask, and pay; `learnt` are the rows that are compared. Raises as `read` of `reading.py` does."""
        requests = [
            Request(
                id=id,
                prompt=shown.prompt,
                image=shown.image,
                sound=shown.sound,
                adapter=self.served.adapter,
                project=self.bill.payer.project,
                priority="interactive" if self.bill.payer.line is None else "batch",
                explain=explain,
            )
            for id, shown, explain in zip(_ids(self.bill, len(self.shown)), self.shown, self.explains, strict=True)
        ]
        found: dict[str, Output] = {}
        timing = self.bill.payer.meters.timing(self.served.id)
        try:
            async with asyncio.timeout(SECONDS):
                async with contextlib.aclosing(self.served.engine.submit(*requests, meter=self.meter)) as outputs:
                    async for together in outputs:
                        timing.take((0, output) for output in together)
                        found |= {output.id: output for output in together}
        except TimeoutError:
            raise EngineUnavailableError("the explanation did not come in time: ask for less, or later") from None
        await self.bill.settle(self.meter)
        computed = self.bill.counts.input_tokens
        timing.end(self.bill.cost / NANO, computed)
        told = []
        for request, source in zip(requests, self.sources, strict=True):
            explanation = found[request.id].explanation
            assert explanation is not None, "an engine explains what it is asked to explain"
            part = explanation.computed_tokens / computed if computed else 0
            usage = ExplanationUsage(explanation.computed_tokens, part * self.bill.cost / NANO)
            assert request.explain is not None
            one = _told(self.served, source, request.explain, explanation, usage)
            if learnt is not None and explanation.nearest is not None:
                one = msgspec.structs.replace(one, nearest=_near(learnt, explanation.nearest))
            told.append(one)
        return told


@contextlib.asynccontextmanager
async def asking(
    served: ServedModel,
    payer: Payer,
    sources: list[Source],
    explains: list[Explain],
    *,
    shown: Sequence[Shown] | None = None,
    lengths: Sequence[int] | None = None,
    param: str = "input",
) -> AsyncGenerator[Asked, None]:
    """Reserve for explanations; what is not asked then costs nothing.

    Args:
        served: the model.
        payer: whose request it is.
        sources: what is read.
        shown: the same as the engine takes it, where it is more than a text.
        explains: how each is explained.
        lengths: tokens of each with its answer, at most; None: as they are.
        param: the field that they came from.

    Raises:
        RequestError: more than an engine would compute.
        RateLimitError: too many tokens in a minute.
        QuotaError: the project's budget does not cover it.
        StorageError: nothing could be reserved.
    """
    if payer.line is not None:
        raise RequestError("a batch's lines are not explained: ask /v1/explain", param="explain")
    whole = 0
    read = [Shown(source.ids) for source in sources] if shown is None else shown
    ready = served.ready()
    for number, (one, explain) in enumerate(zip(read, explains, strict=True)):
        length = one.tokens + effort.longest_answer(explain) if lengths is None else lengths[number]
        units = None if shown is None else one.units(ready)
        whole += effort.check(explain, effort.in_windows(length, ready.window, ready.around), units, param)
    bill = payer.bill(fresh("explain-"), served, Counts(whole, 0, 0), "explanations")
    async with bill.metered(dict.fromkeys(_ids(bill, len(sources)), 1)) as meter:
        yield Asked(served, bill, sources, explains, meter, read)


def _ids(bill: Bill, count: int) -> list[str]:
    return [f"{bill.reservation.id}-{number}" for number in range(count)]


def with_answer(explain: Explain, source: Source, answer: Sequence[int]) -> Explain:
    """Of a model that writes: which answer is explained, and which tokens have a share."""
    return msgspec.structs.replace(explain, answer=list(answer), places=source.places)


def _told(
    served: ServedModel, source: Source, asked: Explain, found: Explanation, usage: ExplanationUsage
) -> Explained:
    shares = dict(zip(found.places, found.shares, strict=True))
    if found.units:
        return _told_of_units(served, source, asked, found, usage)
    text = served.tokenizer.token_text
    tokens = [
        ExplainedToken(source.text[begin:end] or text(id), begin, end, shares.get(place))
        for place, (id, (begin, end)) in enumerate(zip(source.ids, source.spans, strict=True))
    ]
    if found.target is not None:
        target = ExplainedTarget(served.ready().labels[found.target])
    else:
        said = served.tokenizer.decode(found.answer)
        target = ExplainedTarget(parted(said)[1] if asked.against else said, [text(id) for id in found.answer])
    lens: list[list[Likely]] | msgspec.UnsetType = msgspec.UNSET
    if found.lens is not None:
        lens = [[Likely(token, share) for _, token, share in layer] for layer in found.lens]
    return Explained(
        method=asked.method,
        baseline=found.baseline,
        target=target,
        text=source.text,
        tokens=tokens,
        value=found.value,
        base=found.base,
        rest=found.rest,
        residual=found.residual,
        faithfulness=_believed(found),
        lens=lens,
        usage=usage,
    )


def _told_of_units(
    served: ServedModel, source: Source, asked: Explain, found: Explanation, usage: ExplanationUsage
) -> Explained:
    """Of an example that is more than a text."""
    assert found.target is not None, "it has classes"
    units = [ExplainedUnit(kind, name, share) for (kind, name), share in zip(found.units, found.shares, strict=True)]
    return Explained(
        method=asked.method,
        baseline=found.baseline,
        target=ExplainedTarget(served.ready().labels[found.target]),
        text=source.text,
        tokens=[],
        units=units,
        value=found.value,
        base=found.base,
        rest=found.rest,
        residual=found.residual,
        faithfulness=_believed(found),
        usage=usage,
    )


def _near(learnt: Learnt, found: list[tuple[int, float]]) -> list[Neighbour]:
    rows = [(learnt.rows[number], cosine) for number, cosine in found]
    return [Neighbour(learnt.file, row.line, row.text, cosine) for row, cosine in rows]


def _believed(found: Explanation) -> Believed | None:
    if found.faithfulness is None or found.chance is None:
        return None
    return Believed(found.faithfulness, found.chance)
