"""Conversations as their model's template writes them."""

from __future__ import annotations

from steelyard.errors import RequestError, TemplateError
from steelyard.serve.models import ServedModel


def rendered(served: ServedModel, messages: list[dict[str, str]], tools: str | None = None) -> str:
    """A conversation up to where the assistant begins to answer; control tokens that users wrote are marked as text.

    What is told of tools is the end of the first system message.

    Raises:
        RequestError: the model has no template, or it fails on these messages.
    """
    if tools is not None:
        first = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        rest = messages[1:] if first else messages
        messages = [{"role": "system", "content": first + tools}, *rest]
    if served.template is None:
        raise RequestError(
            f"'{served.id}' has no chat template, it was not made to chat: use /v1/completions", param="model"
        )
    try:
        return served.template.render(served.tokenizer.guard_messages(messages), add_generation_prompt=True)
    except TemplateError as error:
        raise RequestError(str(error), param="messages", code="template_failed") from None
