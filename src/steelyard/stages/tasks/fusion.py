"""Training a classifier of text, image and sound together: rows of several kinds, a tower for each kind."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data import audio, augmentation, fused, image_augmentation, images, tokenizer_training
from steelyard.data.fused import FusedRow
from steelyard.data.tokenize import TOO_LONG
from steelyard.errors import ConfigError, DataError
from steelyard.models import classifiers, quantized
from steelyard.models.classifiers import Classifier
from steelyard.models.convnet import ConvNetConfig
from steelyard.models.encoder import EncoderConfig
from steelyard.models.fusion import FusionClassifier, FusionConfig
from steelyard.models.inputs import Fused
from steelyard.models.mel import log_mel
from steelyard.models.seq2seq import WhisperConfig, sines
from steelyard.runs import Run
from steelyard.stages.tasks.prepared import DTYPES, METRICS, Prepared, digest_of, named, parts
from steelyard.text.tokenizer import Tokenizer
from steelyard.train.classification import Labelled
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.fusion import FusedClassification
from steelyard.train.networks import FusionNetwork

MAX_SECONDS = 30


def prepare(config: TrainConfig) -> Prepared:
    """Read a run's rows. Raises as `stages.train.train` does."""
    network = config.network
    assert isinstance(network, FusionNetwork), "checked before"
    augmentation.check(config.augment, augmentation.IMAGE if "image" in network.modalities else ())
    if config.data.too_long not in TOO_LONG:
        raise ConfigError(f"data.too_long '{config.data.too_long}' is not known; known: {', '.join(TOO_LONG)}")
    learnt, held, digests = _parts(config, network)
    labels = config.data.labels or tuple(sorted({str(row.label) for row in learnt}))
    config = msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, labels=labels))
    base = None if network.text_model is None else resolve(network.text_model)

    def build(run: Run) -> FusedClassification:
        classifier = _fresh(network, labels, [row.text or "" for row in learnt], base, run.folder, config.seed)
        return FusedClassification(
            classifier,
            labelled(classifier, learnt, config.data, run),
            labelled(classifier, held, config.data, run),
            METRICS,
            dtype=DTYPES[config.dtype],
            smoothing=config.label_smoothing,
            augment=lambda batch: _augmented(classifier, batch, config),
            alone=network.alone,
        )

    counts = {"rows": len(learnt), "validation_rows": len(held), "labels": len(labels)}
    parent = None if base is None else manifest.read(base).id
    return Prepared(config=config, counts=counts, parent=parent, build=build, digests=digests)


def labelled(classifier: Classifier, rows: Sequence[FusedRow], data: DataConfig | None, run: Run | None) -> Labelled:
    """Rows as the classifier reads them, with the numbers of their labels (none where a row has none).

    Args:
        classifier: what reads them.
        rows: of a file.
        data: what becomes of rows that are too long, and how many may have files that cannot be read; None: what is too
            long is cut, and every file has to be there.
        run: hears of what is left out.

    Raises:
        DataError: one bad file more than that, a row that is too long, or a label that the classifier does not know.
    """
    numbers = {label: number for number, label in enumerate(classifier.labels)}
    made, bad = Labelled([], []), 0
    for row in rows:
        if row.label is not None and row.label not in numbers:
            known = ", ".join(classifier.labels)
            raise DataError(f"the label '{row.label}' is none of {known}", file=row.file, line=row.line)
        tokens, long_text = _tokens(classifier, row, data)
        try:
            picture, (sound, long_sound) = _picture(classifier, row), _sound(classifier, row)
        except DataError as error:
            bad += 1
            if data is None or run is None or bad > data.bad_files:
                raise
            run.log(f"left out: {error}")
            continue
        too_long = long_text or long_sound
        if too_long and data is not None and data.too_long == "error":
            reason = f"{too_long}: shorten it, or set data.too_long"
            raise DataError(reason, file=row.file, line=row.line)
        if too_long and data is not None and data.too_long == "drop":
            continue
        made.examples.append(Fused(tokens, picture, sound))
        made.labels.append(() if row.label is None else (numbers[row.label],))
    return made


def _tokens(classifier: Classifier, row: FusedRow, data: DataConfig | None) -> tuple[list[int] | None, str]:
    """As many as fit, and what to say if that is not all."""
    inputs = classifier.fused.text
    if inputs is None or row.text is None:
        return None, ""
    tokens = inputs.all_tokens(row.text)
    most = min(inputs.context or len(tokens), len(tokens) if data is None else data.max_length)
    return tokens[:most], f"{len(tokens)} tokens, at most {most} fit" if len(tokens) > most else ""


def _picture(classifier: Classifier, row: FusedRow) -> torch.Tensor | None:
    inputs = classifier.fused.image
    if inputs is None or row.image is None:
        return None
    return torch.from_numpy(images.read(row.image, inputs.channels, inputs.side).copy())


