"""From checked fields to text: what is asked of the engine, and what the choices of an answer add up to.

What the endpoints for text share. Knows tokens, choices and usage; nothing of HTTP or of the shapes of answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import msgspec

from steelyard.errors import EngineUnavailableError, RequestError
from steelyard.infer.request import Output, PromptLogprob, Request, Sampling, TokenLogprob
from steelyard.serve.billing.bill import Bill, Payer
from steelyard.serve.billing.prices import NANO, Counts
from steelyard.serve.ids import fresh
from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.sampling import SamplingFields
from steelyard.serve.protocol.usage import CompletionTokensDetails, Finish, PromptTokensDetails, Usage
from steelyard.serve.reading import demand

SMALLEST_TOP_P = 1e-9  # OpenAI's 0 means the most likely token alone
FIRST_TOKEN_SECONDS, TOTAL_SECONDS = 300.0, 3600.0
"""How long an answer may wait for its first token, and may take in all."""
MOST_OF_PROMPTS = 1 << 18
"""Most tokens and log-probabilities of prompts in an answer: some 20 MB of JSON."""


@dataclass
class Generation:
    """Prompts and how to continue each."""

    id: str
    """The answer's id."""
    created: int
    """Unix seconds."""
    served: ServedModel
    fingerprint: str
    """Changes with the checkpoint."""
    requests: list[Request]
    """One per prompt."""
    choices: int
    """Choices per prompt."""
    bill: Bill
    """Who pays, and what it has come to."""
    rejected: int = 0
    """Tokens of beams that did not come back."""

    async def outputs(self) -> AsyncGenerator[list[tuple[int, Output]], None]:
        """What the engine answers, as it comes, each with the number of its choice within the whole answer.

        The budget is reserved before, and settled before the generator ends.

        Raises:
            RateLimitError: too many tokens in a minute.
            QuotaError: the project's budget does not cover it.
            RequestError: the engine refuses a request.
            EngineUnavailableError: the engine is not ready, or stopped meanwhile.
            StorageError: nothing could be reserved, or the settlement not be written yet.
        """
        first = {request.id: number * self.choices for number, request in enumerate(self.requests)}
        payer = self.bill.payer
        timing = payer.meters.timing(self.served.id)
        trace = None if payer.trace is None else payer.trace.generation(self.served.id, self.id)
        async with self.bill.metered({request.id: request.n for request in self.requests}) as meter:
            async with contextlib.aclosing(self.served.engine.submit(*self.requests, meter=meter)) as outputs:
                async for together in _in_time(outputs, searched=any(one.beam is not None for one in self.requests)):
                    self.rejected += sum(output.rejected_tokens for output in together)
                    numbered = [(first[output.id] + output.choice, output) for output in together]
                    timing.take(numbered)
                    if trace is not None:
                        trace.take(together)
                    yield numbered
            await self.bill.settle(meter)
        timing.end(self.bill.cost / NANO, self.bill.counts.input_tokens)

    async def gather(self) -> list[Choice]:
        """Every choice, whole. Raises as `outputs` does."""
        choices = [Choice() for _ in range(len(self.requests) * self.choices)]
        async with contextlib.aclosing(self.outputs()) as outputs:
            async for together in outputs:
                for number, output in together:
                    choices[number].add(output)
        return choices

    def usage(self) -> Usage:
        """What is paid for, once the outputs have ended."""
        counts = self.bill.counts
        return Usage(
            counts.input_tokens,
            counts.output_tokens,
            counts.input_tokens + counts.output_tokens,
            PromptTokensDetails(counts.cached_tokens),
            self.bill.cost / NANO,
            CompletionTokensDetails(self.rejected) if self.rejected else msgspec.UNSET,
        )


async def _in_time(
    outputs: AsyncGenerator[list[Output], None], *, searched: bool
) -> AsyncGenerator[list[Output], None]:
    """The same, as long as they come in time; what is `searched` for comes at its end.

    Raises:
        EngineUnavailableError: the first, or the last, did not.
    """
    now = asyncio.get_running_loop().time()
    what, deadline, last = "first token", now + FIRST_TOKEN_SECONDS, now + TOTAL_SECONDS
    if searched:
        what, deadline = "end", last
    while True:
        try:
            async with asyncio.timeout_at(deadline):  # wait_for can lose a cancellation
                together = await anext(outputs)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise EngineUnavailableError(f"the {what} did not come in time: try again later") from None
        if any(output.tokens for output in together):
            what, deadline = "end", last
        yield together


