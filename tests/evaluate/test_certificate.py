"""The certificate: zero for a model against itself, and a refusal past every threshold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from steelyard.data.rows import TokenRow
from steelyard.errors import FidelityError
from steelyard.evaluate import certificate
from steelyard.evaluate.certificate import Certificate, TaskDelta, Thresholds, compare, golden_texts, judge
from steelyard.evaluate.likelihood import negative_log_likelihood
from steelyard.models.opening import Opened, open_checkpoint


@pytest.fixture(scope="module")
def opened(tiny_model: Path) -> Opened:
    return open_checkpoint(tiny_model, torch.float32)


def judged(thresholds: Thresholds, accept: bool = False, **changed: Any) -> Certificate:
    measured: dict[str, Any] = dict.fromkeys(
        ("kl_mean", "kl_max", "max_logit_error", "bits_per_byte_before", "bits_per_byte_after", "top1_agreement"), 0.0
    )
    measured |= {"prompts": 32, "prompts_sha256": "", "tokens": 100, "bits_per_byte_change": 0.0, **changed}
    tasks = measured.pop("tasks", {})
    return judge(measured, thresholds, accept, parent="sha256:0", tasks=tasks, bytes_before=10, bytes_after=5)


def test_the_golden_texts_are_32_and_distinct() -> None:
    texts = golden_texts()
    assert len(texts) == len(set(texts)) == 32
    assert all(len(text.split()) > 3 or len(text) > 12 for text in texts)


def test_a_model_against_itself(opened: Opened) -> None:
    done: list[tuple[int, int]] = []
    measured = compare(opened.decoder, opened.decoder, opened.tokenizer, lambda at, of: done.append((at, of)))
    for name in ("kl_mean", "kl_max", "max_logit_error", "bits_per_byte_change"):
        assert measured[name] == 0.0
    assert measured["bits_per_byte_before"] == measured["bits_per_byte_after"] > 0
    assert measured["top1_agreement"] == 1.0
    assert measured["bits_per_byte_interval"] == (0.0, 0.0)
    assert done[-1] == (32, 32)
    found = judge(measured, Thresholds(bits_per_byte=0.0, kl=0.0), parent="x", bytes_before=1, bytes_after=1)
    assert found.passed
    assert not found.accepted


def test_a_model_that_moved_is_measured(opened: Opened, tiny_model: Path) -> None:
    moved = open_checkpoint(tiny_model, torch.float32).decoder
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter *= 1.05
    measured = compare(opened.decoder, moved, opened.tokenizer)
    assert 0 < measured["kl_mean"] < measured["kl_max"]
    assert measured["max_logit_error"] > 0
    low, high = measured["bits_per_byte_interval"]
    assert low < measured["bits_per_byte_change"] < high
    text = golden_texts()[0]
    golden = measured["golden"][0]
    assert golden.tokens == opened.tokenizer.encode_plain(text)[:32]
    row = TokenRow(tokens=golden.tokens, trained=[False] + [True] * (len(golden.tokens) - 1))
    nats, count = negative_log_likelihood(moved, None, [row])
    assert (sum(golden.nats), len(golden.nats)) == (pytest.approx(nats, rel=1e-4), count)


def test_what_stands_before_every_text_is_not_judged(tiny_model: Path) -> None:
    opened = open_checkpoint(tiny_model, torch.float32)
    opened.tokenizer.__dict__["beginning"] = [1, 2]  # a tokenizer that puts two tokens there
    measured = compare(opened.decoder, opened.decoder, opened.tokenizer)
    golden = measured["golden"][0]
    assert golden.tokens[:2] == [1, 2]
    assert len(golden.nats) == len(golden.tokens) - 2 == 30
    row = TokenRow(tokens=golden.tokens, trained=[False, False] + [True] * 30)
    assert sum(golden.nats) == pytest.approx(negative_log_likelihood(opened.decoder, None, [row])[0], rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "thresholds"),
    [
        ({"bits_per_byte_change": 0.021}, Thresholds()),
        ({"bits_per_byte_change": math.nan}, Thresholds(bits_per_byte=math.inf)),
        ({"kl_mean": 0.2}, Thresholds(kl=0.1)),
        ({"kl_mean": math.nan}, Thresholds(kl=0.1)),
        ({"tasks": {"a": TaskDelta(measure="accuracy", before=0.9, after=0.87)}}, Thresholds()),
        ({"tasks": {"a": TaskDelta(measure="loss", before=1.0, after=1.03)}}, Thresholds()),
        ({"tasks": {"a": TaskDelta(measure="loss", before=1.0, after=math.nan)}}, Thresholds(task=10.0)),
    ],
)
def test_past_a_threshold_it_is_refused_unless_accepted(changed: dict[str, Any], thresholds: Thresholds) -> None:
    found = judged(thresholds, **changed)
    assert not found.passed
    with pytest.raises(FidelityError, match=r"past its thresholds .*bits per byte.*nothing was written.*--accept"):
        certificate.demand(found)
    accepted = judged(thresholds, True, **changed)
    assert (accepted.passed, accepted.accepted) == (False, True)
    certificate.demand(accepted)


def test_what_is_within_is_passed_and_needs_no_acceptance() -> None:
    found = judged(Thresholds(kl=0.1), True, bits_per_byte_change=0.02, kl_mean=0.1)
    assert (found.passed, found.accepted) == (True, False)
    certificate.demand(found)