def _sound(classifier: Classifier, row: FusedRow) -> tuple[torch.Tensor | None, str]:
    """Features of as much as fits, and what to say if that is not all."""
    bands = classifier.fused.bands
    if bands is None or row.audio is None:
        return None, ""
    sound, most = audio.read(row.audio), MAX_SECONDS * audio.RATE
    seconds = f"{len(sound) / audio.RATE:.0f} s of sound, at most {MAX_SECONDS} fit"
    padded = torch.nn.functional.pad(sound[:most], (0, max(0, 640 - len(sound))))
    return log_mel(padded, bands), seconds if len(sound) > most else ""


def _augmented(classifier: Classifier, batch: tuple[Any, ...], config: TrainConfig) -> tuple[Any, ...]:
    """A batch whose images are changed, and nothing else."""
    present, *given = batch
    changed = [
        (image_augmentation.augmented(inputs[0], config.augment),) if name == "image" else inputs
        for name, inputs in zip(classifier.fused.modalities, given, strict=True)
    ]
    return present, *changed


def _fresh(
    network: FusionNetwork, labels: Sequence[str], texts: Sequence[str], base: Path | None, run: Path, seed: int
) -> Classifier:
    origin, encoder, described = None, None, None
    if "text" in network.modalities:
        if base is not None:
            encoder = classifiers.load_encoder(base)
            quantized.demand_dense(encoder, base)
            origin, described = base, encoder.config
        else:
            origin = run / "tokenizer"
            origin.mkdir(exist_ok=True)
            tokenizer_training.train(texts, network.vocabulary, origin / "tokenizer.json", lowercase=True)
            described = EncoderConfig(
                vocab_size=Tokenizer.load(origin).vocabulary,
                hidden_size=network.width,
                num_hidden_layers=network.text_layers,
                num_attention_heads=network.heads,
                intermediate_size=4 * network.width,
                max_position_embeddings=128,
            )
    config = FusionConfig(
        how=network.how,
        width=network.width,
        heads=network.heads,
        dropout=network.dropout,
        drop_modality=network.drop_modality,
        alone=network.alone > 0,
        text=described,
        image=_image_tower(network) if "image" in network.modalities else None,
        audio=_audio_tower(network) if "audio" in network.modalities else None,
        classes=len(labels),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = FusionClassifier(config)
    towers: Any = made.towers
    if encoder is not None:
        towers["text"].encoder = encoder.requires_grad_(True)
    if config.audio is not None:
        positions = towers["audio"].encoder.embed_positions.weight
        positions.data.copy_(sines(*positions.shape))
    return Classifier(made, classifiers.inputs_of(made, origin or run), tuple(labels), origin)


def _image_tower(network: FusionNetwork) -> ConvNetConfig:
    return ConvNetConfig(
        image_size=network.image_size, num_channels=network.channels, widths=network.widths, blocks=network.blocks
    )


def _audio_tower(network: FusionNetwork) -> WhisperConfig:
    return WhisperConfig(
        vocab_size=1,
        d_model=network.width,
        encoder_layers=network.audio_layers,
        decoder_layers=1,
        encoder_attention_heads=network.heads,
        decoder_attention_heads=network.heads,
        encoder_ffn_dim=4 * network.width,
        decoder_ffn_dim=1,
        dropout=network.dropout,
    )


def _parts(config: TrainConfig, network: FusionNetwork) -> tuple[list[FusedRow], list[FusedRow], dict[str, str]]:
    """What to learn from, what to validate on, and the digests of both files with all that they name."""
    data = config.data
    rows = _labelled(Path(data.train), data, network)
    train = _together(Path(data.train), rows)
    if data.deduplicate:
        rows = list({(row.key, row.label): row for row in reversed(rows)}.values())[::-1]
    learnt, held = parts(
        config, rows, lambda path: _labelled(path, data, network), lambda row: row.key, lambda row: row
    )
    return learnt, held, named(config, train, _together(Path(data.validation), held) if data.validation else None)


def _labelled(path: Path, data: DataConfig, network: FusionNetwork) -> list[FusedRow]:
    rows = fused.read(path, data, network.modalities)
    for row in rows:
        if row.label is None:
            raise DataError("has no label", file=row.file, line=row.line, field=data.label)
    return rows


def _together(path: Path, rows: Sequence[FusedRow]) -> str:
    files: dict[str, str] = {}
    for row in rows:
        with contextlib.suppress(DataError):  # what cannot be read is told when it is looked at
            if row.image is not None:
                files[str(row.image.path)] = images.digest(row.image)
            if row.audio is not None:
                files[str(row.audio.path)] = audio.digest(row.audio)
    found = [(Path(name).name, digest) for name, digest in files.items()]
    return digest_of([(path.name, manifest.sha256_file(path)), *found])
