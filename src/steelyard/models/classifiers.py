"""Classifiers of texts and images: an example in, a logit for each class out; saved, opened, asked.

config.json: "architectures": ["SteelyardConvNet"], the network's sizes, "id2label"
"""

# B rows  L longest row  C classes

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from steelyard.checkpoint import manifest
from steelyard.errors import CheckpointError
from steelyard.models import chain as chains
from steelyard.models import images, quantized, weights
from steelyard.models.chain import Chain, Scores
from steelyard.models.chain import Path as Labels
from steelyard.models.convnet import ConvNet, ConvNetConfig
from steelyard.models.encoder import Encoder, EncoderClassifier, EncoderConfig
from steelyard.models.fusion import FusionClassifier, FusionConfig
from steelyard.models.inputs import FusedInputs, ImageInputs, Inputs, TextInputs, WordInputs
from steelyard.models.recurrent import RecurrentClassifier, RecurrentConfig
from steelyard.models.tagger import EncoderTagger
from steelyard.models.vision import VisionConfig, VisionTransformer
from steelyard.text.tokenizer import Tokenizer

SHORTEST = 8
"""Tokens of a window, at least."""
ROWS, TOKENS = 64, 8192
"""Most rows and tokens of a forward pass that measures."""
ENCODERS = ("BertModel", "BertForMaskedLM")
"""Trained encoders that a classifier is made from."""


Network = RecurrentClassifier | EncoderClassifier | ConvNet | VisionTransformer | EncoderTagger | FusionClassifier
"""Arguments as its inputs make them -> logits `[B, C]`; of a tagger, for each word of the rows."""
ARCHITECTURES: dict[str, type[Network]] = {
    "SteelyardRecurrentClassifier": RecurrentClassifier,
    "SteelyardEncoderClassifier": EncoderClassifier,
    "SteelyardConvNet": ConvNet,
    "SteelyardVisionTransformer": VisionTransformer,
    "SteelyardEncoderTagger": EncoderTagger,
    "SteelyardFusionClassifier": FusionClassifier,
}


@dataclass(frozen=True)
class Classifier:
    """A network, what it reads, and what its classes are called."""

    network: Network
    inputs: Inputs
    labels: tuple[str, ...]
    origin: Path | None = None
    """Where the files are that go with the weights, such as a tokenizer's."""

    @property
    def text(self) -> TextInputs:
        """What a classifier of texts reads. Raises CheckpointError: it reads something else."""
        if not isinstance(self.inputs, TextInputs):
            raise CheckpointError("this classifier reads no texts: give it what it was trained on")
        return self.inputs

    @property
    def words(self) -> WordInputs:
        """What a tagger reads. Raises CheckpointError: it is none."""
        if not isinstance(self.inputs, WordInputs):
            raise CheckpointError("this classifier tags no words: give it what it was trained on")
        return self.inputs

    @property
    def fused(self) -> FusedInputs:
        """What a classifier of several kinds reads. Raises CheckpointError: it reads one kind."""
        if not isinstance(self.inputs, FusedInputs):
            raise CheckpointError("this classifier reads one kind of examples: give it what it was trained on")
        return self.inputs

    @property
    def image(self) -> ImageInputs:
        """What a classifier of images reads. Raises CheckpointError: it reads something else."""
        if not isinstance(self.inputs, ImageInputs):
            raise CheckpointError("this classifier reads no images: give it what it was trained on")
        return self.inputs


def architecture(folder: Path) -> str:
    """What a model's config.json says that it is; empty: nothing."""
    named = manifest.read_json(folder / "config.json").get("architectures") or [""]
    return str(named[0])


def is_classifier(folder: Path) -> bool:
    """Whether a checkpoint is one of ours."""
    return manifest.kind_of(folder) == "model" and architecture(folder) in ARCHITECTURES


def reads_images(folder: Path) -> bool:
    """Whether a checkpoint is a classifier of images."""
    return is_classifier(folder) and ARCHITECTURES[architecture(folder)] in (ConvNet, VisionTransformer)


def reads_texts(folder: Path) -> bool:
    """Whether a checkpoint is a classifier of whole texts."""
    return is_classifier(folder) and ARCHITECTURES[architecture(folder)] in (RecurrentClassifier, EncoderClassifier)


def reads_several(folder: Path) -> bool:
    """Whether a checkpoint is a classifier of texts, images and sounds together."""
    return is_classifier(folder) and ARCHITECTURES[architecture(folder)] is FusionClassifier


def tags_words(folder: Path) -> bool:
    """Whether a checkpoint is a tagger."""
    return is_classifier(folder) and ARCHITECTURES[architecture(folder)] is EncoderTagger


