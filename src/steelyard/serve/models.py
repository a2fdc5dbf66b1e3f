"""Which models are served: a name to its engine, its adapter, its tokenizer and its chat template.

Knows checkpoint folders and names; nothing of HTTP. A model is called as `NAME=PATH` says, or as its checkpoint's
folder, an adapter as `--adapter NAME=PATH` says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from steelyard.checkpoint.manifest import kind_of, reads_text
from steelyard.errors import ConfigError, EngineUnavailableError, RequestError
from steelyard.infer.request import CacheKind, Ready
from steelyard.serve.engine_client import Command, EngineClient, worker_command
from steelyard.text.chat_template import ChatTemplate
from steelyard.text.tokenizer import Tokenizer

MODEL_NAME = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,127})=([^=].*)", re.DOTALL)
PLACES = ("best", "last")
"""Folders of a run, which says whose they are."""
ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")

MOST_OF_A_TOKEN = 128
"""Characters of a token, on average: what has more than a context of these is refused unread."""


@dataclass(frozen=True)
class ServedModel:
    """A name that requests may use."""

    id: str
    engine: EngineClient
    adapter: str | None
    """The adapter that its requests wear; None is the base model."""
    own_tokenizer: Tokenizer | None
    """None for a model that reads no text."""
    template: ChatTemplate | None
    """None for a model that was not made to chat."""
    created: int
    """When its checkpoint was written, in Unix seconds."""
    project: str | None = None
    """Whose it is; None: everybody may ask it."""
    base: str | None = None
    """The model that it was made from, where that is served too."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its own and its base's: the first that has a price says what it costs."""
        return (self.id,) if self.base is None else (self.id, self.base)

    @property
    def tokenizer(self) -> Tokenizer:
        """Of a model that reads texts.

        Raises:
            RequestError: it reads none.
        """
        if self.own_tokenizer is None:
            raise RequestError(f"'{self.id}' reads no texts", param="model", code="model_not_supported")
        return self.own_tokenizer

    @property
    def is_base(self) -> bool:
        """Whether it is served to everybody, by an engine of its own: others are made from it."""
        return self.adapter is None and self.project is None

    def ready(self) -> Ready:
        """What its engine says of itself.

        Raises:
            EngineUnavailableError: the engine is not ready.
        """
        if self.engine.ready is None:
            raise EngineUnavailableError(f"the engine of '{self.id}' is {self.engine.status}: try again shortly")
        return self.engine.ready

    def demand_short(self, characters: int, param: str) -> None:
        """Before a text becomes tokens.

        Raises:
            RequestError: no context holds so many characters.
            EngineUnavailableError: the engine is not ready.
        """
        context = self.ready().context
        if characters > context * MOST_OF_A_TOKEN:
            reason = f"'{param}' has {characters:,} characters, which no context of {context} tokens holds: shorten it"
            raise RequestError(reason, param=param.partition("[")[0], code="context_length_exceeded")


Models = Mapping[str, ServedModel]


def engines(models: Models) -> list[EngineClient]:
    """Every engine, once."""
    return list({id(model.engine): model.engine for model in models.values()}.values())


def named(text: str) -> tuple[str | None, str]:
    """`NAME=PATH`, or a path or source alone, as name and path."""
    match = None if os.path.lexists(text) else MODEL_NAME.fullmatch(text)
    return (None, text) if match is None else (match[1], match[2])


def called(folder: Path) -> str:
    """What a checkpoint is called by its place: `runs/sms/best` is `sms`."""
    whole = Path(os.path.abspath(folder))  # noqa: PTH100  (a link keeps its own name)
    return whole.parent.name if whole.name in PLACES and (whole.parent / "run.json").is_file() else whole.name


def parse_adapters(texts: Sequence[str], models: Sequence[str]) -> dict[str, dict[str, Path]]:
    """`NAME=PATH`, or `NAME=PATH@MODEL` where there are several models, to adapter folders by model and name.

    Raises:
        ConfigError: a text is not of this form, or a name is taken or no name.
    """
    adapters: dict[str, dict[str, Path]] = {model: {} for model in models}
    taken = set(models)
    for text in texts:
        name, _, rest = text.partition("=")
        path, _, model = rest.rpartition("@")
        if not path or model not in adapters:
            path, model = rest, models[0] if len(models) == 1 else ""
        if not path or not ADAPTER_NAME.fullmatch(name):
            raise ConfigError(f"--adapter '{text}': write NAME=PATH, NAME of letters, digits and . _ : / -")
        if not model:
            raise ConfigError(f"--adapter '{text}': say for which model, NAME=PATH@MODEL, one of {', '.join(models)}")
        if name in taken:
            raise ConfigError(f"--adapter '{text}': the name '{name}' is taken; choose another")
        taken.add(name)
        adapters[model][name] = Path(path)
    return adapters


