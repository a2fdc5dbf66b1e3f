"""What one checkpoint cost against another, of whatever kind they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from steelyard.checkpoint import manifest
from steelyard.data.chat import FormatConfig
from steelyard.errors import CheckpointError, ConfigError
from steelyard.evaluate import answers, certificate
from steelyard.evaluate.answers import AnswersCertificate
from steelyard.evaluate.certificate import Certificate, SignOff, TaskDelta, Thresholds, weight_bytes
from steelyard.models import lora, weights
from steelyard.models.opening import open_checkpoint
from steelyard.stages import compress_networks
from steelyard.stages.evaluate import Likelihood, evaluate
from steelyard.stages.labelling import Classification


def task_deltas(source: Path, derived: Path, tasks: Sequence[Path]) -> dict[str, TaskDelta]:
    """What rows of some tasks say of two checkpoints: accuracy where they have labels, else the loss.

    Raises:
        DataError: a row; file, line and field are named.
        ConfigError: rows of another kind, or two files of one name.
    """
    found: dict[str, TaskDelta] = {}
    for path in tasks:
        if path.name in found:
            raise ConfigError(f"two files of tasks are called '{path.name}': name them apart")
        before, after = (evaluate(checkpoint, path, FormatConfig()) for checkpoint in (source, derived))
        if isinstance(before, Classification) and isinstance(after, Classification):
            found[path.name] = TaskDelta(measure="accuracy", before=before.accuracy, after=after.accuracy)
        elif isinstance(before, Likelihood) and isinstance(after, Likelihood):
            found[path.name] = TaskDelta(measure="loss", before=before.loss, after=after.loss)
        else:
            raise ConfigError(f"'{path}' has no rows of texts or labels")
    return found


def between(
    source: Path,
    derived: Path,
    *,
    data: Path | None = None,
    tasks: Sequence[Path] = (),
    thresholds: Thresholds,
    accept: bool = False,
    report: Callable[[int, int], None] = lambda done, of: None,
) -> Certificate | AnswersCertificate:
    """The certificate of a checkpoint that was made of another in several steps.

    Args:
        source: a model of any kind, or an adapter.
        derived: a model of the same kind.
        tasks: rows that decoders are judged on besides; see `task_deltas`.
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
        tasks=task_deltas(source, derived, tasks),
        bytes_before=certificate.dense_bytes(opened.decoder),
        bytes_after=weight_bytes(derived),
    )
    certificate.demand(found)
    return found


def sign_off(checkpoint: Path, by: str, note: str = "") -> SignOff:
    """Record in a certificate that somebody stands for the model; its files are compared with the manifest first.

    Args:
        checkpoint: with a certificate.
        by: who; not empty.
        note: why.

    Raises:
        ConfigError: nobody is named.
        CheckpointError: a file is altered, or there is no certificate.
    """
    if not by.strip():
        raise ConfigError("a sign-off is somebody's: say who (--by NAME)")
    known = manifest.verify(checkpoint)
    if known.certificate is None:
        raise CheckpointError(f"'{checkpoint}' has no certificate to sign: it is what `steelyard compress` makes")
    signed = SignOff(by=by.strip(), at=datetime.now(UTC).isoformat(timespec="seconds"), note=note.strip())
    known.certificate["sign_offs"] = [*known.certificate.get("sign_offs", []), msgspec.to_builtins(signed)]
    manifest.write(checkpoint, known)
    return signed
