"""What one checkpoint cost against another, of whatever kind they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from steelyard.checkpoint import manifest
from steelyard.errors import ConfigError
from steelyard.evaluate import answers, certificate
from steelyard.evaluate.answers import AnswersCertificate
from steelyard.evaluate.certificate import Certificate, Thresholds, weight_bytes
from steelyard.models import lora, weights
from steelyard.models.opening import open_checkpoint
from steelyard.stages import compress_networks


def between(
    source: Path,
    derived: Path,
    *,
    data: Path | None = None,
    thresholds: Thresholds,
    accept: bool = False,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Certificate | AnswersCertificate:
    """The certificate of a checkpoint that was made of another in several steps.

    Args:
        source: a model of any kind, or an adapter.
        derived: a model of the same kind.
        data: rows that networks other than decoders are asked; texts that ship with the package if None.
        thresholds: what may be lost.
        accept: past a threshold is no error.
        report: told how many texts or askings are done, of how many.

    Raises:
        ConfigError: they are of two kinds, or know other tokens.
        DataError, CheckpointError: see `compress`.
        FidelityError: past a threshold.
    """
    parent = manifest.read(source)
    if compress_networks.is_network(source) != compress_networks.is_network(derived):
        raise ConfigError(f"'{derived}' cannot be compared with '{source}': they are networks of two kinds")
    if compress_networks.is_network(source):
        subject = compress_networks.subject(source, data)
        before = subject.ask(subject.network)
        report(1, 2)
        answered = answers.certify(
            before,
            subject.ask(compress_networks.opened(derived)),
            vectors=subject.vectors,
            least_agreement=thresholds.agreement,
            accept=accept,
            parent=parent.id,
            sizes=(weight_bytes(source), weight_bytes(derived)),
        )
        report(2, 2)
        answered.demand()
        return answered
    opened = open_checkpoint(source)
    if opened.adapter is not None:
        lora.merge(opened.decoder, opened.adapter)
    smaller = weights.load(derived)
    if smaller.config.vocabulary != opened.decoder.config.vocabulary:
        raise ConfigError(f"'{derived}' cannot be compared with '{source}': it knows other tokens")
    found = certificate.judge(
        certificate.compare(opened.decoder, smaller, opened.tokenizer, report),
        thresholds,
        accept,
        parent=parent.id,
        bytes_before=certificate.dense_bytes(opened.decoder),
        bytes_after=weight_bytes(derived),
    )
    certificate.demand(found)
    return found