def parse_drafts(texts: Sequence[str], models: Sequence[str]) -> dict[str, Path]:
    """`PATH`, or `PATH@MODEL` where there are several models, to draft folders by model.

    Raises:
        ConfigError: no model is named, or one has two drafts.
    """
    drafts: dict[str, Path] = {}
    for text in texts:
        path, _, model = text.rpartition("@")
        if not path or model not in models:
            path, model = text, models[0] if len(models) == 1 else ""
        if not model:
            raise ConfigError(f"--draft '{text}': say for which model, PATH@MODEL, one of {', '.join(models)}")
        if model in drafts:
            raise ConfigError(f"--draft '{text}': '{model}' has a draft already")
        drafts[model] = Path(path)
    return drafts


def load_models(
    checkpoints: Sequence[Path],
    adapters: Sequence[str] = (),
    drafts: Sequence[str] = (),
    *,
    names: Mapping[Path, str] | None = None,
    kv_cache: CacheKind = "bfloat16",
    command: Command = worker_command,
) -> dict[str, ServedModel]:
    """The models of checkpoint folders and their adapters, in this order. No engine is started.

    Args:
        checkpoints: the folders.
        adapters: see `parse_adapters`.
        drafts: see `parse_drafts`.
        names: of some of the folders; the others are `called` by their places.
        kv_cache: how engines keep keys and values.
        command: makes the command line of an engine process.

    Raises:
        CheckpointError: a folder is missing or no checkpoint, or its tokenizer does not load.
        ConfigError: an adapter where a model belongs or the reverse, a name that is used twice, or a draft of no model.
    """
    folders: dict[str, Path] = {}
    for checkpoint in checkpoints:
        folder = Path(os.path.abspath(checkpoint))  # noqa: PTH100  (a link keeps its own name)
        if kind_of(folder) == "adapter":
            raise ConfigError(
                f"'{checkpoint}' is an adapter: give its base model as CHECKPOINT and --adapter NAME={checkpoint}"
            )
        name = (names or {}).get(checkpoint) or called(folder)
        if name in folders:
            raise ConfigError(f"two checkpoints are called '{name}': give one another name, as NAME={checkpoint}")
        folders[name] = folder
    if not folders:
        raise ConfigError("no checkpoint to serve: name at least one folder")
    models: dict[str, ServedModel] = {}
    guessing = parse_drafts(drafts, list(folders))
    for base, worn in parse_adapters(adapters, list(folders)).items():
        for name, path in worn.items():
            if kind_of(path) != "adapter":
                raise ConfigError(f"--adapter {name}={path}: this is a whole model; give it as CHECKPOINT")
        folder = folders[base]
        engine = EngineClient(base, folder, worn, draft=guessing.get(base), kv_cache=kv_cache, command=command)
        models[base] = whole_model(base, engine)
        for name, path in worn.items():
            models[name] = adapter_model(name, path, models[base])
    return models


def adapter_model(name: str, path: Path, base: ServedModel, project: str | None = None) -> ServedModel:
    """The adapter at `path` as a model of its own, beside its base; a project's, or everybody's.

    Raises:
        CheckpointError: its chat template is broken.
    """
    # An adapter may have been trained with a template of its own; its tokens are the base model's.
    own = ChatTemplate.load(path) or base.template
    created = _written(path / "adapter_config.json")
    return ServedModel(name, base.engine, name, base.own_tokenizer, own, created, project, base.id)


def whole_model(name: str, engine: EngineClient, project: str | None = None, base: str | None = None) -> ServedModel:
    """The model of an engine.

    Raises:
        CheckpointError: its tokenizer or its chat template does not load.
    """
    folder = engine.checkpoint
    tokenizer = Tokenizer.load(folder) if reads_text(folder) else None
    template = ChatTemplate.load(folder)
    return ServedModel(name, engine, None, tokenizer, template, _written(folder / "config.json"), project, base)


def _written(file: Path) -> int:
    return int(file.stat().st_mtime)
