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
from steelyard.models import weights
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


def prepare(config: TrainConfig) -> Prepared:
    """Read a run's rows as its base will. Raises as `stages.train.train` does."""
    if config.model is None:
        return _from_nothing(config)
    base = resolve(config.model)
    config, learnt, validation = streamed(config)
    tokenizer, template = Tokenizer.load(base), ChatTemplate.load(base)
    how = (tokenizer, template, config.data.max_length, config.data.too_long)
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
        return LanguageModelling(decoder, adapter, rows, base.resolve(), evaluator)

    counts = {**({"rows": len(learnt)} if small is None else small.counts()), "validation_rows": len(held)}
    parent = manifest.read(base).id
    return Prepared(config=config, counts=counts, parent=parent, build=build, digests=file_digests(config))


def _from_nothing(config: TrainConfig) -> Prepared:
    """Of plain texts, by a network that the configuration describes."""
    config, learnt, validation = streamed(config)
    for document in (next(iter(learnt)), *validation[:1]):
        if document.messages[0].role != "text":
            reason = "a decoder that begins from nothing learns plain text first: a .txt file, or rows with a 'text'"
            raise DataError(reason, file=document.file, line=document.line)
    network = config.network
    assert isinstance(network, DecoderNetwork), "checked before"

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