def load(folder: Path) -> Classifier:
    """Open a classifier for evaluation, in the dtype that it was trained in.

    Raises:
        CheckpointError: it is none, or its weights do not fit its config.json.
    """
    raw = manifest.read_json(folder / "config.json")
    kind = architecture(folder)
    if kind not in ARCHITECTURES:
        raise CheckpointError(f"'{folder}' is no classifier: its architecture is '{kind}'")
    labels = _labels(raw, folder)
    network = _network(ARCHITECTURES[kind], raw, len(labels), folder)
    tensors = weights.read_tensors(folder)
    if raw.get("quantization_config") is not None:
        quantized.check(raw["quantization_config"], folder)
    floats = [
        tensor.dtype for name, tensor in tensors.items() if not name.endswith("_scale") and tensor.is_floating_point()
    ]
    if all(dtype == torch.bfloat16 for dtype in floats):  # it runs as it was trained
        network.to(torch.bfloat16)
    weights.fill(network, tensors, folder)
    inputs = inputs_of(network, folder)
    if isinstance(inputs, TextInputs):
        inputs = replace(inputs, window=_window(raw, inputs.context, folder))
    return Classifier(network.eval().requires_grad_(False), inputs, labels, folder)


def _window(raw: dict[str, Any], context: int | None, folder: Path) -> int | None:
    window = raw.get("window")
    if window is None or (isinstance(window, int) and SHORTEST <= window <= (context or window)):
        return window
    raise CheckpointError(f"'{folder}/config.json': window must be at least {SHORTEST} tokens, and in the context")


def inputs_of(network: Network, folder: Path) -> Inputs:
    """What a network reads; texts by the tokenizer in `folder`. Raises CheckpointError: there is none."""
    if isinstance(network, ConvNet | VisionTransformer):
        return ImageInputs(network.config.num_channels, network.config.image_size)
    if isinstance(network, FusionClassifier):
        towers = network.config
        return FusedInputs(
            None if towers.text is None else TextInputs(Tokenizer.load(folder), towers.text.max_position_embeddings),
            None if towers.image is None else ImageInputs(towers.image.num_channels, towers.image.image_size),
            None if towers.audio is None else towers.audio.num_mel_bins,
        )
    if isinstance(network, EncoderTagger):
        return WordInputs(Tokenizer.load(folder), network.context)
    return TextInputs(Tokenizer.load(folder), network.context)


def _network(kind: type[Network], raw: dict[str, Any], classes: int, folder: Path) -> Network:
    if kind is ConvNet:
        return ConvNet(_convnet(raw, classes))
    if kind is VisionTransformer:
        return VisionTransformer(VisionConfig.parse(raw, classes))
    if kind is FusionClassifier:
        return FusionClassifier(FusionConfig.parse(raw, classes))
    if kind is EncoderTagger:
        return EncoderTagger(EncoderConfig.parse(raw, classes))
    if kind is EncoderClassifier:
        return EncoderClassifier(EncoderConfig.parse(raw, classes))
    return RecurrentClassifier(_recurrent(raw, classes, folder))


def _convnet(raw: dict[str, Any], classes: int) -> ConvNetConfig:
    config = images.parse(raw, classes, ConvNetConfig)
    if not config.widths or not 1 <= min(config.widths) <= max(config.widths) <= 4096 or not 1 <= config.blocks <= 64:
        raise CheckpointError("config.json: widths must be 1 to 4096 and blocks 1 to 64")
    return config


def load_encoder(folder: Path) -> Encoder:
    """Open a trained encoder.

    Raises:
        CheckpointError: it is none that is known here, or its weights do not fit its config.json.
    """
    kind = architecture(folder)
    if kind not in ENCODERS:
        raise CheckpointError(
            f"'{folder}': architecture '{kind}' is no encoder that is known here: {', '.join(ENCODERS)}"
        )
    raw = manifest.read_json(folder / "config.json")
    encoder = Encoder(EncoderConfig.parse(raw))
    if raw.get("quantization_config") is not None:
        quantized.check(raw["quantization_config"], folder)
    tensors = {name.removeprefix("bert."): tensor for name, tensor in weights.read_tensors(folder).items()}
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(("embeddings.", "encoder."))}
    kept.pop("embeddings.position_ids", None)
    weights.fill(encoder, kept, folder)
    return encoder.eval().requires_grad_(False)


def on_encoder(
    folder: Path,
    labels: Sequence[str],
    generator: torch.Generator,
    kind: type[EncoderClassifier] | type[EncoderTagger] = EncoderClassifier,
    *,
    chain: bool = False,
    bio: bool = False,
) -> Classifier:
    """A classifier or tagger on a trained encoder, its last layer new. Raises as `load_encoder` does."""
    encoder = load_encoder(folder)
    quantized.demand_dense(encoder, folder)
    network = kind(msgspec.structs.replace(encoder.config, classes=len(labels), chain=chain, bio=bio))
    network.encoder = encoder.requires_grad_(True)
    _begin(network.classifier, generator)
    return Classifier(network, inputs_of(network, folder), tuple(labels), folder)


