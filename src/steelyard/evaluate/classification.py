"""Classification by label log-probability: which of the given answers the model finds likeliest, and how well it does.

An answer's probability is that of all its tokens, its end of turn included, after the prompt. The prompt is computed
once: the answers are branches of its row.
"""

# R rows  L labels

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch

from steelyard.data.packing import bins
from steelyard.data.rows import Conversation
from steelyard.data.tokenize import prompts
from steelyard.errors import CheckpointError, DataError
from steelyard.models.attention import PackedAttention
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.prompt import segment_tokens
from steelyard.text.tokenizer import Tokenizer

PACK_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt's tokens and the tokens of each answer."""

    prompt: list[int]
    answers: list[list[int]]


def questions(
    conversations: Sequence[Conversation], labels: Sequence[str], tokenizer: Tokenizer, template: ChatTemplate | None
) -> list[Question]:
    """Everything before the last turn as the prompt, each label as a possible last turn.

    Raises:
        CheckpointError: the model has no chat template, or one that shows no prompt or no answer.
        TemplateError: the template fails on a row, by file and line.
    """
    if template is None:
        raise CheckpointError("this model has no chat template, which classification needs; use an instruct model")
    if not conversations:
        return []
    before = [
        msgspec.structs.replace(chat, messages=chat.messages[:-1]) if chat.messages[-1].role == "assistant" else chat
        for chat in conversations
    ]
    asked = prompts(before, tokenizer, template)
    turns = [{"role": turn.role, "content": turn.content} for turn in before[0].messages]
    answered = [[*turns, {"role": "assistant", "content": label}] for label in labels]
    answers = [_last_spoken(parts) for parts in segment_tokens(tokenizer, template, answered)]
    if not all(answers) or not all(asked):
        raise CheckpointError("the chat template shows nothing of a prompt or an answer: it cannot classify")
    return [Question(prompt, answers) for prompt in asked]


def check_lengths(asked: Sequence[Question], conversations: Sequence[Conversation], context: int) -> None:
    """Refuse questions that the model was not made for.

    Raises:
        DataError: a prompt that does not fit into `context` tokens with its longest answer, by file and line.
    """
    for question, chat in zip(asked, conversations, strict=True):
        length = len(question.prompt) + max(map(len, question.answers))
        if length > context:
            reason = f"{length} tokens with the answer; the model's context holds {context}: shorten the text"
            raise DataError(reason, file=chat.file, line=chat.line)


@torch.inference_mode()
def score(
    decoder: Decoder,
    adapter: Adapter | None,
    asked: Sequence[Question],
    report: Callable[[int], None] = lambda rows: None,
) -> torch.Tensor:
    """Log-probability of every answer to every question.

    Returns:
        `[R, L]` float32, in nats.

    Raises:
        CheckpointError: a figure that is not a number: the weights are broken.
    """
    scores = torch.empty(len(asked), len(asked[0].answers) if asked else 0)
    lengths = [len(question.prompt) + sum(map(len, question.answers)) for question in asked]
    done = 0
    for group in bins(lengths, PACK_TOKENS):
        scores[torch.tensor(group)] = _score_pack(decoder, adapter, [asked[row] for row in group])
        done += len(group)
        report(done)
    if not bool(scores.isfinite().all()):
        raise CheckpointError(
            "the model's log-probabilities are not finite: its weights are broken, pull or train anew"
        )
    return scores


def _score_pack(decoder: Decoder, adapter: Adapter | None, asked: Sequence[Question]) -> torch.Tensor:
    tokens: list[int] = []
    positions: list[int] = []
    branches: list[int] = []
    before: list[int] = []  # where the hidden state stands that predicts each answer token
    targets: list[int] = []
    owner: list[int] = []  # row * labels + label of each answer token
    for row, question in enumerate(asked):
        start, length = len(tokens), len(question.prompt)
        tokens += question.prompt
        positions += range(length)
        branches += [0] * length
        for label, answer in enumerate(question.answers):
            before += [start + length - 1, *range(len(tokens), len(tokens) + len(answer) - 1)]
            targets += answer
            owner += [row * len(question.answers) + label] * len(answer)
            tokens += answer
            positions += range(length, length + len(answer))
            branches += [label + 1] * len(answer)
    lengths = [len(question.prompt) + sum(map(len, question.answers)) for question in asked]
    attend = PackedAttention(lengths, torch.tensor(branches))
    hidden_states = decoder(torch.tensor(tokens), torch.tensor(positions), attend, adapter)
    needed, inverse = torch.unique(torch.tensor(before), return_inverse=True)
    logits = decoder.logits(hidden_states[needed]).float()
    normalizer = logits.logsumexp(-1)
    chosen = logits[inverse, torch.tensor(targets)] - normalizer[inverse]
    scores = torch.zeros(len(asked) * len(asked[0].answers))
    scores.index_add_(0, torch.tensor(owner), chosen)
    return scores.view(len(asked), -1)


def labels_of(conversations: Sequence[Conversation]) -> tuple[str, ...]:
    """All labels of labelled rows, sorted.

    Raises:
        DataError: a row without a label.
    """
    for conversation in conversations:
        if conversation.label is None:
            reason = "has no label; classification needs labelled rows"
            raise DataError(reason, file=conversation.file, line=conversation.line)
    return tuple(sorted({str(conversation.label) for conversation in conversations}))


def confusion(truth: Sequence[int], predicted: Sequence[int], labels: int) -> torch.Tensor:
    """`[L, L]` int64 counts: rows are the truth, columns the prediction."""
    flat = torch.tensor(truth, dtype=torch.int64) * labels + torch.tensor(predicted, dtype=torch.int64)
    return flat.bincount(minlength=labels * labels).view(labels, labels)


def accuracy(counts: torch.Tensor) -> float:
    """Share of rows on the diagonal."""
    return int(counts.diagonal().sum()) / int(counts.sum())


def interval(correct: int, count: int) -> tuple[float, float]:
    """Between which a share of `correct` in `count` is, with 95% (Wilson 1927)."""
    z = 1.959964
    share, spread = correct / count, z * math.sqrt(correct * (count - correct) / count + z**2 / 4) / count
    middle, whole = share + z**2 / (2 * count), 1 + z**2 / count
    return (middle - spread) / whole, (middle + spread) / whole


def matthews(counts: torch.Tensor) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004, equation 8); 0 where it is undefined."""
    c = counts.double()
    total, correct = c.sum(), c.diagonal().sum()
    truth, predicted = c.sum(1), c.sum(0)
    above = correct * total - truth @ predicted
    below = ((total**2 - predicted @ predicted) * (total**2 - truth @ truth)).sqrt()
    return float(above / below) if below > 0 else 0.0


def _last_spoken(parts: Sequence[tuple[list[int], bool]]) -> list[int]:
    return next((tokens for tokens, spoken in reversed(parts) if spoken), [])
