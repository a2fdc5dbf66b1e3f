"""Compress a network that is no decoder: ask it rows, write the smaller form aside, ask that, hand on what passes."""

# R rows  C classes  D width

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from steelyard.atomic import folder_aside
from steelyard.checkpoint import manifest
from steelyard.compress.prune import networks as pruning
from steelyard.compress.prune.decoders import PruneConfig
from steelyard.compress.quantize import networks as quantizing
from steelyard.compress.quantize.decoders import QuantizeConfig, settled
from steelyard.data import audio, chat, fused, images, tagged
from steelyard.data.chat import FormatConfig
from steelyard.data.images import ImageTensors
from steelyard.errors import DataError
from steelyard.evaluate import answers
from steelyard.evaluate.answers import LEAST_AGREEMENT, AnswersCertificate
from steelyard.evaluate.certificate import golden_texts, weight_bytes
from steelyard.infer import transcription
from steelyard.infer.transcription import Transcriber
from steelyard.models import classifiers, seq2seq, speech
from steelyard.models.classifiers import Classifier
from steelyard.models.encoder import Encoder
from steelyard.models.seq2seq import Whisper
from steelyard.models.speech import Recogniser, SpeechCTC
from steelyard.stages.tasks.fusion import labelled as labelled_rows
from steelyard.stages.tasks.tagger import sentences
from steelyard.stages.tasks.transcriber import transcribes
from steelyard.text.tokenizer import Tokenizer

RECORDINGS, LONGEST, MOST_TOKENS = 128, 30, 64
"""How many are listened to, how many seconds of each, and how many tokens of a transcript."""
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Subject:
    """A network and what it is asked."""

    network: nn.Module
    ask: Callable[[nn.Module], torch.Tensor]
    """Log-probabilities `[R, C]`, or embeddings `[R, D]`, of its rows by a network of this kind."""
    vectors: bool


def is_network(source: Path) -> bool:
    """Whether a checkpoint is a classifier of any kind, a tagger, an encoder, or writes down what is said."""
    if manifest.kind_of(source) != "model":
        return False
    known = classifiers.is_classifier(source) or transcribes(source)
    return known or classifiers.architecture(source) in classifiers.ENCODERS


def quantize(
    source: Path,
    output: Path,
    config: QuantizeConfig,
    data: Path | None,
    *,
    least_agreement: float = LEAST_AGREEMENT,
    accept: bool = False,
    report: Report = lambda done, of: None,
) -> AnswersCertificate:
    """Write the quantised form of a network to `output`.

    Args:
        source: the checkpoint.
        output: where the quantised one will be; replaced whole or left alone.
        config: how.
        data: rows to ask, and for gptq to judge by; texts that ship with the package if None.
        least_agreement: see `AnswersCertificate`.
        accept: hand it on past that.
        report: told how many askings are done, of how many.

    Raises:
        DataError: a row, by file and line; or there are none, and the network reads no texts.
        ConfigError, CheckpointError, FidelityError: as `compress.quantize` does.
    """

    def make(subject: Subject, folder: Path) -> None:
        tensors = quantizing.quantize(subject.network, config, lambda: subject.ask(subject.network))
        quantizing.write(tensors, config, folder, source)

    network = opened(source)
    quantizing.check(network, config)
    config = settled(config, network)
    recipe = msgspec.to_builtins(config)
    return _certified(source, output, make, recipe, data, least_agreement, accept, report)


def prune(
    source: Path,
    output: Path,
    config: PruneConfig,
    data: Path | None,
    *,
    zeros: bool = False,
    least_agreement: float = LEAST_AGREEMENT,
    accept: bool = False,
    report: Report = lambda done, of: None,
) -> AnswersCertificate:
    """Write a network with weights of its linear layers set to 0 to `output`; see `quantize` and `compress.prune`."""

    def make(subject: Subject, folder: Path) -> None:
        smaller = copy.deepcopy(subject.network)
        pruning.prune(smaller, config, lambda: subject.ask(smaller))
        pruning.write(smaller, folder, source, zeros=zeros)

    recipe = msgspec.to_builtins(config)
    return _certified(source, output, make, recipe, data, least_agreement, accept, report)


def _certified(
    source: Path,
    output: Path,
    make: Callable[[Subject, Path], None],
    recipe: dict[str, Any],
    data: Path | None,
    least_agreement: float,
    accept: bool,
    report: Report,
) -> AnswersCertificate:
    manifest.check_output(output, source, source)
    asked, parent = subject(source, data), manifest.read(source)
    before = asked.ask(asked.network)
    report(1, 3)
    with folder_aside(output) as folder:
        make(asked, folder)
        report(2, 3)
        found = answers.certify(
            before,
            asked.ask(opened(folder)),
            vectors=asked.vectors,
            least_agreement=least_agreement,
            accept=accept,
            parent=parent.id,
            sizes=(weight_bytes(source), weight_bytes(folder)),
        )
        report(3, 3)
        found.demand()
        use = "compared on" if recipe["method"] in ("nearest", "magnitude") else "calibration"
        read = {} if data is None or not data.is_file() else {f"{use}: {data.name}": manifest.sha256_file(data)}
        manifest.complete(
            folder,
            parent=parent.id,
            data={**parent.data, **read},
            recipe={**parent.recipe, "compress": recipe},
            certificate=msgspec.to_builtins(found),
        )
    return found


