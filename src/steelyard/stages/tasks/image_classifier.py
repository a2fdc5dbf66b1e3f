"""Training a classifier of images: files to pixels in the run's folder, a network from nothing or a trained one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data import images
from steelyard.data.image_augmentation import augmented
from steelyard.data.images import ImageRow
from steelyard.errors import ConfigError, DataError
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.convnet import ConvNet, ConvNetConfig
from steelyard.models.inputs import ImageInputs
from steelyard.models.vision import VisionConfig, VisionTransformer
from steelyard.runs import Run
from steelyard.stages.tasks.prepared import DTYPES, METRICS, Prepared, digest_of, named, parts
from steelyard.train.classification import Classification, Labelled
from steelyard.train.config import DataConfig, TrainConfig
from steelyard.train.networks import ConvNetwork, Network, VitNetwork

Digested = tuple[ImageRow, str]
"""An image and the sha256 of its file."""


def prepare(config: TrainConfig) -> Prepared:
    """Find a run's images. Raises as `stages.train.train` does."""
    notes: list[str] = []
    rows = _labelled(Path(config.data.train), config.data, notes)
    labels = config.data.labels or sorted({str(row.label) for row, _ in rows})
    data = msgspec.structs.replace(config.data, labels=tuple(labels))
    config = msgspec.structs.replace(config, data=data)
    base = None if config.model is None else resolve(config.model)
    learnt, held, digests = _parts(config, rows, notes)

    def build(run: Run) -> Classification:
        for note in notes:
            run.log(note)
        generator = torch.Generator().manual_seed(config.seed)
        if base is not None:
            classifier = classifiers.swap_head(base, labels, generator)
        else:
            assert config.network is not None, "checked before"
            classifier = _fresh(config.network, labels, config.seed)
        return Classification(
            classifier,
            _pixels(learnt, classifier, config.data, run, "train"),
            _pixels(held, classifier, config.data, run, "validation"),
            METRICS,
            dtype=DTYPES[config.dtype],
            smoothing=config.label_smoothing,
            augment=lambda batch: (augmented(batch[0], config.augment),),
        )

    counts = {"rows": len(learnt), "validation_rows": len(held), "labels": len(labels)}
    parent = None if base is None else manifest.read(base).id
    return Prepared(config=config, counts=counts, parent=parent, build=build, digests=digests)


def _labelled(path: Path, data: DataConfig, notes: list[str]) -> list[Digested]:
    rows = images.listed(path, data)
    for row in rows:
        if row.label is None:
            raise DataError("has no label", file=row.file, line=row.line, field=data.label)
        if data.labels and row.label not in data.labels:
            known = ", ".join(data.labels)
            raise DataError(f"the label '{row.label}' is none of {known}", file=row.file, line=row.line)
    return list(zip(*images.readable(rows, data.bad_files, images.digest, notes.append), strict=True))


def _parts(
    config: TrainConfig, rows: list[Digested], notes: list[str]
) -> tuple[list[Digested], list[Digested], dict[str, str]]:
    """What to learn from, what to validate on, and the digests of both places."""
    data = config.data
    train = _together(rows, data.train)
    if data.deduplicate:
        rows = list({digest: (row, digest) for row, digest in reversed(rows)}.values())[::-1]
    learnt, held = parts(
        config, rows, lambda path: _labelled(path, data, notes), lambda row: row[1], lambda row: row[0]
    )
    return learnt, held, named(config, train, _together(held, data.validation) if data.validation else None)


def _together(rows: Sequence[Digested], place: str) -> str:
    root = Path(place) if Path(place).is_dir() else Path(place).parent
    return digest_of((f"{row.label}: {os.path.relpath(row.path, root)}", digest) for row, digest in rows)


def _fresh(network: Network, labels: Sequence[str], seed: int) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(network, ConvNetwork):
            made: ConvNet | VisionTransformer = ConvNet(
                ConvNetConfig(
                    image_size=network.image_size,
                    num_channels=network.channels,
                    widths=network.widths,
                    blocks=network.blocks,
                    dropout=network.dropout,
                    classes=len(labels),
                )
            )
        else:
            assert isinstance(network, VitNetwork), "the other networks read no images"
            made = VisionTransformer(
                VisionConfig(
                    image_size=network.image_size,
                    num_channels=network.channels,
                    patch_size=network.patch,
                    hidden_size=network.hidden,
                    num_hidden_layers=network.layers,
                    num_attention_heads=network.heads,
                    intermediate_size=4 * network.hidden,
                    hidden_dropout_prob=network.dropout,
                    classes=len(labels),
                )
            )
    return Classifier(made, ImageInputs(network.channels, network.image_size), tuple(labels))


def _pixels(rows: Sequence[Digested], classifier: Classifier, data: DataConfig, run: Run, name: str) -> Labelled:
    """The images `[N, C, S, S]` uint8 of some rows, in a file that is mapped: more of them than memory holds, too."""
    inputs = classifier.image
    numbers = {label: number for number, label in enumerate(classifier.labels)}
    if not rows:
        return Labelled([], [])
    place = run.folder / "prepared"
    place.mkdir(exist_ok=True)
    shape = (len(rows), inputs.channels, inputs.side, inputs.side)
    mapped = np.lib.format.open_memmap(place / f"{name}.npy", "w+", np.uint8, shape)
    found = iter(range(len(rows)))

    def put(row: ImageRow) -> int:
        pixels = images.read(row, inputs.channels, inputs.side)
        number = next(found)
        mapped[number] = pixels
        return number

    kept, _ = images.readable([row for row, _ in rows], data.bad_files, put, run.log)
    if not kept:
        raise ConfigError("no image could be read")
    return Labelled(torch.from_numpy(mapped)[: len(kept)], [(numbers[str(row.label)],) for row in kept])
