"""Beams against all continuations, and against transformers' own."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.infer.decoding.beam import Beams, Ended
from steelyard.infer.request import Beam

END = 0


def table(seed: int, vocabulary: int, length: int) -> dict[tuple[int, ...], torch.Tensor]:
    """Log-probabilities of what follows every text up to a length."""
    draw = torch.Generator().manual_seed(seed)
    return {
        text: (2 * torch.randn(vocabulary, generator=draw)).log_softmax(-1)
        for size in range(length)
        for text in itertools.product(range(1, vocabulary), repeat=size)
    }


def search(beam: Beam, known: dict[tuple[int, ...], torch.Tensor], most: int) -> list[Ended]:
    """Run beams over the table."""
    beams, texts = Beams(beam, frozenset({END}), most), [()]
    while True:
        steps = beams.advance(torch.stack([known[text] for text in texts]))
        if not steps:
            return beams.best()
        texts = [(*texts[step.row], step.token) for step in steps]  # type: ignore[misc]


def score(text: tuple[int, ...], known: dict[tuple[int, ...], torch.Tensor], penalty: float) -> float:
    total = sum(float(known[text[:place]][token]) for place, token in enumerate(text))
    return total / float(len(text) ** penalty)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(2, 4), st.integers(1, 4), st.sampled_from([0.0, 0.7, 1.0]))
def test_wide_beams_find_the_best_of_all(seed: int, vocabulary: int, most: int, penalty: float) -> None:
    known = table(seed, vocabulary, most)
    beam = Beam(width=600, length_penalty=penalty, early_stopping="never")
    found = search(beam, known, most)
    every = [(*text, END) for size in range(most) for text in itertools.product(range(1, vocabulary), repeat=size)]
    every += list(itertools.product(range(1, vocabulary), repeat=most))
    expected = sorted(every, key=lambda text: -score(text, known, penalty))
    assert len(found) == len(expected)
    for ended, text in zip(found, expected, strict=True):
        assert ended.score == pytest.approx(score(text, known, penalty), abs=1e-4)
        assert ended.score == pytest.approx(score(ended.tokens, known, penalty), abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 3), st.floats(0.0, 3.0))
def test_groups_against_their_rule(seed: int, width: int, diversity: float) -> None:
    """Each group alone, over a table from which what the groups before it have just chosen is taken off."""
    known, most, groups = table(seed, 4, 4), 4, 3
    beam = Beam(width=width * groups, groups=groups, diversity=diversity, early_stopping="never")
    beams, texts = Beams(beam, frozenset({END}), most), [()]
    alone = [Beams(Beam(width=width, early_stopping="never"), frozenset({END}), most) for _ in range(groups)]
    own: list[list[tuple[int, ...]]] = [[()] for _ in range(groups)]
    while texts:
        steps = beams.advance(torch.stack([known[text] for text in texts]))
        texts = [(*texts[step.row], step.token) for step in steps]  # type: ignore[misc]
        taken = torch.zeros(4)
        for number, single in enumerate(alone):
            if single.done:
                continue
            found = single.advance(torch.stack([known[text] - diversity * taken for text in own[number]]))
            own[number] = [(*own[number][step.row], step.token) for step in found]
            for step in found:
                taken[step.token] += 1
        own = [[] if single.done else texts for single, texts in zip(alone, own, strict=True)]
        assert texts == [text for group in own for text in group]
    expected = sorted((ended for single in alone for ended in single.best()), key=lambda ended: -ended.score)
    assert [ended.score for ended in beams.best()] == pytest.approx([ended.score for ended in expected])


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [-0.5, 0.0, 1.0, 2.0])
def test_as_transformers_has_it(early: Any, penalty: float) -> None:
    """Its search over the same tables, by a model that only looks them up."""
    transformers = pytest.importorskip("transformers")
    for seed, width in itertools.product(range(6), (2, 3, 4)):
        known, most = table(seed, 5, 5), 5

        class Lookup(transformers.LlamaForCausalLM):  # type: ignore[misc,name-defined]
            def forward(self, input_ids: torch.Tensor, known: Any = known, **others: Any) -> Any:
                rows = [known[tuple(row[1:])] for row in input_ids.tolist()]
                return transformers.modeling_outputs.CausalLMOutput(logits=torch.stack(rows)[:, None])

        config = transformers.LlamaConfig(
            vocab_size=5, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        )
        made = Lookup(config).generate(
            torch.tensor([[4]]),
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=most,
            length_penalty=penalty,
            early_stopping=early,
            do_sample=False,
            use_cache=False,
            eos_token_id=END,
            pad_token_id=END,
            return_dict_in_generate=True,
            output_scores=True,
        )
        found = search(Beam(width=width, length_penalty=penalty, early_stopping=early), known, most)
        wanted = []
        for row in made.sequences[:, 1:].tolist():
            cut = row.index(END) + 1 if END in row else len(row)
            wanted.append(tuple(row[:cut]))
        assert [ended.tokens for ended in found] == wanted, (seed, width)
        assert [ended.score for ended in found] == pytest.approx(made.sequences_scores.tolist(), abs=1e-4)
