"""Text, image and sound together: a tower for each, and three ways to join what they see; any of them may be missing.

late              each tower has logits of its own; the sum of those that are there: a product of experts (Hinton 2002)
gated             what towers see is weighed by gates over all of it, then classified (Arevalo et al. 2017)
cross-attention   a learnt question attends to every state of every tower (Vaswani et al. 2017), then it is classified
"""

# B rows  L tokens  C channels  S side  M mel bands  F frames  N states of all towers  D width  K classes

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import nn

from steelyard.errors import CheckpointError
from steelyard.models import images
from steelyard.models.convnet import ConvNet, ConvNetConfig
from steelyard.models.dropout import Dropout
from steelyard.models.encoder import Encoder, EncoderConfig, is_token
from steelyard.models.seq2seq import WhisperConfig, WhisperEncoder

MODALITIES = ("text", "image", "audio")
Seen = tuple[torch.Tensor, torch.Tensor]
"""States `[B, n, D]` of a tower, and which of them `[B, n]` are no padding."""


class FusionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Towers and how they are joined."""

    how: Literal["late", "gated", "cross-attention"] = "gated"
    width: int = 128
    heads: int = 4
    """Of cross-attention."""
    dropout: float = 0.1
    drop_modality: float = 0.1
    """Share of the rows that learn without one of their modalities."""
    alone: bool = False
    """Whether each modality has a classifier of its own, too, that learns beside the joined one; "late" always has."""
    text: EncoderConfig | None = None
    image: ConvNetConfig | None = None
    audio: WhisperConfig | None = None
    classes: int = 0

    @property
    def modalities(self) -> tuple[str, ...]:
        """Which there are, in their order."""
        return tuple(name for name in MODALITIES if getattr(self, name) is not None)

    @classmethod
    def parse(cls, raw: Mapping[str, Any], classes: int) -> FusionConfig:
        """Read a `config.json`'s fields.

        Raises:
            CheckpointError: one that is missing, out of range or not known here.
        """
        names = ("how", "width", "heads", "dropout", "drop_modality", "alone")
        known = {name: raw[name] for name in names if name in raw}
        towers: dict[str, Any] = {}
        for name, parse in (
            ("text", EncoderConfig.parse),
            ("image", lambda inner: images.parse(inner, 0, ConvNetConfig)),
            ("audio", WhisperConfig.parse),
        ):
            if raw.get(name) is not None:
                if not isinstance(raw[name], dict):
                    raise CheckpointError(f"config.json: {name} must describe a tower")
                towers[name] = parse(raw[name])
        try:
            config = msgspec.convert({**known, "classes": classes}, cls)
        except msgspec.ValidationError as error:
            raise CheckpointError(f"config.json: {error}") from None
        if not towers or not 1 <= config.width <= 1 << 16 or config.heads < 1 or config.width % config.heads:
            raise CheckpointError("config.json: a tower is needed, and heads must divide width")
        return msgspec.structs.replace(config, **towers)


class _TextTower(nn.Module):
    def __init__(self, config: EncoderConfig, width: int) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.project = nn.Linear(config.hidden_size, width)

    def forward(self, token_ids: torch.Tensor, lengths: torch.Tensor) -> Seen:
        return self.project(self.encoder(token_ids, lengths)), is_token(token_ids, lengths)


class _ImageTower(nn.Module):
    def __init__(self, config: ConvNetConfig, width: int) -> None:
        super().__init__()
        self.network = ConvNet(msgspec.structs.replace(config, classes=1))  # its own head goes
        del self.network.classifier
        self.project = nn.Linear(config.widths[-1], width)

    def forward(self, pictures: torch.Tensor) -> Seen:
        states = self.project(self.network.places(pictures).flatten(2).transpose(1, 2))
        return states, torch.ones(states.shape[:2], dtype=torch.bool)


class _AudioTower(nn.Module):
    def __init__(self, config: WhisperConfig, width: int) -> None:
        super().__init__()
        self.encoder = WhisperEncoder(config)
        self.project = nn.Linear(config.d_model, width)

    def forward(self, features: torch.Tensor, frames: torch.Tensor) -> Seen:
        states = self.project(self.encoder(features.to(next(self.parameters()).dtype), frames))
        return states, torch.arange(states.shape[1]) < ((frames + 1) // 2)[:, None]


class _Alone(nn.Module):
    """Logits of each modality, whatever the others see: `[B, modalities, K]`."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.classifiers = nn.ModuleDict({name: nn.Linear(config.width, config.classes) for name in config.modalities})

    def each(self, seen: dict[str, Seen]) -> torch.Tensor:
        return torch.stack([self.classifiers[name](_mean(found)) for name, found in seen.items()], 1)


class _Late(_Alone):
    """The sum over the modalities that are there."""

    def forward(self, seen: dict[str, Seen], present: torch.Tensor) -> torch.Tensor:
        return (self.each(seen) * present[..., None]).sum(1)


