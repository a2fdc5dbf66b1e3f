"""From checked fields to text: what is asked of the engine, and what the choices of an answer add up to.

What the two endpoints for text share. Knows tokens, choices and usage; nothing of HTTP or of the shapes of answers.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from steelyard.errors import RequestError
from steelyard.infer.request import Output, Request, Sampling, TokenLogprob
from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.fields import SamplingFields
from steelyard.serve.protocol.usage import Finish, PromptTokensDetails, Usage

SMALLEST_TOP_P = 1e-9  # OpenAI's 0 means the most likely token alone


@dataclass(frozen=True)
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

    async def outputs(self) -> AsyncGenerator[tuple[int, Output], None]:
        """What the engine answers, as it comes, each with the number of its choice within the whole answer.

        Raises:
            RequestError: the engine refuses a request.
            EngineUnavailableError: the engine is not ready, or stopped meanwhile.
        """
        first = {request.id: number * self.choices for number, request in enumerate(self.requests)}
        async with contextlib.aclosing(self.served.engine.submit(*self.requests)) as outputs:
            async for output in outputs:
                yield first[output.id] + output.choice, output

    async def gather(self) -> tuple[list[Choice], Usage]:
        """Every choice, whole. Raises as `outputs` does."""
        choices = [Choice() for _ in range(len(self.requests) * self.choices)]
        tally = Tally(self)
        async with contextlib.aclosing(self.outputs()) as outputs:
            async for number, output in outputs:
                choices[number].add(output)
                tally.add(number, output)
        return choices, tally.usage()


@dataclass
class Choice:
    """A choice as it grows."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: Finish = "length"

    def add(self, output: Output) -> None:
        """Take in what a step added."""
        self.text += output.text
        self.logprobs += output.logprobs or []
        self.finish_reason = finish(output) or self.finish_reason


class Tally:
    """Counts the tokens of an answer, by the engine's own count."""

    def __init__(self, generation: Generation) -> None:
        self._prompt = sum(len(request.prompt) for request in generation.requests)
        self._completion: dict[int, int] = {}
        self._cached: dict[str, int] = {}

    def add(self, number: int, output: Output) -> None:
        """Take in an output of choice `number`."""
        self._completion[number] = output.completion_tokens
        if output.choice == 0:  # the other choices share its prompt, which counts once
            self._cached[output.id] = output.cached_tokens

    def usage(self) -> Usage:
        """Tokens so far."""
        completion = sum(self._completion.values())
        cached = PromptTokensDetails(sum(self._cached.values()))
        return Usage(self._prompt, completion, self._prompt + completion, cached)


def finish(output: Output) -> Finish | None:
    """Why the choice ended, in OpenAI's words. An engine's `abort` is an error and never gets here."""
    assert output.finish_reason != "abort"
    return output.finish_reason


def plan(
    fields: SamplingFields,
    served: ServedModel,
    prompts: list[list[int]],
    *,
    prefix: str,
    param: str,
    max_tokens: int | None,
    logprobs: int | None,
) -> Generation:
    """What to ask of the engine.

    Args:
        fields: the request.
        served: the model that it names.
        prompts: token ids.
        prefix: of the answer's id, such as `chatcmpl-`.
        param: the field that the prompts came from.
        max_tokens: the most tokens for each choice; whatever it is, a choice ends where the context does.
        logprobs: as in `Sampling`.

    Raises:
        RequestError: a prompt is empty or leaves no room in the context, or a token is beyond the vocabulary.
        EngineUnavailableError: the engine is not ready.
    """
    ready = served.ready()
    for prompt in prompts:
        if not prompt:
            raise RequestError(f"'{param}' has no tokens: write something", param=param)
        if len(prompt) >= ready.context:
            raise RequestError(
                f"'{param}' has {len(prompt)} tokens, but the context of '{served.id}' is {ready.context} with at least"
                " one to generate: shorten it",
                param=param,
                code="context_length_exceeded",
            )
        if max(prompt) >= ready.vocabulary:
            raise RequestError(f"'{param}' has a token id that is not below {ready.vocabulary}", param=param)
    if any(token >= ready.vocabulary for token in fields.logit_bias):
        raise RequestError(f"'logit_bias' has a token id that is not below {ready.vocabulary}", param="logit_bias")
    answer_id = prefix + secrets.token_hex(16)
    requests = [
        Request(
            id=f"{answer_id}-{number}",
            prompt=prompt,
            sampling=_sampling(fields, min(max_tokens or ready.context, ready.context - len(prompt)), logprobs),
            n=fields.choices,
            adapter=served.adapter,
            speculate=fields.draft is not False,
        )
        for number, prompt in enumerate(prompts)
    ]
    fingerprint = f"fp_{ready.checkpoint_id.removeprefix('sha256:')[:12]}"
    return Generation(answer_id, int(time.time()), served, fingerprint, requests, fields.choices)


def _sampling(fields: SamplingFields, max_tokens: int, logprobs: int | None) -> Sampling:
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
    )
