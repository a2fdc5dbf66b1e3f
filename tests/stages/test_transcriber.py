"""Recognisers of speech by the stages that users call: tones that stand for letters in, letters out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F

from interrupted import ends_the_same
from spoken import write_clips
from steelyard.data import audio
from steelyard.data.audio import Recording
from steelyard.data.audio_augmentation import augmented
from steelyard.data.augmentation import Augmentation
from steelyard.data.chat import FormatConfig
from steelyard.errors import ConfigError, DataError
from steelyard.evaluate.transcription import edits, error_rate
from steelyard.infer import recognition
from steelyard.models import speech
from steelyard.models.ngram import CharacterModel
from steelyard.models.seq2seq import WhisperConfig
from steelyard.models.speech import Recogniser, SpeechCTC, normalised
from steelyard.stages.evaluate import Transcription, evaluate
from steelyard.stages.predict import predict
from steelyard.stages.train import train
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.networks import SpeechNetwork
from steelyard.train.optimizers import OptimizerConfig

SPEECH = SpeechNetwork(hidden=32, layers=1, heads=2, dropout=0.0)


def configuration(folder: Path, **fields: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "task": "transcription",
        "network": SPEECH,
        "output": str(folder / "run"),
        "data": DataConfig(train=str(write_clips(folder / "clips", 80, 0)), holdout=15),
        "epochs": 25,
        "optimizer": OptimizerConfig(name="adamw", learning_rate=5e-3),
    }
    return TrainConfig(**{**settings, **fields})


def test_from_nothing_to_a_text(tmp_path: Path) -> None:
    done = train(configuration(tmp_path, augment=Augmentation(tempo=0.05, mask_frames=2)))
    assert done.metrics["validation_cer"] < 0.1
    held = write_clips(tmp_path / "held", 20, 1)
    found = evaluate(Path(str(done.path)), held, FormatConfig())
    assert isinstance(found, Transcription)
    assert found.character_error_rate < 0.15
    low, high = found.character_error_interval
    assert low <= found.character_error_rate <= high
    assert predict(Path(str(done.path)), held, tmp_path / "out.jsonl", FormatConfig()) == 20
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sum(normalised(row["text"]) == row["prediction"] for row in rows) == round(found.exact * 20)
    assert predict(Path(str(done.path)), tmp_path / "held", tmp_path / "folder.jsonl", FormatConfig()) == 20
    beams = evaluate(Path(str(done.path)), held, FormatConfig(), beam=8)
    assert isinstance(beams, Transcription)
    assert beams.character_error_rate < 0.15
    assert predict(Path(str(done.path)), held, tmp_path / "beams.jsonl", FormatConfig(), beam=8) == 20


def test_beams_ask_the_model_of_characters() -> None:
    """Where the sound leaves two letters alike, what was learnt of letters decides; and each word has its time."""
    sizes = WhisperConfig.parse(
        {
            "vocab_size": 5,
            "d_model": 8,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 1,
            "decoder_attention_heads": 1,
            "encoder_ffn_dim": 8,
            "decoder_ffn_dim": 8,
        }
    )
    language = CharacterModel.learn(["ab ab", "ab", "ab ab ab"], 3)
    recogniser = Recogniser(SpeechCTC(sizes, 4), (" ", "a", "b", "c"), language)
    places = ["", "a", "a", "?", "", " ", "", "a", "?", ""]  # of ?, c is a little likelier than b
    logits = torch.full((len(places), 5), -9.0)
    for place, letter in enumerate(places):
        for number, value in {"": {0: 0.0}, "?": {3: 0.0, 4: 0.1}}.get(letter, {" abc".find(letter) + 1: 0.0}).items():
            logits[place, number] = value
    assert speech.greedy(logits, recogniser.vocabulary) == "ac ac"
    assert recognition.searched(dataclasses.replace(recogniser, language=None), logits, 4) == "ac ac"
    assert recognition.searched(recogniser, logits, 4) == "ab ab"
    words = recognition.words(recogniser, logits, "ab ab", begin=1.0)
    assert [(word.word, word.start, word.end) for word in words] == [("ab", 1.02, 1.08), ("ab", 1.14, 1.18)]
    assert recognition.words(recogniser, logits[:3], "ab ab") == []  # too short a sound
    assert recognition.words(recogniser, logits, "xyz") == []  # letters that it does not know


def test_an_interrupted_run_ends_the_same(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"epochs": 3, "augment": Augmentation(tempo=0.1, mask_bands=9)}
    ends_the_same(tmp_path, lambda folder: configuration(folder, checkpoint_every=2, **fields), (3, 8))


def test_how_a_batch_is_cut_changes_nothing(tmp_path: Path) -> None:
    losses = []
    for tokens in (4096, 60):
        done = train(configuration(tmp_path / str(tokens), epochs=1, micro_batch_tokens=tokens))
        losses.append(done.metrics["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_transfer_of_a_recogniser(tmp_path: Path) -> None:
    first = train(configuration(tmp_path, epochs=10))
    again = speech.on_trained(Path(str(first.path)), "abc", torch.Generator())
    assert torch.equal(again.network.classifier.weight, speech.load(Path(str(first.path))).network.classifier.weight)
    other = speech.on_trained(Path(str(first.path)), "xyz ", torch.Generator())
    assert other.network.classifier.weight.shape == (5, 32)
    assert torch.equal(other.network.encoder.conv1.weight, again.network.encoder.conv1.weight)


def test_the_loss_is_over_all_ways_in_float64() -> None:
    """CTC by enumeration of every path, on a sequence that is short enough for it."""
    import itertools

    logits = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    target = [1, 2, 2]
    total = torch.zeros((), dtype=torch.float64)
    for path in itertools.product(range(3), repeat=5):
        said = [number for number, _ in itertools.groupby(path) if number]
        if said == target:
            total += logits[range(5), path].sum().exp()
    found = F.ctc_loss(logits[:, None], torch.tensor(target), torch.tensor([5]), torch.tensor([3]), reduction="sum")
    torch.testing.assert_close(found, -total.log())


def test_greedy_joins_repeats_and_drops_blanks() -> None:
    path = [1, 1, 0, 1, 3, 3, 0, 0, 2]
    assert speech.greedy(F.one_hot(torch.tensor(path)).float(), ("a", "b", " ")) == "aa b"


def test_edits() -> None:
    assert edits("kitten", "sitting") == 3
    assert edits("", "abc") == edits("abc", "") == 3
    rate, (low, high) = error_rate(["abcd", "ab"], ["abxd", "ab"], list)
    assert rate == pytest.approx(1 / 6)
    assert low <= rate <= high


def test_texts_are_compared_without_signs() -> None:
    assert normalised("  ¡L’Été, ÉTÉ! 3,5 ") == "l'été été 3 5"


@pytest.mark.parametrize(("ending", "kind"), [("wav", "WAV"), ("flac", "FLAC"), ("ogg", "OGG")])
def test_formats_rates_and_channels(tmp_path: Path, ending: str, kind: str) -> None:
    time = np.arange(22_050) / 22_050
    both = np.stack([0.5 * np.sin(2 * np.pi * 300 * time), np.zeros_like(time)], 1)
    path = tmp_path / f"a.{ending}"
    soundfile.write(path, both, 22_050, format=kind)
    found = audio.read(Recording(path=path, text=None, file=path))
    assert len(found) == 16_000
    expected = torch.sin(2 * torch.pi * 300 * torch.arange(16_000) / 16_000) * 0.25
    assert float((found - expected)[500:-500].abs().max()) < 0.02


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"", "no sound"), (b"RIFF no", "no sound"), (b"OggS" + b"\0" * 100, "no sound"), (None, "cannot be read")],
)
def test_what_is_no_sound_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    path = tmp_path / "a.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        audio.read(Recording(path=path, text="a", file=tmp_path / "list.jsonl", line=2))


def test_bad_files_are_left_out_and_told(tmp_path: Path) -> None:
    config = configuration(tmp_path, epochs=1)
    (tmp_path / "clips" / "3.wav").write_text("broken")
    with pytest.raises(DataError, match=r"list.jsonl:4: .*3\.wav.*data.bad_files"):
        train(config)
    data = DataConfig(train=config.data.train, holdout=15, bad_files=1)
    train(msgspec.structs.replace(config, data=data), fresh=True)
    assert "left out" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"augment": Augmentation(flip=True)}, "augment.flip changes images"),
        ({"augment": Augmentation(tempo=1.0)}, "augment.tempo"),
        ({"augment": Augmentation(mask_bands=81)}, "augment.mask_bands"),
        ({"network": SpeechNetwork(hidden=30, heads=4)}, "must divide network.hidden"),
        ({"label_smoothing": 0.1}, "label_smoothing means nothing"),
    ],
)
def test_a_wrong_setting_is_named(fields: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        train(configuration(tmp_path, **fields))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"text": "a"}, "field 'audio'"),
        ({"audio": "0.wav"}, "field 'text': must say"),
        ({"audio": "0.wav", "text": "?!"}, "field 'text': must say"),
        ({"audio": "none.wav", "text": "a"}, "No such file"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    config = configuration(tmp_path)
    Path(config.data.train).write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=complaint):
        train(config)


def test_masks_leave_the_rest() -> None:
    torch.manual_seed(0)
    before = torch.randn(80, 100)
    after = augmented(before, Augmentation(mask_bands=10, mask_frames=10), 100)
    changed = after != before
    assert 0 < changed.float().mean() < 0.5
    assert (before == torch.randn(80, 100, generator=torch.Generator().manual_seed(0))).all(), "left as it was"
    assert augmented(before, Augmentation(tempo=0.2), 3000).shape[0] == 80


def test_slower_sound_is_never_longer_than_the_network_takes() -> None:
    torch.manual_seed(0)
    lengths = {augmented(torch.randn(80, 2950), Augmentation(tempo=0.3), 3000).shape[1] for _ in range(20)}
    assert max(lengths) == 3000
    assert min(lengths) < 2950


def test_a_header_that_promises_too_much(tmp_path: Path) -> None:
    """A FLAC of some bytes that says it has an hour of sixteen channels."""
    path = tmp_path / "a.flac"
    soundfile.write(path, np.zeros(100), 16_000)
    raw = bytearray(path.read_bytes())
    raw[21:26] = bytes([(raw[21] & 0xF0) | 0x0F, 0xFF, 0xFF, 0xFF, 0xFF])  # of all samples
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"60 minutes|no sound|empty"):
        audio.read(Recording(path=path, text=None, file=path))


def test_characters_that_were_not_learnt_count_as_errors(tmp_path: Path) -> None:
    config = configuration(tmp_path, epochs=1)
    held = write_clips(tmp_path / "held", 3, 9)
    held.write_text(held.read_text().replace('."}', 'zzz."}', 1))
    data = DataConfig(train=config.data.train, validation=str(held))
    lines = [json.loads(line)["text"] for line in Path(config.data.train).read_text().splitlines()]
    kept = [line for line in held.read_text().splitlines() if json.loads(line)["text"] not in lines]
    held.write_text("\n".join(kept) + "\n")
    done = train(msgspec.structs.replace(config, data=data))
    assert done.data["validation_rows"] == len(kept) >= 1
    assert "validation_cer" in done.metrics


def test_recordings_that_are_not_there_are_left_out_as_stated(tmp_path: Path) -> None:
    config = configuration(tmp_path, epochs=1)
    path = Path(config.data.train)
    path.write_text(path.read_text() + json.dumps({"audio": "x" * 300, "text": "abc"}) + "\n")
    with pytest.raises(DataError, match=r"list.jsonl:81: .*cannot be read"):
        train(config)
    train(msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, bad_files=1)), fresh=True)
    assert "left out" in (tmp_path / "run" / "log.txt").read_text()