@dataclass
class Choice:
    """A choice as it grows."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprob] = field(default_factory=list)
    """Of the first choice of a prompt, where they are asked for."""
    finish_reason: Finish = "length"
    call_ids: list[str] = field(default_factory=list)
    """Of the calls of tools in its text, as far as they were told."""

    def add(self, output: Output) -> None:
        """Take in what a step added."""
        self.text += output.text
        self.tokens += output.tokens
        self.logprobs += output.logprobs or []
        self.prompt_logprobs += output.prompt_logprobs or []
        self.finish_reason = finish(output) or self.finish_reason


def finish(output: Output) -> Finish | None:
    """Why the choice ended, in OpenAI's words, which are the engine's."""
    return output.finish_reason


def plan(
    fields: SamplingFields,
    served: ServedModel,
    payer: Payer,
    prompts: list[list[int]],
    *,
    prefix: str,
    param: str,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    echo: bool = False,
    grammar: str | None = None,
    grammar_field: str = "response_format",
) -> Generation:
    """What to ask of the engine.

    Args:
        fields: the request.
        served: the model that it names.
        payer: whose request it is.
        prompts: token ids.
        prefix: of the answer's id, such as `chatcmpl-`.
        param: the field that the prompts came from.
        max_tokens: the most tokens for each choice; whatever it is, a choice ends where the context does.
        logprobs: as in `Sampling`.
        prompt_logprobs: as in `Sampling`.
        echo: every choice of the answer repeats its prompt.
        grammar: what an answer has to be.
        grammar_field: where that came from.

    Raises:
        RequestError: a prompt is empty or leaves no room in the context, a token is beyond the vocabulary, or the
            answer would hold too much of the prompts.
        EngineUnavailableError: the engine is not ready.
    """
    ready = demand(served, "generate")
    for prompt in prompts:
        if not prompt:
            raise RequestError(f"'{param}' has no tokens: write something", param=param)
        if len(prompt) + (max_tokens != 0) > ready.context:
            raise RequestError(
                f"'{param}' has {len(prompt)} tokens, but the context of '{served.id}' is {ready.context}"
                f"{' with at least one to generate' if max_tokens != 0 else ''}: shorten it",
                param=param,
                code="context_length_exceeded",
            )
        if max(prompt) >= ready.vocabulary:
            raise RequestError(f"'{param}' has a token id that is not below {ready.vocabulary}", param=param)
    if any(token >= ready.vocabulary for token in fields.logit_bias):
        raise RequestError(f"'logit_bias' has a token id that is not below {ready.vocabulary}", param="logit_bias")
    if echo or prompt_logprobs is not None:
        _bound(prompts, fields.choices if echo else 1, prompt_logprobs, "echo" if echo else "prompt_logprobs")
    answer_id = fresh(prefix)
    requests = [
        Request(
            id=f"{answer_id}-{number}",
            prompt=prompt,
            sampling=_sampling(fields, _most(max_tokens, ready.context - len(prompt)), logprobs, prompt_logprobs),
            n=fields.choices,
            adapter=served.adapter,
            project=payer.project,
            priority="interactive" if payer.line is None else "batch",
            beam=fields.beam,
            grammar=grammar,
            grammar_field=grammar_field,
            speculate=fields.draft is not False,
        )
        for number, prompt in enumerate(prompts)
    ]
    fingerprint = f"fp_{ready.checkpoint_id.removeprefix('sha256:')[:12]}"
    most = Counts(sum(map(len, prompts)), 0, sum(_sequences(one) * one.sampling.max_tokens for one in requests))
    bill = payer.bill(answer_id, served, most)
    return Generation(answer_id, int(time.time()), served, fingerprint, requests, fields.choices, bill)


def _sequences(request: Request) -> int:
    """How many are computed for a request, each to its end at the most."""
    return request.n if request.beam is None else request.beam.width


def _most(max_tokens: int | None, room: int) -> int:
    return room if max_tokens is None else min(max_tokens, room)


def _bound(prompts: list[list[int]], copies: int, likeliest: int | None, param: str) -> None:
    """Refuse an answer that would hold too much of its prompts: `copies` of each, each token with `likeliest`."""
    size = copies * sum(map(len, prompts)) * (1 if likeliest is None else 2 + likeliest)
    if size > MOST_OF_PROMPTS:
        raise RequestError(
            f"'{param}': the answer would hold {size} tokens and log-probabilities of prompts; {MOST_OF_PROMPTS} are"
            " the limit: send fewer or shorter prompts at once, or ask for fewer choices or log-probabilities",
            param=param,
        )


def _sampling(fields: SamplingFields, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_p=1.0 if fields.top_p is None else max(fields.top_p, SMALLEST_TOP_P),
        top_k=max(fields.top_k or 0, 0),
        min_p=fields.min_p or 0.0,
        presence_penalty=fields.presence_penalty or 0.0,
        frequency_penalty=fields.frequency_penalty or 0.0,
        logit_bias=fields.logit_bias,
        seed=fields.seed,
        stop=fields.stop,
        ignore_eos=bool(fields.ignore_eos),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
