"""What was said in a recording, by a network that says a character for every place (CTC): greedily, or by beams.

With beams the checkpoint's model of characters, if it has one, has a say; and every word has its time.
"""

# P places  K characters and the blank

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from steelyard.infer.decoding import ctc, stepped
from steelyard.infer.decoding.stepped import Steps
from steelyard.infer.sound import Word
from steelyard.models import speech
from steelyard.models.mel import HOP, RATE
from steelyard.models.ngram import EDGE, CharacterModel
from steelyard.models.speech import Recogniser

TOGETHER = 64
"""Pieces of recordings that are held at a time."""
PLACE_SECONDS = 2 * HOP / RATE
SAY, LENGTH = 0.5, 1.0
"""Of the model of characters: its weight, and what each character adds, since more of them are less likely."""


def recognise(
    recogniser: Recogniser,
    sounds: Sequence[torch.Tensor],
    report: Callable[[int], None] = lambda done: None,
    *,
    beam: int = 1,
) -> list[str]:
    """The texts of recordings.

    Args:
        recogniser: a network and its characters.
        sounds: each `[S]` float32 of 16 kHz, as long as it may be.
        report: told (recordings done).
        beam: beginnings that are kept; 1 takes the best character of every place.
    """
    pieces = ((number, piece) for number in range(len(sounds)) for piece in recogniser.pieces(sounds[number]))
    texts = [""] * len(sounds)
    while chosen := list(itertools.islice(pieces, TOGETHER)):
        logits = speech.logits_of(recogniser, [piece for _, piece in chosen])
        for (number, _), found in zip(chosen, logits, strict=True):
            text = speech.greedy(found, recogniser.vocabulary) if beam == 1 else searched(recogniser, found, beam)
            texts[number] = f"{texts[number]} {text}".strip()
        report(chosen[-1][0] + 1)
    return texts


def searched(recogniser: Recogniser, logits: torch.Tensor, beam: int) -> str:
    """The likeliest text of logits `[P, K]` by beams."""
    return spelled(recogniser, stepped.last(searching(recogniser, logits, beam))[0].characters)


def searching(recogniser: Recogniser, logits: torch.Tensor, beam: int) -> Steps[None, list[ctc.Beam]]:
    """The likeliest texts by beams, the best first, a place at a step."""
    said = None if recogniser.language is None else _language(recogniser.language, recogniser.vocabulary)
    return ctc.searching(logits.log_softmax(-1), beam, said)


def spelled(recogniser: Recogniser, characters: Sequence[int]) -> str:
    """The text of characters by their numbers."""
    return " ".join("".join(recogniser.vocabulary[character - 1] for character in characters).split())


def _language(model: CharacterModel, vocabulary: Sequence[str]) -> ctc.Language:
    """Shallow fusion (Hannun et al. 2014, equation 2, by characters)."""

    def said(text: tuple[int, ...], character: int | None) -> float:
        if len(text) < model.order:  # the beginning is a context of its own
            before = "".join(vocabulary[each - 1] for each in text)
        else:
            before = "".join(vocabulary[each - 1] for each in text[-model.order :])
        if character is None:
            return SAY * model.log_probability(before, EDGE)
        return SAY * model.log_probability(before, vocabulary[character - 1]) + LENGTH

    return said


def words(recogniser: Recogniser, logits: torch.Tensor, text: str, begin: float = 0.0) -> list[Word]:
    """When each word of a text is said, by the likeliest way to spell it; empty where that is none.

    Args:
        recogniser: see `recognise`.
        logits: `[P, K]` of the sound.
        text: of characters that it knows.
        begin: seconds before the sound.
    """
    numbers = {letter: number for number, letter in enumerate(recogniser.vocabulary, 1)}
    if not text or not numbers.keys() >= set(text):
        return []
    found = ctc.align(logits.log_softmax(-1), [numbers[letter] for letter in text])
    if found is None:
        return []
    spans = iter(found[0])
    made = []
    for spaces, run in itertools.groupby(text, str.isspace):
        own = [next(spans) for _ in run]
        if not spaces:
            made.append((own[0].first, own[-1].last + 1))
    times = [(begin + PLACE_SECONDS * first, begin + PLACE_SECONDS * last) for first, last in made]
    return [
        Word(word, round(first, 3), round(last, 3)) for word, (first, last) in zip(text.split(), times, strict=True)
    ]
