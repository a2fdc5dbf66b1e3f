"""From a conversation to the tokens that a model reads: what the ways of conversing have in common."""

from __future__ import annotations

from collections.abc import Sequence

from steelyard.errors import RequestError, TemplateError
from steelyard.infer import effort
from steelyard.serve.models import ServedModel
from steelyard.serve.protocol.tools import Offer
from steelyard.text.prompt import Answers, answer_tokens
from steelyard.text.reasoning import ReasoningReader, begun, thinks
from steelyard.text.source import Source, marked, source_of_chat


def rendered(
    served: ServedModel, messages: list[dict[str, str]], offer: Offer | None = None, param: str = "messages"
) -> str:
    """A conversation up to where the assistant begins to answer; control tokens that users wrote are marked as text.

    What is told of tools is the template's to say; where it knows none, the end of the first system message.

    Args:
        served: whose template it is.
        messages: each with `role` and `content`.
        offer: the tools.
        param: the field that the messages came from.

    Raises:
        RequestError: the model was not made to chat, or its template refuses the messages.
    """
    template = served.template
    if template is None:
        raise _no_chat(served)
    tools = None
    if offer is not None and offer.offered:
        if template.knows_tools:
            tools = [{"type": "function", "function": served.tokenizer.guard_all(one)} for one in offer.described]
        else:
            first = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
            rest = messages[1:] if first else messages
            messages = [{"role": "system", "content": first + offer.told}, *rest]
    try:
        guarded = served.tokenizer.guard_messages(messages)
        return template.render(guarded, add_generation_prompt=True, tools=tools)
    except TemplateError as error:
        raise RequestError(str(error), param=param, code="template_failed") from None


def chat_source(served: ServedModel, messages: list[dict[str, str]], offer: Offer | None = None) -> Source:
    """A conversation's prompt, with what each token stands for and whose it is. Raises as `rendered` does."""
    text = rendered(served, messages, offer)
    marks = [{**message, "content": marked(message.get("content", ""))} for message in messages]
    return source_of_chat(served.tokenizer, text, rendered(served, marks, offer))


def answers_to(served: ServedModel, messages: list[dict[str, str]], said: Sequence[str], param: str) -> Answers:
    """The tokens of possible answers to a conversation.

    Raises:
        RequestError: the model was not made to chat, its template refuses the messages or writes no answer after a
            prompt, or one is too long.
    """
    if served.template is None:
        raise _no_chat(served)
    try:
        found = answer_tokens(served.tokenizer, served.template, messages, said)
    except TemplateError as error:
        raise RequestError(str(error), param=param, code="template_failed") from None
    effort.check_answers(found.whole, param)
    return found


def reasoning_reader(served: ServedModel, prompt: str, *, formed: bool = False) -> ReasoningReader | None:
    """What parts an answer's thoughts from it; None: the model has no marks for them, or it is `formed`: all of it has
    a form that leaves no room for thoughts.
    """
    if formed or served.template is None or not thinks(served.template.source):
        return None
    return ReasoningReader(inside=begun(prompt))


def _no_chat(served: ServedModel) -> RequestError:
    reason = f"'{served.id}' has no chat template, it was not made to chat: use /v1/completions"
    return RequestError(reason, param="model")
