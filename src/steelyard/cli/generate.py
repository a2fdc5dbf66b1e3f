"""`steelyard generate`: one answer in the terminal, no server."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from steelyard.checkpoint.sources import resolve
from steelyard.cli import console
from steelyard.errors import ConfigError, DataError
from steelyard.infer.engine import Engine
from steelyard.infer.request import Request, Sampling
from steelyard.models.opening import open_checkpoint
from steelyard.text.prompt import prompt_tokens

MAX_PROMPT = 8 << 20  # bytes
HELP = console.examples(
    "Answer a prompt, streaming to the terminal: as a chat where the model has a template, else as a continuation.",
    'generate MODEL "What is a steelyard?"',
    'generate MODEL "Once upon a time" --raw --temperature 0.8 --seed 7 --max-tokens 100',
)


def command(
    model: Annotated[str, typer.Argument(help="A model or adapter: a folder or a source.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    system: Annotated[str | None, typer.Option(help="A system message before it.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same answer.")] = None,
    as_json: console.Json = False,
) -> None:
    """See HELP."""
    console.logs()
    text = _standard_input() if prompt == "-" else prompt
    opened = open_checkpoint(resolve(model))
    if raw or opened.template is None:
        if system is not None:
            raise ConfigError("--system needs a model with a chat template, and no --raw")
        bos = opened.tokenizer.bos_id
        ids = ([] if bos is None else [bos]) + opened.tokenizer.encode_plain(text)
    else:
        turns = [] if system is None else [{"role": "system", "content": system}]
        ids = prompt_tokens(opened.tokenizer, opened.template, [[*turns, {"role": "user", "content": text}]])[0]
    adapters = {} if opened.adapter is None else {"adapter": opened.adapter}
    engine = Engine(opened.decoder, opened.tokenizer, adapters)
    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    request = Request(id="prompt", prompt=ids, sampling=sampling, adapter=next(iter(adapters), None))
    started, answer = time.perf_counter(), ""
    last = None
    for output in engine.run([request]):
        answer += output.text
        last = output
        if not as_json:
            print(output.text, end="", flush=True)
    assert last is not None, "a request has at least one token"
    seconds = time.perf_counter() - started
    values = {
        "text": answer,
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": last.completion_tokens,
        "tokens_per_second": last.completion_tokens / seconds,
    }
    if as_json:
        console.result(values, True)
        return
    print()
    console.note(f"[dim]{last.completion_tokens} tokens, {values['tokens_per_second']:.0f} tokens/s[/dim]")


def _standard_input() -> str:
    content = sys.stdin.buffer.read(MAX_PROMPT + 1)
    if len(content) > MAX_PROMPT:
        raise DataError(f"the prompt is over {MAX_PROMPT >> 20} MB", file="standard input")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} is not UTF-8", file="standard input") from None
