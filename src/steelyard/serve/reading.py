"""What is asked of models that read and do not write, and what it costs. Knows nothing of the shapes of answers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from steelyard.errors import RequestError
from steelyard.infer.request import Output, Ready, Request, Task
from steelyard.serve.billing.bill import Payer
from steelyard.serve.billing.prices import NANO, Counts
from steelyard.serve.examples import Shown
from steelyard.serve.ids import fresh
from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.reading import ReadingUsage
from steelyard.text.tokenizer import Tokenizer

WORK: dict[Task, str] = {
    "generate": "generates text: ask it at /v1/chat/completions",
    "embed": "makes embeddings: ask it at /v1/embeddings",
    "classify": "classifies texts: ask it at /v1/classify",
    "tag": "tags words: ask it at /v1/tag",
    "transcribe": "transcribes recordings: ask it at /v1/audio/transcriptions",
}


class Text(msgspec.Struct, frozen=True):
    """Something to read."""

    content: str | list[int] = ""
    words: list[str] | None = None
    """Of a tagger: instead of the content."""

    @property
    def characters(self) -> int:
        """How long it is; 0 of tokens."""
        given = [self.content] if self.words is None else self.words
        return sum(len(one) for one in given if isinstance(one, str))

    def tokens(self, tokenizer: Tokenizer) -> list[int]:
        """What it is to the model, and is paid for."""
        if self.words is not None:
            around = tokenizer.encode_plain("", add_special_tokens=True)
            return [*around, *(token for word in self.words for token in tokenizer.encode_plain(word))] or [0]
        if isinstance(self.content, list):
            return self.content
        return tokenizer.encode_plain(self.content, add_special_tokens=True) or [0]


def _shown(given: Text | Shown, served: ServedModel) -> Shown:
    return given if isinstance(given, Shown) else Shown(given.tokens(served.tokenizer))


@dataclass(frozen=True)
class Answer:
    """What a model said of some texts."""

    id: str
    created: int
    served: ServedModel
    ready: Ready
    outputs: list[Output]
    """In the order of the texts."""
    usage: ReadingUsage


def demand(served: ServedModel, *tasks: Task) -> Ready:
    """What a model's engine says of itself, if that is one of the tasks.

    Raises:
        RequestError: it does something else.
        EngineUnavailableError: it is not ready.
    """
    ready = served.ready()
    if ready.task not in tasks:
        raise RequestError(f"'{served.id}' {WORK[ready.task]}", param="model", code="model_not_supported")
    return ready


async def read(
    served: ServedModel,
    payer: Payer,
    texts: Sequence[Text] | Sequence[Shown],
    task: Task,
    *,
    prefix: str,
    param: str,
    paths: int = 1,
) -> Answer:
    """Let a model read texts, or examples.

    Args:
        served: the model.
        payer: whose request it is.
        texts: what to read.
        task: what is wanted of them.
        prefix: of the answer's id.
        param: the field that they came from.
        paths: of a tagger, how many sequences.

    Raises:
        RequestError: the model does something else, or does not hold a text; the field is named.
        RateLimitError: too many tokens in a minute.
        QuotaError: the project's budget does not cover it.
        EngineUnavailableError: the engine is not ready, or stopped meanwhile.
        StorageError: nothing could be reserved, or the settlement not be written yet.
    """
    ready = demand(served, task)
    for number, text in enumerate(texts):
        if isinstance(text, Text):
            served.demand_short(text.characters, param if len(texts) == 1 else f"{param}[{number}]")
    shown = await asyncio.to_thread(lambda: [_shown(text, served) for text in texts])
    prompts = [one.prompt for one in shown]
    for number, prompt in enumerate(prompts):
        where = param if len(prompts) == 1 else f"{param}[{number}]"
        if len(prompt) > ready.context:
            size, most = len(prompt), ready.context
            reason = f"'{where}' has {size} tokens, but the context of '{served.id}' is {most}: shorten it"
            raise RequestError(reason, param=param, code="context_length_exceeded")
        if max(prompt, default=0) >= ready.vocabulary:
            raise RequestError(f"'{where}' has a token id that is not below {ready.vocabulary}", param=param)
    answer_id = fresh(prefix)
    requests = [
        Request(
            id=f"{answer_id}-{number}",
            prompt=one.prompt,
            image=one.image,
            sound=one.sound,
            words=text.words if isinstance(text, Text) else None,
            paths=paths,
            project=payer.project,
            priority="interactive" if payer.line is None else "batch",
        )
        for number, (text, one) in enumerate(zip(texts, shown, strict=True))
    ]
    bill = payer.bill(answer_id, served, Counts(sum(one.tokens for one in shown), 0, 0), "embeddings")
    timing = payer.meters.timing(served.id)
    found: dict[str, Output] = {}
    async with bill.metered({request.id: 1 for request in requests}) as meter:
        async with contextlib.aclosing(served.engine.submit(*requests, meter=meter)) as outputs:
            async for together in outputs:
                timing.take((0, output) for output in together)
                found |= {output.id: output for output in together}
        await bill.settle(meter)
    timing.end(bill.cost / NANO, bill.counts.input_tokens)
    usage = ReadingUsage(bill.counts.input_tokens, bill.counts.input_tokens, bill.cost / NANO)
    return Answer(answer_id, int(time.time()), served, ready, [found[request.id] for request in requests], usage)
