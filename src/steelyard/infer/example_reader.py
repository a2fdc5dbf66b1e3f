"""Classes of images, and of examples of several kinds: text, image, sound."""

from __future__ import annotations

from typing import Any

import torch

from steelyard.errors import RequestError
from steelyard.infer.request import LabelPath, Request, Sees, Task
from steelyard.infer.sound import SAMPLE_BYTES, SOUND_RATE
from steelyard.models import classifiers
from steelyard.models.classifiers import Classifier
from steelyard.models.inputs import Fused, FusedInputs, ImageInputs
from steelyard.models.mel import HOP, log_mel
from steelyard.models.vision import VisionConfig
from steelyard.text.tokenizer import Tokenizer

MOST_SECONDS = 30
"""Of a sound; what is longer is cut, as everywhere."""
ANY_LENGTH = 4096
SHORTEST = 4 * HOP
PATCHES = 7
"""Of a side, where the network has none of its own."""


class ExampleReader:
    """See `Reader`: log-probabilities of the classes.

    Args:
        classifier: of images, or of several kinds.
    """

    task: Task = "classify"
    width = 0

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier
        self.labels = classifier.labels
        inputs = classifier.inputs
        self._image = inputs.image if isinstance(inputs, FusedInputs) else classifier.image
        text = inputs.text if isinstance(inputs, FusedInputs) else None
        self.tokenizer: Tokenizer | None = None if text is None else text.tokenizer
        self.context = ANY_LENGTH if text is None or text.context is None else text.context
        self.kinds = inputs.modalities if isinstance(inputs, FusedInputs) else ("image",)

    @property
    def sees(self) -> Sees | None:
        """What it takes of an image; None: nothing."""
        if self._image is None:
            return None
        network: Any = self._classifier.network
        config = network.config.image if isinstance(self._classifier.inputs, FusedInputs) else network.config
        own = self._image.side // config.patch_size if isinstance(config, VisionConfig) else PATCHES
        return Sees(self._image.channels, self._image.side, own**2)

    def rows(self, request: Request) -> list[Any]:
        """See `Reader`."""
        return [example_of(self._classifier, request)]

    def size(self, row: Any) -> int:
        """See `Reader`."""
        return max(1, self._classifier.inputs.size(row))

    def answer(self, requests: list[Request], rows: list[list[Any]]) -> list[tuple[list[float], list[LabelPath]]]:
        """See `Reader`."""
        scores = classifiers.log_probabilities(self._classifier, [row for (row,) in rows])
        return [(row, []) for row in scores.tolist()]


def example_of(classifier: Classifier, request: Request) -> Any:
    """What a request shows a classifier of images, or of several kinds.

    Raises:
        RequestError: it shows nothing that it reads.
    """
    inputs = classifier.inputs
    if isinstance(inputs, ImageInputs):
        if request.image is None and not request.counted:  # a canary's
            return torch.zeros(inputs.channels, inputs.side, inputs.side, dtype=torch.uint8)
        return _image(request, inputs)
    assert isinstance(inputs, FusedInputs), "texts and words have readers of their own"
    tokens = request.prompt or None if inputs.text is not None else None
    image = None if request.image is None or inputs.image is None else _image(request, inputs.image)
    features = None if request.sound is None or inputs.bands is None else _features(request.sound, inputs.bands)
    if tokens is None and image is None and features is None:
        if request.counted:
            raise RequestError(f"this model reads {', '.join(inputs.modalities)}: give one of them", param="input")
        return _nothing(inputs)
    return Fused(tokens, image, features)


def _nothing(inputs: FusedInputs) -> Fused:
    """What a canary shows."""
    if inputs.text is not None:
        return Fused([0], None, None)
    if inputs.image is not None:
        return Fused(None, torch.zeros(inputs.image.channels, inputs.image.side, inputs.image.side).byte(), None)
    return Fused(None, None, torch.zeros(inputs.bands or 1, 8))


def _image(request: Request, inputs: ImageInputs) -> torch.Tensor:
    content = request.image or b""
    if len(content) != inputs.channels * inputs.side**2:
        raise RequestError("this model reads images: give one", param="input")
    pixels = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return pixels.view(inputs.channels, inputs.side, inputs.side)


def _features(sound: bytes, bands: int) -> torch.Tensor:
    samples = torch.frombuffer(bytearray(sound[: MOST_SECONDS * SOUND_RATE * SAMPLE_BYTES]), dtype=torch.float32)
    return log_mel(torch.nn.functional.pad(samples, (0, max(0, SHORTEST - len(samples)))), bands)