def on_trained(folder: Path, labels: Sequence[str], generator: torch.Generator) -> Classifier:
    """A classifier on what was trained before: an encoder, or another classifier. Raises as they do."""
    return (swap_head if is_classifier(folder) else on_encoder)(folder, labels, generator)


def swap_head(
    folder: Path, labels: Sequence[str], generator: torch.Generator, *, chain: bool = False, bio: bool = False
) -> Classifier:
    """A trained classifier with other classes: its last layer new unless the labels are its own. Raises as `load`.

    A tagger's `chain` is new where it had none.
    """
    opened = load(folder)
    quantized.demand_dense(opened.network, folder)
    network = opened.network.requires_grad_(True)
    same = opened.labels == tuple(labels)
    if isinstance(network, EncoderTagger):
        if network.config.chain != chain or not same:
            network.chain = Chain(len(labels)) if chain else None
        network.config = msgspec.structs.replace(network.config, chain=chain, bio=bio)
    if same:
        return opened
    if isinstance(network, FusionClassifier):
        raise CheckpointError(f"'{folder}' tells {', '.join(opened.labels)} apart: its labels cannot be others")
    config: Any = msgspec.structs.replace(network.config, classes=len(labels))
    network.config = config
    network.classifier = nn.Linear(network.classifier.in_features, len(labels))
    _begin(network.classifier, generator)
    return Classifier(network, opened.inputs, tuple(labels), folder)


def _begin(layer: nn.Linear, generator: torch.Generator) -> None:
    with torch.no_grad():
        layer.weight.normal_(0, 0.02, generator=generator)
        layer.bias.zero_()


def save(classifier: Classifier, folder: Path) -> None:
    """Write a classifier's files into `folder`."""
    network = classifier.network
    config: Any = network.config
    values = {name: value for name, value in msgspec.to_builtins(config).items() if name != "classes"}
    kind = next(name for name, known in ARCHITECTURES.items() if known is type(network))
    if isinstance(classifier.inputs, TextInputs) and classifier.inputs.window is not None:
        values["window"] = classifier.inputs.window
    names = {str(number): label for number, label in enumerate(classifier.labels)}
    text = json.dumps({"architectures": [kind], **values, "id2label": names}, indent=2, ensure_ascii=False)
    origin = classifier.origin
    weights.write(network.state_dict(), folder, zeros=origin is None or not weights.is_sparse(origin))
    if origin is not None:
        weights.copy_companions(origin, folder)
    (folder / "config.json").write_text(text + "\n")


@torch.inference_mode()
def log_probabilities(
    classifier: Classifier, examples: Sequence[Any], report: Callable[[int], None] = lambda done: None
) -> torch.Tensor:
    """Of every class for every example, `[R, C]` float32, in nats; of a tagger, for the words of all in their order.

    Of words in a chain: whatever their neighbours are.

    Raises:
        CheckpointError: a figure that is not a number: the weights are broken.
    """
    places = _places(classifier.inputs, examples)
    scores = torch.empty(places[-1], len(classifier.labels))
    for chosen, logits in _passes(classifier, examples, report):
        where = torch.cat([torch.arange(places[row], places[row + 1]) for row in chosen])
        if (chain := chain_of(classifier)) is None:
            scores[where] = logits.log_softmax(-1)
        else:
            counts = [places[row + 1] - places[row] for row in chosen]
            lengths = torch.tensor(counts)
            marginals = chains.log_marginals(chain, chains.padded(logits, counts), lengths)
            scores[where] = marginals[torch.arange(int(lengths.max())) < lengths[:, None]]
    _demand_finite(scores if chain_of(classifier) is None else scores.clamp(min=-1e9))  # what cannot be is -inf
    return scores


def _demand_finite(figures: torch.Tensor) -> None:
    if not bool(figures.isfinite().all()):
        raise CheckpointError("the model's figures are not finite: its weights are broken, pull or train anew")


