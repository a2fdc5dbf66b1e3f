"""Recordings that stand for words: a tone for each letter; and tiny networks that hear them."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

TONES = {"a": 400, "b": 900, "c": 2000}
MARKS = ("<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|startofprev|>")
LAST_MARKS = ("<|nospeech|>", "<|notimestamps|>")
WHISPER_SIZE = 51_865
"""Of a vocabulary: from here on a Whisper knows several languages."""

Samples = NDArray[np.float64]


def spoken(word: str, rate: int = 8000) -> Samples:
    """A word, a tone a letter; a space is a pause."""
    pieces = [np.zeros(rate // 20)]
    for letter in word:
        time = np.arange(rate // 8) / rate
        tone = np.zeros(len(time)) if letter == " " else 0.4 * np.sin(2 * np.pi * TONES[letter] * time)
        pieces += [tone, np.zeros(rate // 20)]
    return np.concatenate(pieces)


def sound_file(samples: Samples, kind: str = "WAV", rate: int = 8000) -> bytes:
    """A recording as a file."""
    made = io.BytesIO()
    with soundfile.SoundFile(made, "w", rate, 1, format=kind) as file:
        for first in range(0, len(samples), rate):
            file.write(samples[first : first + rate])
    return made.getvalue()


def write_clips(folder: Path, count: int, seed: int, rate: int = 8000) -> Path:
    """Recordings of made-up words, and their list."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(seed)
    with (folder / "list.jsonl").open("w") as file:
        for number in range(count):
            word = "".join(draw.choice("abc") for _ in range(draw.randint(1, 4)))
            soundfile.write(folder / f"{number}.wav", spoken(word, rate), rate)
            file.write(json.dumps({"audio": f"{number}.wav", "text": f"{word.upper()}."}) + "\n")
    return folder / "list.jsonl"


def tiny_whisper(folder: Path, tokenizer_folder: Path, *, length: int = 24) -> Path:
    """A Whisper of random weights that knows English and German."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=WHISPER_SIZE,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=24,
        max_source_positions=1500,
        max_target_positions=length,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    plain: dict[str, Any] = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    known = {token["content"] for token in tokenizer["added_tokens"]}
    begin = max(tokenizer["model"]["vocab"].values()) + 1
    marks = (*MARKS, *LAST_MARKS)
    for number, mark in enumerate(marks):
        assert mark not in known
        tokenizer["added_tokens"].append({"id": begin + number, "content": mark, **plain, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    described = {
        "eos_token_id": 0,
        "decoder_start_token_id": begin,
        "no_timestamps_token_id": begin + len(marks) - 1,
        "suppress_tokens": list(range(begin, begin + len(marks) - 1)),
        "begin_suppress_tokens": [0],
    }
    (folder / "generation_config.json").write_text(json.dumps(described))
    return folder
