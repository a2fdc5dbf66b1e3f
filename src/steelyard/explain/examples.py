"""An image, or an example of several kinds (text, image, sound), and its class, explained by tokens, patches, moments.

What is taken away: a token from its row, a patch's pixels for the middle of what images hold, a moment's frames for
silence, as behind every recording.
"""

# R rows  U units  C channels  S side  M mel bands  F frames

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from steelyard.explain.rules import Rules
from steelyard.explain.subject import PIECE, Steps, Taken, Watch, log_odds
from steelyard.infer.example_reader import PATCHES
from steelyard.models.classifiers import Classifier
from steelyard.models.images import ImageConfig
from steelyard.models.inputs import Fused, FusedInputs, TextInputs, around
from steelyard.models.vision import VisionConfig

MOMENT = 20
"""Frames of a unit of sound: a fifth of a second."""
MOST_MOMENTS = 100


class Part(Protocol):
    """What an example has of one kind."""

    kind: str
    units: int
    names: list[str]
    """Of the units."""

    def without(self, kept: list[bool]) -> Any:
        """With some of the units alone."""
        ...

    def spread(self, figures: torch.Tensor) -> torch.Tensor:
        """Figures of the shape that the network reads -> their sums by unit `[U]`; the rest is left out."""
        ...


class TextPart:
    """Tokens; what stands around every text is no unit."""

    kind = "text"

    def __init__(self, tokens: Sequence[int], inputs: TextInputs) -> None:
        before, after = around(inputs.tokenizer)
        self._tokens, self._first = list(tokens), len(before)
        self.units = max(0, len(tokens) - len(before) - len(after))
        self.names = [
            inputs.tokenizer.token_text(token) for token in self._tokens[self._first : self._first + self.units]
        ]

    def without(self, kept: list[bool]) -> list[int]:
        """See `Part`."""
        places = range(self._first, self._first + self.units)
        gone = {place for place, there in zip(places, kept, strict=True) if not there}
        return [token for place, token in enumerate(self._tokens) if place not in gone]

    def spread(self, figures: torch.Tensor) -> torch.Tensor:
        """See `Part`."""
        return figures[0].double().sum(-1)[self._first : self._first + self.units]


