"""Figures equal scikit-learn's definitions, log-probabilities equal transformers' in separate passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from steelyard.data.rows import Conversation, Message
from steelyard.errors import CheckpointError, DataError
from steelyard.evaluate import classification
from steelyard.evaluate.classification import Question
from steelyard.models.opening import Opened, open_checkpoint

LABELS = ("ham", "spam", "card_arrival")


@pytest.fixture(scope="module")
def opened(tiny_model: Path) -> Opened:
    return open_checkpoint(tiny_model, torch.float32)


def asked(*texts: str, label: str | None = None) -> list[Conversation]:
    return [
        Conversation(messages=(Message("user", text), Message("assistant", "ham")), label=label, line=place)
        for place, text in enumerate(texts, 1)
    ]


@pytest.mark.parametrize("labels", [2, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_figures_equal_scikit_learns(labels: int, seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    truth, predicted = torch.randint(labels, (2, 50), generator=torch.Generator().manual_seed(seed)).tolist()
    counts = classification.confusion(truth, predicted, labels)
    assert counts.tolist() == metrics.confusion_matrix(truth, predicted, labels=range(labels)).tolist()
    assert classification.accuracy(counts) == pytest.approx(metrics.accuracy_score(truth, predicted), abs=1e-6)
    assert classification.matthews(counts) == pytest.approx(metrics.matthews_corrcoef(truth, predicted), abs=1e-12)


@pytest.mark.parametrize(
    ("counts", "accuracy", "matthews"),
    [
        ([[5, 0], [0, 5]], 1.0, 1.0),
        ([[0, 5], [5, 0]], 0.0, -1.0),
        ([[5, 0], [5, 0]], 0.5, 0.0),  # one prediction only: undefined
        ([[4, 1], [2, 3]], 0.7, (4 * 3 - 1 * 2) / (5 * 5 * 6 * 4) ** 0.5),
        ([[2, 0, 0], [0, 2, 0], [0, 0, 2]], 1.0, 1.0),
    ],
)
def test_figures_by_hand(counts: list[list[int]], accuracy: float, matthews: float) -> None:
    assert classification.accuracy(torch.tensor(counts)) == pytest.approx(accuracy)
    assert classification.matthews(torch.tensor(counts)) == pytest.approx(matthews)


def test_confusion_has_the_truth_in_its_rows() -> None:
    assert classification.confusion([0, 0, 1], [1, 1, 1], 3).tolist() == [[0, 2, 0], [0, 1, 0], [0, 0, 0]]


def test_branches_equal_separate_passes(opened: Opened, tiny_model: Path) -> None:
    texts = ["Win now!", "The steelyard weighs exactly with one moving weight. " * 4, "今天天气很好"]
    questions = classification.questions(asked(*texts), LABELS, opened.tokenizer, opened.template)
    scores = classification.score(opened.decoder, None, questions)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = torch.zeros(len(texts), len(LABELS))
    for row, question in enumerate(questions):
        for label, answer in enumerate(question.answers):
            with torch.inference_mode():
                logits = reference(torch.tensor([question.prompt + answer])).logits[0]
            before = logits[len(question.prompt) - 1 : -1].log_softmax(-1)
            expected[row, label] = before.gather(1, torch.tensor(answer)[:, None]).sum()
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-4)


def test_scores_keep_the_order_of_rows_over_several_packs(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [Question([1, *range(10, 10 + n)], [[20, 2], [30, 31, 2]]) for n in (3, 40, 9, 60, 1)]
    together = classification.score(opened.decoder, None, questions)
    monkeypatch.setattr(classification, "PACK_TOKENS", 50)
    done: list[int] = []
    apart = classification.score(opened.decoder, None, questions, done.append)
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=1e-4)
    assert done[-1] == len(questions)
    assert len(done) > 1


def test_a_question_is_the_prompt_and_every_label_with_its_end_of_turn(opened: Opened) -> None:
    (question,) = classification.questions(asked("Win now!"), LABELS, opened.tokenizer, opened.template)
    decode = opened.tokenizer.decode
    assert decode(question.prompt, False).endswith("user\nWin now!<|im_end|>\n<|im_start|>assistant\n")
    assert [decode(answer, False) for answer in question.answers] == [f"{label}<|im_end|>" for label in LABELS]


def test_what_cannot_be_classified(opened: Opened) -> None:
    with pytest.raises(CheckpointError, match="no chat template"):
        classification.questions(asked("a"), LABELS, opened.tokenizer, None)
    assert classification.labels_of(asked("a", label="b") + asked("c", label="a")) == ("a", "b")
    with pytest.raises(DataError, match="has no label"):
        classification.labels_of(asked("a"))