def opened(source: Path) -> nn.Module:
    """The network of a checkpoint. Raises CheckpointError: see `classifiers`."""
    if classifiers.is_classifier(source):
        return classifiers.load(source).network
    if transcription.is_transcriber(source):
        return seq2seq.load(source)
    return speech.load(source).network if speech.is_recogniser(source) else classifiers.load_encoder(source)


def subject(source: Path, data: Path | None) -> Subject:
    """A network and its rows: those of `data`, or texts that ship with the package. Raises as `quantize` does."""
    if transcribes(source):
        return (_whisper if transcription.is_transcriber(source) else _recogniser)(source, _sounds(data))
    if not classifiers.is_classifier(source):
        return _encoder(source, data)
    classifier = classifiers.load(source)
    examples = _examples(classifier, source, data)

    def ask(network: nn.Module) -> torch.Tensor:
        asked = Classifier(network, classifier.inputs, classifier.labels, source)  # type: ignore[arg-type]
        if classifiers.reads_texts(source):
            return classifiers.of_texts(asked, examples)[0]
        return classifiers.log_probabilities(asked, examples)

    return Subject(classifier.network, ask, vectors=False)


def _examples(classifier: Classifier, source: Path, data: Path | None) -> Any:
    """What a classifier is asked: texts, or examples as its inputs have them."""
    if classifiers.reads_texts(source):
        return _texts(data)
    if data is None:
        raise DataError("this network reads no plain texts: give it rows to compare both forms by (--data FILE)")
    format_ = FormatConfig()
    if classifiers.tags_words(source):
        return sentences(classifier, tagged.read(data, format_))
    if classifiers.reads_several(source):
        return labelled_rows(classifier, fused.read(data, format_, classifier.fused.modalities), None, None).examples
    return ImageTensors(images.listed(data, format_), classifier.image.channels, classifier.image.side)


def _encoder(source: Path, data: Path | None) -> Subject:
    encoder, tokenizer = classifiers.load_encoder(source), Tokenizer.load(source)
    most = encoder.config.max_position_embeddings
    rows = [tokenizer.encode_plain(text, add_special_tokens=True)[:most] or [0] for text in _texts(data)]

    @torch.inference_mode()
    def ask(network: nn.Module) -> torch.Tensor:
        assert isinstance(network, Encoder)
        return torch.cat([network.embed(torch.tensor([row]), torch.tensor([len(row)])) for row in rows])

    return Subject(encoder, ask, vectors=True)


def _sounds(data: Path | None) -> list[torch.Tensor]:
    """Recordings, whatever is said in them; of long ones the beginning."""
    if data is None:
        raise DataError("this network reads recordings: give it some to compare both forms by (--data FILE)")
    rows = [row for _, row in audio.listed(data, FormatConfig())]
    return [audio.read(row)[: LONGEST * audio.RATE] for row in rows[:RECORDINGS]]


def _recogniser(source: Path, sounds: list[torch.Tensor]) -> Subject:
    recogniser = speech.load(source)
    features = [piece for sound in sounds for piece in recogniser.pieces(sound)]

    def ask(network: nn.Module) -> torch.Tensor:
        assert isinstance(network, SpeechCTC)
        found = speech.logits_of(Recogniser(network, recogniser.vocabulary), features)
        return torch.cat(found).log_softmax(-1)

    return Subject(recogniser.network, ask, vectors=False)


def _whisper(source: Path, sounds: list[torch.Tensor]) -> Subject:
    """Asked for every token of its own transcripts, given those before it."""
    transcriber = Transcriber.load(source)
    said = [transcription.transcript_tokens(transcriber, sound)[:MOST_TOKENS] for sound in sounds]

    def ask(network: nn.Module) -> torch.Tensor:
        assert isinstance(network, Whisper)
        asked = dataclasses.replace(transcriber, network=network)
        scores = [transcription.token_scores(asked, sound, tokens) for sound, tokens in zip(sounds, said, strict=True)]
        return torch.cat(scores)

    return Subject(transcriber.network, ask, vectors=False)


def _texts(data: Path | None) -> list[str]:
    if data is None:
        return golden_texts()
    found = []
    for row in chat.read(data, FormatConfig()):
        text = row.text if row.text is not None else row.messages[0].content
        if not text:
            raise DataError("has no text", file=row.file, line=row.line)
        found.append(text)
    return found
