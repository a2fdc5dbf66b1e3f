"""From a conversation to the tokens that a model reads: what the ways of conversing have in common."""

from __future__ import annotations

from steelyard.errors import RequestError, TemplateError
from steelyard.serve.models import ServedModel


def rendered(
    served: ServedModel, messages: list[dict[str, str]], tools: str | None, param: str = "messages"
) -> list[int]:
    """The token ids of a conversation. Raises as `rendered_text` does."""
    return served.tokenizer.encode_rendered(rendered_text(served, messages, tools, param))


def rendered_text(
    served: ServedModel, messages: list[dict[str, str]], tools: str | None = None, param: str = "messages"
) -> str:
    """A conversation up to where the assistant begins to answer; control tokens that users wrote are marked as text.

    What is told of tools is the end of the first system message. `param` is the field that the messages came from.

    Raises:
        RequestError: the model was not made to chat, or its template refuses the messages.
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
        raise RequestError(str(error), param=param, code="template_failed") from None