class ImagePart:
    """Patches of an image `[C, S, S]` uint8, row by row."""

    kind = "image"

    def __init__(self, image: torch.Tensor, config: ImageConfig) -> None:
        side = config.image_size
        own = config.patch_size if isinstance(config, VisionConfig) else max(1, -(-side // PATCHES))
        self.image, self._size = image, own
        self.across = -(-side // own)
        self.units = self.across**2
        self.names = [f"{row},{column}" for row in range(self.across) for column in range(self.across)]
        self._middle = torch.tensor(config.image_mean)[:, None, None].expand(len(image), 1, 1).mul(255).round()

    def without(self, kept: list[bool]) -> torch.Tensor:
        """See `Part`."""
        there = torch.tensor(kept).view(self.across, self.across)
        wide = there.repeat_interleave(self._size, 0).repeat_interleave(self._size, 1)
        seen = wide[: self.image.shape[1], : self.image.shape[2]]
        return torch.where(seen, self.image, self._middle.to(torch.uint8))

    def spread(self, figures: torch.Tensor) -> torch.Tensor:
        """See `Part`."""
        side = self.across * self._size
        whole = torch.zeros(side, side, dtype=torch.float64)
        whole[: figures.shape[2], : figures.shape[3]] = figures[0].double().sum(0)
        return whole.unfold(0, self._size, self._size).unfold(1, self._size, self._size).sum((2, 3)).flatten()


class SoundPart:
    """Moments of a sound's features `[M, F]`."""

    kind = "audio"

    def __init__(self, features: torch.Tensor) -> None:
        self._features = features
        self._step = max(MOMENT, -(-features.shape[1] // MOST_MOMENTS))
        self.units = -(-features.shape[1] // self._step)
        self.seconds = self._step / 100
        """Of a unit."""
        self.names = [f"{number * self.seconds:.2f} s" for number in range(self.units)]

    def without(self, kept: list[bool]) -> torch.Tensor:
        """See `Part`."""
        there = torch.tensor(kept).repeat_interleave(self._step)[: self._features.shape[1]]
        return self._features * there

    def spread(self, figures: torch.Tensor) -> torch.Tensor:
        """See `Part`."""
        frames = figures[0].double().sum(0)[: self._features.shape[1]]
        owners = torch.arange(len(frames)) // self._step
        return torch.zeros(self.units, dtype=torch.float64).index_add_(0, owners, frames)


@dataclass(frozen=True)
class Unit:
    """What a share is of."""

    kind: str
    name: str


class ExampleSubject:
    """See `Subject`.

    Args:
        classifier: of images, or of several kinds, in float32 and dense.
        example: as its inputs have it.
        target: the class.
    """

    baseline = "nothing in its place"

    def __init__(self, classifier: Classifier, example: Any, target: int) -> None:
        self._classifier, self._example, self._target = classifier, example, target
        self.parts = parts_of(classifier, example)
        self.units = sum(part.units for part in self.parts.values())
        self.computed = 0

    @property
    def names(self) -> list[Unit]:
        """Of the units."""
        return [Unit(part.kind, name) for part in self.parts.values() for name in part.names]

    def taken(self, *, rules: bool = False, share: float = 1.0) -> Steps[Taken]:
        """See `Subject`."""
        arguments = self._classifier.inputs.batch([self._example])
        with Watch(_token_ids(self._classifier, arguments), share) as watch, Rules() if rules else nullcontext():
            logits = self._classifier.network(*arguments)
        odds = log_odds(logits, self._target).sum()
        gradients = torch.autograd.grad(odds, watch.leaves, allow_unused=True)
        found = tuple(
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(watch.leaves, gradients, strict=True)
        )
        self.computed += 3 * self._classifier.inputs.size(self._example)
        yield
        return Taken(tuple(leaf.detach() for leaf in watch.leaves), found, tuple(watch.bases), float(odds.detach()))

    def spread(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """See `Subject`."""
        kinds = self._kinds
        whole = sum(float(part.double().sum()) for kind, part in zip(kinds, parts, strict=True) if kind in self.parts)
        found = [self.parts[kind].spread(part) for kind, part in zip(kinds, parts, strict=True) if kind in self.parts]
        units = torch.cat(found)
        return torch.cat([units, torch.tensor([whole - float(units.sum())], dtype=torch.float64)])

    def likelihood(self, kept: torch.Tensor) -> Steps[torch.Tensor]:
        """See `Subject`."""
        inputs, found = self._classifier.inputs, []
        together = max(1, PIECE // inputs.size(self._example))
        for rows in torch.split(kept, together):
            examples = [self._without(row) for row in rows.tolist()]
            with torch.inference_mode():
                logits = self._classifier.network(*inputs.batch(examples)).double()
            found.append(logits.log_softmax(-1)[:, self._target])
            self.computed += len(examples) * inputs.size(self._example)
            yield
        return torch.cat(found)

    @property
    def _kinds(self) -> tuple[str, ...]:
        inputs = self._classifier.inputs
        return inputs.modalities if isinstance(inputs, FusedInputs) else ("image",)

    def _without(self, kept: list[bool]) -> Any:
        given = iter(kept)
        made = {kind: part.without([next(given) for _ in range(part.units)]) for kind, part in self.parts.items()}
        if not isinstance(self._classifier.inputs, FusedInputs):
            return made["image"]
        return Fused(made.get("text"), made.get("image"), made.get("audio"))


def parts_of(classifier: Classifier, example: Any) -> dict[str, Part]:
    """What an example has, by kind, in the order in which the network reads it."""
    network: Any = classifier.network
    if not isinstance(classifier.inputs, FusedInputs):
        return {"image": ImagePart(example, network.config)}
    return dict(_fused(classifier.inputs, network.config, example))


def _fused(inputs: FusedInputs, config: Any, example: Fused) -> Iterator[tuple[str, Part]]:
    if inputs.text is not None and example.tokens is not None:
        yield "text", TextPart(example.tokens, inputs.text)
    if inputs.image is not None and example.image is not None:
        yield "image", ImagePart(example.image, config.image)
    if inputs.bands is not None and example.features is not None:
        yield "audio", SoundPart(example.features)


def _token_ids(classifier: Classifier, arguments: tuple[Any, ...]) -> torch.Tensor | None:
    if isinstance(classifier.inputs, FusedInputs) and classifier.inputs.text is not None:
        token_ids: torch.Tensor = arguments[1][0]
        return token_ids
    return None
