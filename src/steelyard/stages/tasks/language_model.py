"""Training a decoder: rows to tokens, the base, its adapter, what is measured on the way."""

from __future__ import annotations

from pathlib import Path

import torch

from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data.rows import Conversation, TokenRow
from steelyard.data.token_rows import TokenRows
from steelyard.data.tokenize import tokenize, tokenized
from steelyard.errors import ConfigError, DataError
from steelyard.evaluate import classification
from steelyard.evaluate.likelihood import negative_log_likelihood
from steelyard.models import classifiers, weights
from steelyard.models import config as decoder_config
from steelyard.models.decoder import Decoder
from steelyard.models.lora import Adapter
from steelyard.runs import Run
from steelyard.stages.tasks import fresh_decoder
from steelyard.stages.tasks.prepared import DTYPES, Prepared, file_digests, is_large, mapped_rows, streamed
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.tokenizer import Tokenizer
from steelyard.train import lora
from steelyard.train.config import TrainConfig
from steelyard.train.language_model import Evaluator, LanguageModelling
from steelyard.train.networks import DecoderNetwork
from steelyard.train.student import Student


def prepare(config: TrainConfig) -> Prepared:
    """Read a run's rows as its base will. Raises as `stages.train.train` does."""
    if config.model is None:
        return _from_nothing(config)
    base = resolve(config.model)
    config, learnt, validation = streamed(config)
    tokenizer, template = Tokenizer.load(base), ChatTemplate.load(base)
    how = (tokenizer, template, config.data.max_length, config.data.too_long)
    teacher = None if config.distill.teacher is None else _teacher(resolve(config.distill.teacher), base)
    small = None if is_large(config.data.train) else TokenRows.of(tokenized(learnt, *how))
    held = tokenize(validation, *how)

    def build(run: Run) -> LanguageModelling:
        rows = small
        if rows is None:
            rows = mapped_rows(run, config, tokenized(learnt, *how), *_decides(base, template))
            run.log(f"tokens: {rows.counts()}, in mapped files")
        decoder = weights.load(base, DTYPES[config.dtype])
        check_dense(decoder)
        decoder.recompute_blocks = config.recompute == "blocks"
        adapter = lora.start(decoder, config.lora, config.seed) if config.method == "lora" else None
        evaluator = _evaluator(held, validation, config, tokenizer, template)
        given = decoder, adapter, rows, base.resolve(), evaluator
        if teacher is None:
            return LanguageModelling(*given)
        asked, known = config.distill, weights.load(teacher, DTYPES[config.dtype])
        if asked.hidden and known.config.width != decoder.config.width:
            raise ConfigError("distill.hidden is for a student as wide as its teacher: leave it out")
        taught = {"weight": asked.weight, "temperature": asked.temperature, "hidden": asked.hidden}
        return Student(*given, teacher=known, kind=asked.divergence, **taught)

    counts = {**({"rows": len(learnt)} if small is None else small.counts()), "validation_rows": len(held)}
    digests = file_digests(config)
    if teacher is not None:
        digests["teacher"] = manifest.read(teacher).id
    parent = manifest.read(base).id
    return Prepared(config=config, counts=counts, parent=parent, build=build, digests=digests)


def _teacher(folder: Path, base: Path) -> Path:
    """A teacher that knows the student's tokens.

    Raises:
        ConfigError: it is no dense decoder, or knows others.
    """
    if manifest.kind_of(folder) != "model" or classifiers.is_classifier(folder):
        raise ConfigError(f"distill.teacher '{folder}' is no model that goes on with a text (merge an adapter first)")
    if decoder_config.load(folder).quantization is not None:
        raise ConfigError(f"distill.teacher '{folder}' is quantised: name the model that it was made from")
    if manifest.sha256_file(folder / "tokenizer.json") != manifest.sha256_file(base / "tokenizer.json"):
        raise ConfigError(f"distill.teacher '{folder}' has another tokenizer than '{base}': both need the same")
    if decoder_config.load(folder).vocabulary != decoder_config.load(base).vocabulary:
        raise ConfigError(f"distill.teacher '{folder}' has another vocabulary than '{base}'")
    return folder


def _from_nothing(config: TrainConfig) -> Prepared:
    """Of plain texts, by a network that the configuration describes."""
    config, learnt, validation = streamed(config)
    for document in (next(iter(learnt)), *validation[:1]):
        if document.messages[0].role != "text":
            reason = "a decoder that begins from nothing learns plain text first: a .txt file, or rows with a 'text'"
            raise DataError(reason, file=document.file, line=document.line)
    network = config.network
    assert isinstance(network, DecoderNetwork), "checked before"
    if config.distill.teacher is not None:
        raise ConfigError("a decoder from nothing has a tokenizer of its own, which no teacher knows: name a 'model'")

    def build(run: Run) -> LanguageModelling:
        folder = run.folder / "tokenizer"
        fresh_decoder.lay_out(network, (document.messages[0].content for document in learnt), folder)
        tokenizer = Tokenizer.load(folder)
        longest = min(config.data.max_length, network.context)
        how = (tokenizer, None, longest)
        made = tokenized(learnt, *how)
        large = is_large(config.data.train)
        rows = mapped_rows(run, config, made, *_decides(folder, None), str(longest)) if large else TokenRows.of(made)
        held = tokenize(validation, *how)
        decoder = fresh_decoder.begin(folder, config.seed).to(DTYPES[config.dtype])
        decoder.recompute_blocks = config.recompute == "blocks"
        run.log(f"tokens: {rows.counts()}; {sum(map(torch.numel, decoder.parameters())):,} parameters")
        evaluator = _evaluator(held, validation, config, tokenizer, None)
        return LanguageModelling(decoder, None, rows, folder, evaluator)

    counts = {"rows": len(learnt), "validation_rows": len(validation)}
    return Prepared(config=config, counts=counts, parent=None, build=build, digests=file_digests(config))


def _decides(folder: Path, template: ChatTemplate | None) -> tuple[str, str]:
    """What tokens depend on besides a file's rows."""
    return manifest.sha256_file(folder / "tokenizer.json"), template.source if template is not None else ""


def check_dense(decoder: Decoder) -> None:
    """Refuse a base that no gradient passes."""
    if any(not tensor.is_floating_point() for tensor in decoder.buffers()):
        raise ConfigError("a quantised model cannot be trained, no gradient passes its rounding: take its parent")


def _evaluator(
    rows: list[TokenRow],
    conversations: list[Conversation],
    config: TrainConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
) -> Evaluator | None:
    """Validation loss, and for labelled rows accuracy and Matthews correlation."""
    if not rows:
        return None
    labels = config.data.labels if conversations[0].label is not None else ()
    asked = classification.questions(conversations, labels, tokenizer, template) if labels else []
    truth = [labels.index(str(conversation.label)) for conversation in conversations] if labels else []

    def measure(decoder: Decoder, adapter: Adapter | None) -> dict[str, float]:
        nats, tokens = negative_log_likelihood(decoder, adapter, rows)
        found = {"validation_loss": nats / tokens}
        if asked:
            predicted = classification.score(decoder, adapter, asked).argmax(1).tolist()
            counts = classification.confusion(truth, predicted, len(labels))
            found["validation_accuracy"] = classification.accuracy(counts)
            found["validation_mcc"] = classification.matthews(counts)
        return found

    return measure
