"""Everything that a training run can be told, in one struct: the contents of run.toml."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from steelyard.data import augmentation
from steelyard.data.augmentation import Augmentation
from steelyard.data.chat import FormatConfig
from steelyard.errors import ConfigError
from steelyard.models.lora import MAX_RANK
from steelyard.train import choice, networks, optimizers, schedules
from steelyard.train.distillation import Divergence
from steelyard.train.lora import LoraConfig
from steelyard.train.networks import Network
from steelyard.train.optimizers import OptimizerConfig
from steelyard.train.schedules import ScheduleConfig


class DataConfig(FormatConfig, frozen=True, kw_only=True):
    """Which rows to learn from and to validate on, besides how they are read."""

    train: str
    """Path of the rows to learn from."""
    validation: str | None = None
    """Path of rows to validate on; they must not be in the training file."""
    holdout: int = 0
    """Without a validation file: how many rows of the training file to validate on."""
    max_length: int = 1024
    """Most tokens of a row."""
    too_long: str = "error"
    """What a longer row is: error, truncate or drop; of a classifier's text also windows: read in parts of max_length,
    in training and in use.
    """
    max_windows: int = 8
    """From how many parts of one text is learnt, at most, evenly over it; in use all are read."""
    deduplicate: bool = True
    """Remove exact duplicates before anything else."""
    bad_files: int = 0
    """How many images or recordings that cannot be read are left out, each with a line in the log; one more ends it."""


class DistillConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A classifier of texts, or a decoder, that learns from another model what that holds of them."""

    teacher: str | None = None
    """A checkpoint, or a source. Of a classifier: what labels texts, a classifier of any size, or a tuned model or
    adapter. Of a decoder: a model with the same tokenizer."""
    texts: str | None = None
    """A file of more texts to learn from, by what the teacher holds of them; labels there are not looked at."""
    weight: float = 0.7
    """Share of the loss that is the teacher's, of rows with a label; the rest is the label's."""
    temperature: float = 2.0
    """By which the logits of both are divided."""
    hidden: float = 0.0
    """Decoders as wide as their teacher: how much the states before the head are held to the teacher's as well."""
    layers: int = 0
    """With hidden: after so many blocks, evenly over both, the states are held to the teacher's, too."""
    keep: int = 0
    """Decoders: of each place the teacher's so many likeliest tokens are kept in the run's folder, so that it is asked
    once, before the first step, and not at every pass; all other tokens count as one. 0: it is asked at every pass.
    """
    own: float = 0.0
    """Decoders: of how many rows the answer is the student's own, drawn when the row's turn comes; all of their loss is
    the teacher's.
    """
    divergence: Divergence = "forward"
    """What the student is held to: forward: all that the teacher holds possible; reverse: what it holds likely;
    jensen-shannon: between them.
    """


class RoundingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All weights of a decoder that will be rounded afterwards: it learns with what rounding leaves of them."""

    bits: Literal[0, 4, 8] = 0
    """Of the linear layers' weights; 0: nothing is rounded."""
    group: int | None = None
    """Inputs that share a scale, as `compress quantize` will have them; unset: all."""


TaskName = Literal["generation", "classification", "tagging", "masked", "contrastive", "transcription", "preference"]


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A training run."""

    task: TaskName = "generation"
    """What is learnt: to go on with a text, which label a text or image has, which tag each word of a sentence has,
    what was hidden in a text, which texts belong together, what is said in a recording, or which of two answers is
    preferred (DPO).
    """
    beta: float = 0.1
    """preference: how strongly the base as it was holds."""
    model: str | None = None
    """The base checkpoint: a folder, or a source that `steelyard pull` takes. Of a classifier, a trained encoder."""
    network: Network | None = None
    """Of a classifier without a base."""
    chain: bool = False
    """tagging: which tags follow which is learnt, too (a conditional random field); a sentence's are found together."""
    label_smoothing: float = 0.0
    """classification: share of every target that all classes have alike."""
    output: str
    """The run's folder."""
    data: DataConfig
    method: Literal["lora", "full"] = "lora"
    """lora: learn an adapter of a frozen base. full: change all weights."""
    seed: int = 0
    """Decides the order of rows, the adapter's start and dropout."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of weights and activations; the optimizer keeps float32 masters. auto: bfloat16 on a base, else float32."""
    epochs: int = 3
    """Passes over the data."""
    batch_size: int = 8
    """Rows of an optimizer step; 0 means all rows (as gd does)."""
    micro_batch_tokens: int = 4096
    """Most tokens of a forward pass; a larger batch is accumulated over several, with the same result."""
    recompute: Literal["cheap", "blocks"] = "cheap"
    """What is made again for the backward pass of a decoder: what costs next to nothing, or whole blocks, which takes a
    third more time and a fraction of the memory.
    """
    clip: float = 1.0
    """Largest norm of the gradient; 0 leaves it alone."""
    evaluate_every: int = 0
    """Steps between evaluations; 0 means once an epoch."""
    checkpoint_every: int = 50
    """Steps between resumable states: the most that a kill can lose."""
    keep_checkpoints: int = 0
    """How many of the last evaluations' checkpoints are kept, in `checkpoints/`, besides best and last."""
    patience: int = 0
    """End the run after so many evaluations in a row that are no better than the best; 0 never does."""
    ema: float = 0.0
    """Decay of an exponential average of the weights, which is what is evaluated and kept; 0 keeps the last weights."""
    keep_zeros: bool = False
    """Weights that are 0 in the base stay 0: what is left of a pruned model is trained on."""
    threads: int | None = None
    """CPU threads; unset takes all cores. Another number can round differently."""
    lora: LoraConfig = LoraConfig()
    distill: DistillConfig = DistillConfig()
    rounding: RoundingConfig = RoundingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    augment: Augmentation = Augmentation()
    """Images and sound: how each is changed while it is learnt from."""