class _Gated(nn.Module):
    """Every modality's features, weighed by gates over all of them."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        count = len(config.modalities)
        self.features = nn.ModuleDict({name: nn.Linear(config.width, config.width) for name in config.modalities})
        self.gates = nn.Linear(count * config.width, count * config.width)
        self.classifier = nn.Linear(config.width, config.classes)
        self.dropout = Dropout(config.dropout)

    def forward(self, seen: dict[str, Seen], present: torch.Tensor) -> torch.Tensor:
        means = torch.stack([_mean(found) for found in seen.values()], 1) * present[..., None]
        features = torch.stack([self.features[name](means[:, number]) for number, name in enumerate(seen)], 1).tanh()
        gates = self.gates(means.flatten(1)).view_as(means).masked_fill(present[..., None] == 0, -torch.inf)
        joined = (features * gates.softmax(1)).sum(1)
        logits: torch.Tensor = self.classifier(self.dropout(joined))
        return logits


class _CrossAttention(nn.Module):
    """A learnt question, what it finds in all states, a layer on that."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.question = nn.Parameter(torch.empty(1, 1, width).normal_(0, 0.02))
        self.kinds = nn.ParameterDict({name: torch.zeros(width) for name in config.modalities})
        self.norm, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.classifier = nn.Linear(width, config.classes)
        self.dropout = Dropout(config.dropout)

    def forward(self, seen: dict[str, Seen], present: torch.Tensor) -> torch.Tensor:
        states = torch.cat([self.norm(found + self.kinds[name]) for name, (found, _) in seen.items()], 1)
        there = [mask & (present[:, number, None] > 0) for number, (_, mask) in enumerate(seen.values())]
        mask = torch.cat(there, 1)[:, None, None, :]
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in (
                (self.query, self.question.expand(len(states), -1, -1)),
                (self.key, states),
                (self.value, states),
            )
        )
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        joined = self.output(found.transpose(1, 2).flatten(2))[:, 0]
        logits: torch.Tensor = self.classifier(self.dropout(joined + self.inner(self.after(joined))))
        return logits


JOINS: dict[str, type[_Late] | type[_Gated] | type[_CrossAttention]] = {
    "late": _Late,
    "gated": _Gated,
    "cross-attention": _CrossAttention,
}


class FusionClassifier(nn.Module):
    """See the module."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        self.config = config
        towers: dict[str, nn.Module] = {}
        if config.text is not None:
            towers["text"] = _TextTower(config.text, config.width)
        if config.image is not None:
            towers["image"] = _ImageTower(config.image, config.width)
        if config.audio is not None:
            towers["audio"] = _AudioTower(config.audio, config.width)
        self.towers = nn.ModuleDict(towers)
        self.join = JOINS[config.how](config)
        if config.alone and config.how != "late":
            self.alone = _Alone(config)

    def forward(self, present: torch.Tensor, *inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Logits `[B, K]`.

        Args:
            present: `[B, modalities]` bool: what each row has; at least one. The rest is not looked at.
            inputs: of each tower in its order: token ids `[B, L]` and lengths `[B]`; images `[B, C, S, S]` uint8;
                features `[B, M, F]` and frames `[B]`.
        """
        joined: torch.Tensor = self.join(*self._seen(present, inputs))
        return joined

    def with_each(self, present: torch.Tensor, *inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the logits `[B, modalities, K]` of each alone: where it is not there, they say nothing.

        Raises:
            AttributeError: they have no classifiers of their own (`FusionConfig.alone`).
        """
        seen, there = self._seen(present, inputs)
        own = self.join if isinstance(self.join, _Late) else self.alone
        return self.join(seen, there), own.each(seen)

    def _seen(
        self, present: torch.Tensor, inputs: tuple[tuple[torch.Tensor, ...], ...]
    ) -> tuple[dict[str, Seen], torch.Tensor]:
        """What each tower sees, and `[B, modalities]` what is to be joined: 1 or 0."""
        if self.training and self.config.drop_modality and present.shape[1] > 1:
            present = _without_some(present, self.config.drop_modality)
        seen = {name: tower(*given) for (name, tower), given in zip(self.towers.items(), inputs, strict=True)}
        return seen, present.to(next(iter(seen.values()))[0].dtype)


def _mean(seen: Seen) -> torch.Tensor:
    states, mask = seen
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


def _without_some(present: torch.Tensor, share: float) -> torch.Tensor:
    """Some rows without one modality, but never without all."""
    dropped = torch.rand(len(present)) < share
    which = torch.randint(0, present.shape[1], (len(present),))
    fewer = present & ~(dropped[:, None] & (torch.arange(present.shape[1]) == which[:, None]))
    return torch.where(fewer.any(1, keepdim=True), fewer, present)
