"""A model's chat template: a conversation to the text that the model was trained on.

Knows messages and texts; nothing of tokens. The template is not trusted: it is rendered in a process of its own,
under limits of time, memory and output (see template_worker.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steelyard.errors import CheckpointError, TemplateError
from steelyard.text.bounded import read_bytes, read_optional_object, token_content
from steelyard.text.segments import Segment, cut, prefixes
from steelyard.text.tool_calls import OPEN
from steelyard.text.worker_process import WorkerProcess, frame

MAX_SOURCE = 256 << 10  # bytes
FRAME_TEXT = 250_000  # characters of the messages in one frame; a single conversation may have more
FRAME_COUNT = 256  # conversations in one frame
CPU_SECONDS = 0.15
MEMORY = 64 << 20
MAX_OUTPUT = 1_000_000  # characters of one rendering

Messages = list[dict[str, str]]


class ChatTemplate:
    """Renders conversations with a Jinja template. Safe to use from several threads and after a fork.

    Args:
        source: the Jinja source, at most 256 KB.
        bos_token: the text of the token that begins a text; empty if there is none.
        eos_token: the text of the token that ends one.

    Raises:
        TemplateError: the source is too large.
    """

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        if len(source.encode(errors="replace")) > MAX_SOURCE:
            raise TemplateError(
                f"the chat template is over {MAX_SOURCE >> 10} KB: use a template that was not generated"
            )
        self.source = source
        hello = {
            "source": source,
            "variables": {"bos_token": bos_token, "eos_token": eos_token},
            "output": MAX_OUTPUT,
        }
        worker = "steelyard.text.template_worker"
        self._process = WorkerProcess(worker, hello, cpu_seconds=CPU_SECONDS, memory=MEMORY)

    @classmethod
    def load(cls, folder: Path) -> ChatTemplate | None:
        """The template of a checkpoint folder: chat_template.jinja, else `chat_template` in tokenizer_config.json.

        Returns:
            None if the checkpoint has none: it is no chat model.

        Raises:
            CheckpointError: a file is broken or too large.
        """
        path = folder / "tokenizer_config.json"
        config = read_optional_object(path)
        source: object = config.get("chat_template")
        if (folder / "chat_template.jinja").is_file():
            path = folder / "chat_template.jinja"
            try:
                source = read_bytes(path, MAX_SOURCE).decode()
            except UnicodeDecodeError:
                raise CheckpointError(f"'{path}' is not UTF-8; pull the checkpoint again") from None
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default", next(iter(named.values()), None))
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(f"'{path}': chat_template is neither a string nor a list of named ones; correct it")
        try:
            return cls(
                source,
                bos_token=token_content(config.get("bos_token")) or "",
                eos_token=token_content(config.get("eos_token")) or "",
            )
        except TemplateError as error:
            raise CheckpointError(f"'{path}': {error}") from None

    @property
    def knows_tools(self) -> bool:
        """Whether it tells a model of tools, who then calls them as `tool_calls` reads it (Hermes, Qwen, SmolLM3)."""
        return bool(re.search(r"\btools\b", self.source)) and OPEN in self.source

    def render(
        self, messages: Messages, *, add_generation_prompt: bool = True, tools: list[dict[str, Any]] | None = None
    ) -> str:
        """The text of one conversation, of at most 1,000,000 characters.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end with what begins the assistant's turn.
            tools: in OpenAI's shape; of a template that knows tools.

        Raises:
            TemplateError: the template failed, or passed its limits of time, memory or output.
        """
        if tools is None:
            return self._render([(messages, add_generation_prompt)])[0]
        texts, reason = self._exchange([(messages, add_generation_prompt)], tools)
        if reason is not None:
            raise TemplateError(reason)
        return texts[0]

    def render_many(self, conversations: Sequence[tuple[Messages, bool]]) -> list[str]:
        """`render` for many `(messages, add_generation_prompt)`, each under its own limits.

        Raises:
            TemplateError: names the first conversation that fails, counted from 0.
        """
        return self._render(conversations, range(len(conversations)))

    def render_segments(self, conversations: Sequence[Messages]) -> list[list[Segment]]:
        """Conversations for training: their texts, cut where the assistant begins and ends to speak.

        A segment is `trained` exactly if the assistant says it, the end of its turn included. The segments of a
        conversation together are `render(messages, add_generation_prompt=False)`.

        Raises:
            TemplateError: a conversation fails, or the template writes earlier turns differently once later ones
                follow, so that no text is both what was said and what is read later.
        """
        wanted = [prefixes(messages) for messages in conversations]
        numbers = [n for n, entries in enumerate(wanted) for _ in entries]
        texts = iter(self._render([entry for entries in wanted for entry in entries], numbers))
        return [cut([next(texts) for _ in entries], f"conversation {n}: ") for n, entries in enumerate(wanted)]

    def close(self) -> None:
        """End the worker. A later rendering starts a new one."""
        self._process.stop()

    def _render(
        self, conversations: Sequence[tuple[Messages, bool]], numbers: Sequence[int] | None = None
    ) -> list[str]:
        """The texts, frame by frame. With `numbers`, an error names the number of the conversation that fails."""
        texts: list[str] = []
        while len(texts) < len(conversations):
            batch: list[tuple[Messages, bool]] = []
            length, reason = 0, None
            for messages, prompt in conversations[len(texts) : len(texts) + FRAME_COUNT]:
                own = sum(len(value) for message in messages for value in message.values())
                if own > MAX_OUTPUT and not batch:
                    reason = f"the conversation is over {MAX_OUTPUT:,} characters: shorten it"
                if own > MAX_OUTPUT or (batch and length + own > FRAME_TEXT):
                    break
                batch.append((messages, prompt))
                length += own
            if reason is None:
                rendered, reason = self._exchange(batch)
                texts += rendered
            if reason is not None:
                raise TemplateError(("" if numbers is None else f"conversation {numbers[len(texts)]}: ") + reason)
        return texts

    def _exchange(
        self, conversations: Sequence[tuple[Messages, bool]], tools: list[dict[str, Any]] | None = None
    ) -> tuple[list[str], str | None]:
        try:
            content = frame(
                [
                    {"messages": messages, "add_generation_prompt": prompt, "tools": tools, "documents": None}
                    for messages, prompt in conversations
                ]
            )
        except UnicodeEncodeError:
            return [], "a message has a lone surrogate (\\ud800 to \\udfff): send well-formed Unicode"
        replies, failure = self._process.exchange(content, len(conversations))
        reason = None if failure is None else failure.reason
        texts: list[str] = []
        for reply in replies:
            text = reply.get("text")
            if not isinstance(text, str):
                reason = str(reply.get("error"))
                break
            texts.append(text)
        return texts, None if reason is None else f"the chat template {reason}"
