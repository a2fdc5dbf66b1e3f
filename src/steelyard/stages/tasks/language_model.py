"""Training a decoder: rows to tokens, the base, its adapter, what is measured on the way."""

from __future__ import annotations

from pathlib import Path

import torch

from steelyard import __version__
from steelyard.checkpoint import manifest
from steelyard.checkpoint.sources import resolve
from steelyard.data.rows import Conversation, TokenRow
from steelyard.data.token_rows import TokenRows
from steelyard.data.tokenize import tokenize, tokenized
from steelyard.errors import ConfigError, DataError
from steelyard.evaluate import classification
from steelyard.evaluate.likelihood import negative_log_likelihood
from steelyard.models import classifiers, head_tokens, weights
from steelyard.models import config as decoder_config
from steelyard.models.decoder import Decoder
from steelyard.models.head_tokens import Head
from steelyard.models.lora import Adapter
from steelyard.runs import Run
from steelyard.stages.tasks import fresh_decoder
from steelyard.stages.tasks.own_answers import OwnAnswers
from steelyard.stages.tasks.prepared import DTYPES, Prepared, file_digests, is_large, mapped_rows, streamed
from steelyard.stages.tasks.teacher_memory import remember
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
        return LanguageModelling(*given) if teacher is None else _taught(given, teacher, config, run, tokenizer)

    counts = {**({"rows": len(learnt)} if small is None else small.counts()), "validation_rows": len(held)}
    digests = file_digests(config)
    if teacher is not None:
        digests["teacher"] = manifest.read(teacher).id
    parent = manifest.read(base).id
    return Prepared(config=config, counts=counts, parent=parent, build=build, digests=digests)


def _taught(
    given: tuple[Decoder, Adapter | None, TokenRows, Path, Evaluator | None],
    teacher: Path,
    config: TrainConfig,
    run: Run,
    tokenizer: Tokenizer,
) -> Student:
    """The task with a teacher, which is loaded where it has to be asked."""
    (decoder, adapter, rows, base, _), asked = given, config.distill
    dtype = DTYPES[config.dtype]
    kept, vocabulary = head_tokens.read(base, decoder.config.vocabulary), decoder.config.vocabulary
    if asked.keep:
        head = None if kept is None else Head(kept, vocabulary)
        key = (__version__, manifest.read(teacher).id, config.dtype, str(None if kept is None else kept.tolist()))
        memory = remember(
            run, key, rows, asked.keep, asked.temperature, teacher=lambda: weights.load(teacher, dtype), head=head
        )
        return Student(*given, teacher=memory, how=asked)
    known = weights.load(teacher, dtype)
    if asked.hidden and known.config.width != decoder.config.width:
        raise ConfigError("distill.hidden is for a student as wide as its teacher: leave it out")
    least = min(known.config.layers, decoder.config.layers)
    if asked.layers >= least:
        raise ConfigError(f"distill.layers must be below {least}, the blocks of student or teacher")
    if asked.own and kept is not None:
        raise ConfigError("distill.own is for models that say all tokens, not for a draft: leave it out")
    if asked.own and adapter is not None and type(adapter) is not Adapter:
        raise ConfigError("distill.own is for LoRA, or all weights: leave it out, or lora.dora")
    writer = OwnAnswers(decoder, adapter, tokenizer, config.data.max_length) if asked.own else None
    return Student(*given, teacher=known, how=asked, writer=writer)


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