def check(config: TrainConfig) -> None:
    """Refuse what cannot be run, by key, before anything is loaded.

    Raises:
        ConfigError: the key and what it should be.
    """
    if config.optimizer.name != choice.AUTO:
        optimizers.check(config.optimizer)
    schedules.check(config.schedule)
    _check_origin(config)
    _check_task(config)
    if config.task == "preference" and config.method != "lora":
        raise ConfigError("task preference learns an adapter, against the base without it: leave method at lora")
    if not 0 < config.beta < math.inf:
        raise ConfigError(f"beta must be above 0, not {config.beta}")
    if config.network is not None:
        networks.check(config.network)
    if config.rounding.bits and (config.model is None or config.method != "full" or config.task != "generation"):
        raise ConfigError('rounding is for all weights of a decoder: name a model, and set method to "full"')
    if config.rounding.group is not None and not (config.rounding.bits and config.rounding.group >= 1):
        raise ConfigError("rounding.group is a number of inputs, and means nothing without rounding.bits")
    of_decoders = config.task in ("generation", "preference")
    if config.keep_zeros and (config.model is None or (of_decoders and config.method == "lora")):
        raise ConfigError('keep_zeros is for all weights of a pruned model: name a model, and set method to "full"')
    augmentation.check(config.augment)
    _check_teacher(config.distill)
    if config.chain and config.label_smoothing:
        raise ConfigError("label_smoothing means nothing to a chain: leave one of them out")
    if not 0 <= config.label_smoothing < 1:
        raise ConfigError(f"label_smoothing must be at least 0 and below 1, not {config.label_smoothing}")
    for key, least in (("epochs", 1), ("batch_size", 0), ("micro_batch_tokens", 1), ("checkpoint_every", 1)):
        if getattr(config, key) < least:
            raise ConfigError(f"{key} must be at least {least}, not {getattr(config, key)}")
    for key in ("evaluate_every", "keep_checkpoints", "patience"):
        if getattr(config, key) < 0:
            raise ConfigError(f"{key} must be at least 0, not {getattr(config, key)}")
    if config.data.max_windows < 1:
        raise ConfigError(f"data.max_windows must be at least 1, not {config.data.max_windows}")
    if config.data.bad_files < 0:
        raise ConfigError(f"data.bad_files must be at least 0, not {config.data.bad_files}")
    if not 0 <= config.ema < 1:
        raise ConfigError(f"ema must be at least 0 and below 1, not {config.ema}")
    if config.ema and config.optimizer.name == "schedule-free":
        raise ConfigError("ema means nothing to schedule-free, which has an average of its own")
    if not 0 <= config.clip < math.inf:
        raise ConfigError(f"clip must be at least 0, not {config.clip}; 0 does not clip")
    if not 0 <= config.seed < 1 << 63:
        raise ConfigError(f"seed must be 0 to 2**63 - 1, not {config.seed}")
    if config.threads is not None and config.threads < 1:
        raise ConfigError(f"threads must be at least 1, not {config.threads}")
    if config.data.max_length < 2 or config.data.holdout < 0:
        raise ConfigError("data.max_length must be at least 2 and data.holdout at least 0")
    if not 1 <= config.lora.rank <= MAX_RANK:
        raise ConfigError(f"lora.rank must be 1 to {MAX_RANK}, not {config.lora.rank}")
    if not 0 < config.lora.alpha < math.inf or not 0 <= config.lora.dropout < 1 or not config.lora.targets:
        raise ConfigError("lora.alpha must be above 0, lora.dropout in [0, 1), and lora.targets not empty")
    if config.optimizer.name == "gd" and config.batch_size != 0:
        raise ConfigError(
            "optimizer gd descends the gradient of all rows: set batch_size = 0 (or take sgd for batches of rows)"
        )


