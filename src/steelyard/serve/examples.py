"""What classifiers are shown: texts, or examples whose images and sounds are decoded first, as the model takes them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from steelyard.errors import RequestError
from steelyard.infer.request import Ready, example_tokens
from steelyard.infer.sound import SAMPLE_BYTES, SOUND_RATE
from steelyard.serve.models import ServedModel
from steelyard.serve.pictures import Pictures
from steelyard.serve.protocol.examples import Example, content_of
from steelyard.serve.sounds import Sounds, writing

MOST_SAMPLES = 30 * SOUND_RATE
"""Of a sound; what is longer is cut, as in training."""


class Shown(msgspec.Struct, frozen=True):
    """An example as the engine takes it."""

    prompt: list[int] = []
    image: bytes | None = None
    sound: bytes | None = None

    def units(self, ready: Ready) -> int:
        """Into how many parts it is explained, at the most."""
        patches = 0 if self.image is None or ready.sees is None else ready.sees.patches
        moments = -(-len(self.sound or b"") // (SAMPLE_BYTES * SOUND_RATE // 5))
        return len(self.prompt) + patches + moments

    @property
    def tokens(self) -> int:
        """What it is paid for."""
        return example_tokens(len(self.prompt), len(self.image or b""), len(self.sound or b"") // SAMPLE_BYTES)


@dataclass
class Showing:
    """Decodes what is shown."""

    pictures: Pictures
    sounds: Sounds

    async def prepare(
        self, served: ServedModel, ready: Ready, project: str, given: Sequence[str | Example], param: str
    ) -> list[Shown]:
        """Examples as the model takes them.

        Raises:
            RequestError: one has a kind that the model does not read, or is no image, or no sound; it is named.
            PayloadTooLargeError: too many pixels, or too long a sound.
            RateLimitError: too many sounds of the project at once.
        """
        kinds = ready.kinds or ["text"]
        for number, one in enumerate(given):
            text = one if isinstance(one, str) else one.text or ""
            served.demand_short(len(text), param if len(given) == 1 else f"{param}[{number}]")
        found = []
        for number, one in enumerate(given):
            where = param if len(given) == 1 else f"{param}[{number}]"
            example = Example(text=one) if isinstance(one, str) else one
            for kind in ("text", "image", "audio"):
                if getattr(example, kind) is not None and kind not in kinds:
                    reason = f"'{served.id}' reads {', '.join(kinds)}: give no {kind}"
                    raise RequestError(reason, param=f"{where}.{kind}" if example is one else where)
            prompt: list[int] = []
            if example.text is not None:
                prompt = await asyncio.to_thread(served.tokenizer.encode_plain, example.text, add_special_tokens=True)
                prompt = prompt or [0]
            image = sound = None
            if example.image is not None:
                assert ready.sees is not None, "who reads images sees"
                content = content_of(example.image, f"{where}.image")
                image = await self.pictures.decode(content, ready.sees, project, f"{where}.image")
            if example.audio is not None:
                sound = await self._sound(project, content_of(example.audio, f"{where}.audio"), f"{where}.audio")
            found.append(Shown(prompt, image, sound))
        return found

    async def _sound(self, project: str, content: bytes, param: str) -> bytes:
        with self.sounds.held(project), await asyncio.to_thread(self.sounds.file) as recording:
            with writing():
                await asyncio.to_thread(recording.write, content)
                recording.flush()
            try:
                samples = await self.sounds.decode(recording, project)
            except RequestError as error:
                error.param = param
                raise
            with samples.file:
                return await asyncio.to_thread(samples.piece, 0, min(samples.count, MOST_SAMPLES))
