"""Whatever is said: what is trained is what the assistant says, and the tokens together are the rendered text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.data.rows import Conversation, Message
from steelyard.data.tokenize import prompts, tokenize
from steelyard.errors import DataError, TemplateError
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.tokenizer import Tokenizer

CONTROL = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
Ready = tuple[Tokenizer, ChatTemplate]

# Text of any script, mixed with control tokens spelled out; no noncharacter U+FDD0, which the guard takes for itself.
piece = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufdd0")), st.sampled_from(CONTROL)
)
content = st.lists(piece, min_size=1, max_size=4).map("".join).filter(str.strip)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    turns = [Message("system", draw(content))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Message("user", draw(content)))
        turns.append(Message("assistant", draw(content), draw(st.booleans())))
    if not any(turn.trained for turn in turns if turn.role == "assistant"):
        turns[-1] = Message("assistant", turns[-1].content)
    return Conversation(messages=tuple(turns))


@pytest.fixture(scope="module")
def ready(tiny_tokenizer_folder: Path) -> Iterator[Ready]:
    template = ChatTemplate.load(tiny_tokenizer_folder)
    assert template is not None
    yield Tokenizer.load(tiny_tokenizer_folder), template
    template.close()


@given(conversations())
def test_trained_tokens_are_what_the_assistant_says(ready: Ready, chat: Conversation) -> None:
    tokenizer, template = ready
    (row,) = tokenize([chat], tokenizer, template, 1 << 20)
    runs: list[list[int]] = []
    for place, (token, counts) in enumerate(zip(row.tokens, row.trained, strict=True)):
        if counts and not row.trained[place - 1]:
            runs.append([])
        if counts:
            runs[-1].append(token)
    said = [turn.content for turn in chat.messages if turn.role == "assistant" and turn.trained]
    assert [tokenizer.decode(run, skip_special_tokens=False) for run in runs] == [f"{text}<|im_end|>" for text in said]
    for run in runs:
        assert run[-1] in tokenizer.eos_ids
        assert not set(run[:-1]) & tokenizer.special_tokens.keys(), "what is spelled out is text"


@given(conversations())
def test_the_tokens_are_those_of_the_rendered_conversation(ready: Ready, chat: Conversation) -> None:
    tokenizer, template = ready
    (row,) = tokenize([chat], tokenizer, template, 1 << 20)
    turns = [{"role": turn.role, "content": turn.content} for turn in chat.messages]
    text = template.render(turns, add_generation_prompt=False)
    assert tokenizer.decode(row.tokens, skip_special_tokens=False) == text
    controls = sum(1 for token in row.tokens if token in tokenizer.special_tokens)
    shown = len(turns) + (chat.messages[0].role != "system")  # the template adds a system turn
    assert controls == 2 * shown, "a beginning and an end of each turn, and no other"


@given(conversations())
def test_a_prompt_is_the_beginning_of_what_was_trained(ready: Ready, chat: Conversation) -> None:
    tokenizer, template = ready
    (row,) = tokenize([chat], tokenizer, template, 1 << 20)
    asked = Conversation(messages=chat.messages[:-1])
    (prompt,) = prompts([asked], tokenizer, template)
    assert row.tokens[: len(prompt)] == prompt


def test_a_template_that_fails_names_file_and_line(tiny_tokenizer_folder: Path) -> None:
    source = "{% for m in messages %}{{ m.content if m.content != 'bad' else raise_exception('never') }};{% endfor %}"
    template = ChatTemplate(source, bos_token="", eos_token="")
    rows = [
        Conversation(
            messages=(Message("user", text), Message("assistant", "x")), file=Path("rows.jsonl"), line=10 * place
        )
        for place, text in enumerate(["good", "fine", "bad", "bad"], 1)
    ]
    tokenizer = Tokenizer.load(tiny_tokenizer_folder)
    for run in (lambda: tokenize(rows, tokenizer, template, 100), lambda: prompts(rows, tokenizer, template)):
        with pytest.raises(TemplateError, match="never") as failed:
            run()
        assert str(failed.value).startswith("rows.jsonl:30: ")
    template.close()


def test_a_template_that_leaves_out_an_answer_names_the_row(tiny_tokenizer_folder: Path) -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content.replace('secret', '') }}{% endfor %}", bos_token="", eos_token=""
    )
    turns = (Message("user", "a"), Message("assistant", "secret"), Message("user", "b"), Message("assistant", "c"))
    row = Conversation(messages=turns, file=Path("rows.jsonl"), line=3)
    with pytest.raises(DataError, match="leaves out a message of the assistant") as failed:
        tokenize([row], Tokenizer.load(tiny_tokenizer_folder), template, 100)
    assert str(failed.value).startswith("rows.jsonl:3: ")
    template.close()