def _check_origin(config: TrainConfig) -> None:
    """A run begins from a model, or from a network that the task knows."""
    kinds = networks.OF_TASK.get(config.task, ())
    if not kinds and (config.network is not None or config.model is None):
        raise ConfigError(f"task {config.task} learns on a model: name it as 'model', and leave [network] out")
    if kinds and (config.network is None) == (config.model is None):
        raise ConfigError(f"task {config.task} learns on a 'model' or from a [network]: name one of them")
    if config.network is not None and not isinstance(config.network, kinds):
        known = ", ".join(str(kind.__struct_config__.tag) for kind in kinds)
        raise ConfigError(f"network.kind {networks.kind_of(config.network)} is none for task {config.task}: {known}")


def _check_teacher(config: DistillConfig) -> None:
    if config.teacher is None and config != DistillConfig():
        raise ConfigError("distill needs a teacher: set distill.teacher")
    if not 0 < config.weight <= 1:
        raise ConfigError(f"distill.weight must be above 0 and at most 1, not {config.weight}")
    if not 0 <= config.hidden < math.inf:
        raise ConfigError(f"distill.hidden must be at least 0, not {config.hidden}")
    if config.layers < 0 or (config.layers and not config.hidden):
        raise ConfigError("distill.layers is a number of blocks, and means nothing without distill.hidden")
    if config.keep < 0:
        raise ConfigError(f"distill.keep must be at least 0, not {config.keep}")
    if not 0 <= config.own <= 1:
        raise ConfigError(f"distill.own must be 0 to 1, not {config.own}")
    if config.keep and (config.own or config.hidden):
        name = "own" if config.own else "hidden"
        raise ConfigError(f"distill.{name} asks the teacher at every pass: leave distill.keep out")
    if not 0 < config.temperature <= 100:
        raise ConfigError(f"distill.temperature must be above 0 and at most 100, not {config.temperature}")


def _check_task(config: TrainConfig) -> None:
    refuse(config, FOREIGN[config.task], f"task {config.task}")
    if config.network is not None:
        refuse(config, ("lora",), "a network that begins from nothing")


def refuse(config: TrainConfig, paths: Sequence[str], who: str) -> None:
    """Refuse settings that mean nothing, where they are not left as they are by default.

    Raises:
        ConfigError: the first of them.
    """
    plain = TrainConfig(output="", data=DataConfig(train=""))
    for path in paths:
        asked, usual = config, plain
        for name in path.split("."):
            asked, usual = getattr(asked, name), getattr(usual, name)
        if asked != usual:
            raise ConfigError(f"{path} means nothing to {who}: leave it out")


def _but(*kept: str) -> tuple[str, ...]:
    """How rows are read, all settings but some."""
    return tuple(f"data.{name}" for name in FormatConfig.__struct_fields__ if name not in kept)


OF_LABELLED_TEXTS = ("distill", "data.max_windows")
"""Settings that classifiers of texts alone do something with."""
OF_DECODERS = ("recompute", "beta", "method", "lora")
"""Settings that decoders alone do something with."""
FOREIGN: dict[str, tuple[str, ...]] = {
    "generation": (
        "chain",
        *("distill.texts", "data.max_windows", "beta", "label_smoothing", "augment"),
        *(f"data.{name}" for name in ("image", "audio", "bad_files", "tokens", "tags")),
    ),
    "classification": (
        "chain",
        *(*OF_DECODERS, *(f"distill.{name}" for name in ("hidden", "layers", "keep", "own"))),
        *(f"data.{name}" for name in ("template", "system", "tokens", "tags")),
    ),
    "tagging": (
        *(*OF_LABELLED_TEXTS, *OF_DECODERS, "augment", "data.bad_files", "data.max_length", "data.too_long"),
        *_but("tokens", "tags", "labels"),
    ),
    "masked": (
        "chain",
        *(*OF_LABELLED_TEXTS, *OF_DECODERS, "label_smoothing", "augment", "data.bad_files", "data.too_long"),
        *_but("format", "text", "columns"),
    ),
    "contrastive": (
        "chain",
        *(*OF_LABELLED_TEXTS, *OF_DECODERS, "label_smoothing", "augment", "data.bad_files", "data.too_long"),
        *_but("columns"),
    ),
    "transcription": (
        "chain",
        *(*OF_LABELLED_TEXTS, *OF_DECODERS, "label_smoothing", "data.max_length", "data.too_long"),
        *_but("audio", "text", "columns"),
    ),
    "preference": (
        "chain",
        *(*OF_LABELLED_TEXTS, "label_smoothing", "augment", "data.too_long", "data.deduplicate", "data.bad_files"),
        *_but(),
    ),
}
"""Settings that a task does nothing with."""
OF_TEXTS = ("data.image", "data.audio", "data.bad_files")
OF_IMAGES = (*OF_LABELLED_TEXTS, "data.text", "data.audio", "data.max_length", "data.too_long")
"""Settings that a classifier of the one or the other does nothing with."""