@torch.inference_mode()
def tagged(
    classifier: Classifier, examples: Sequence[Any], k: int = 1, report: Callable[[int], None] = lambda done: None
) -> list[list[Labels]]:
    """The k likeliest sequences of labels of each sentence, with their log-probabilities.

    Args:
        classifier: a tagger.
        examples: sentences, as its inputs have them.
        k: how many, at most.
        report: told (sentences done).

    Raises:
        CheckpointError: a figure that is not a number.
    """
    places = _places(classifier.inputs, examples)
    found: list[list[Labels]] = [[]] * len(examples)
    chain = chain_of(classifier)
    for chosen, logits in _passes(classifier, examples, report):
        counts = [places[row + 1] - places[row] for row in chosen]
        if chain is None and k == 1:
            likeliest = logits.log_softmax(-1).max(-1)
            _demand_finite(likeliest.values)
            for row, *each in zip(chosen, *(torch.split(part, counts) for part in likeliest), strict=True):
                found[row] = [Labels(each[1].tolist(), float(each[0].sum()))]
            continue
        chain = chain or chains.free(len(classifier.labels))
        emissions, lengths = chains.padded(logits, counts), torch.tensor(counts)
        total = chains.log_partition(chain, emissions, lengths)
        _demand_finite(total)
        for row, whole, paths in zip(chosen, total.tolist(), chains.best(chain, emissions, lengths, k), strict=True):
            found[row] = [Labels(path.labels, path.score - whole) for path in paths]
    return found


def chain_of(classifier: Classifier) -> Scores | None:
    """What is known of which labels follow which: learnt, or by what begin-inside-outside labels mean."""
    network = classifier.network
    if not isinstance(network, EncoderTagger):
        return None
    learnt = None if network.chain is None else network.chain.scores
    if not network.config.bio:
        return learnt
    return chains.constrained(learnt or chains.free(len(classifier.labels)), classifier.labels)


def _passes(
    classifier: Classifier, examples: Sequence[Any], report: Callable[[int], None]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Forward passes over examples of like size: which ones, and their logits in float32."""
    inputs = classifier.inputs
    one_size = isinstance(inputs, ImageInputs)  # then none needs to be read for it
    sizes = [inputs.size(None if one_size else examples[row]) for row in range(len(examples))]
    order = sorted(range(len(examples)), key=sizes.__getitem__)
    done = 0
    while done < len(order):
        count = max(1, min(ROWS, TOKENS // sizes[order[min(done + ROWS, len(order)) - 1]]))
        chosen = order[done : done + count]
        yield chosen, classifier.network(*inputs.batch([examples[row] for row in chosen])).float()
        done += count
        report(min(done, len(order)))


def of_texts(
    classifier: Classifier, texts: Sequence[str], report: Callable[[int], None] = lambda done: None
) -> tuple[torch.Tensor, int]:
    """Of every class for every text, `[R, C]` as `log_probabilities`, and how many tokens were read.

    Of a text that is read in windows the mean over its tokens, normalised. Raises as `log_probabilities` does.
    """
    inputs = classifier.text
    windows = [inputs.windows(inputs.all_tokens(text)) for text in texts]
    return of_windows(classifier, windows, report), sum(len(row) for rows in windows for row in rows)


def of_windows(
    classifier: Classifier, texts: Sequence[Sequence[list[int]]], report: Callable[[int], None] = lambda done: None
) -> torch.Tensor:
    """The same of texts as their windows' tokens: `[R, C]`."""
    examples = [row for rows in texts for row in rows]
    owners = torch.tensor([number for number, rows in enumerate(texts) for _ in rows])
    scores = log_probabilities(classifier, examples, lambda done: report(done * len(texts) // len(examples)))
    sizes = torch.tensor([len(row) for row in examples]).float()
    weighed = torch.zeros(len(texts), scores.shape[1]).index_add_(0, owners, scores * sizes[:, None])
    shared = weighed / torch.zeros(len(texts)).index_add_(0, owners, sizes)[:, None]
    return shared.log_softmax(-1)


def _places(inputs: Inputs, examples: Sequence[Any]) -> list[int]:
    """Where each example's rows begin among the scores, and where the last one's end."""
    if isinstance(inputs, WordInputs):
        return [0, *itertools.accumulate(len(example.places) for example in examples)]
    return list(range(len(examples) + 1))


def _labels(raw: dict[str, Any], folder: Path) -> tuple[str, ...]:
    names = raw.get("id2label")
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))) or len(names) < 2:
        raise CheckpointError(f"'{folder}/config.json': id2label must name at least two classes, from 0 on")
    return tuple(str(names[str(number)]) for number in range(len(names)))


def _recurrent(raw: dict[str, Any], classes: int, folder: Path) -> RecurrentConfig:
    try:
        known = {name: raw[name] for name in RecurrentConfig.__struct_fields__ if name in raw}
        config = msgspec.convert({**known, "classes": classes}, RecurrentConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"'{folder}/config.json': {error}") from None
    sizes = (config.vocab_size, config.embedding_size, config.hidden_size, config.dense_size)
    if min(sizes) < 1 or max(sizes) > 1 << 20:
        raise CheckpointError(f"'{folder}/config.json': every size must be at least 1 and at most {1 << 20}")
    return config
