"""Examples that are more than a text: what a classifier of images, or of several kinds, is shown."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated

import pydantic
from pydantic import Field

from steelyard.errors import RequestError
from steelyard.serve.protocol.fields import Fields

MOST_EXAMPLES = 64
DATA = re.compile(r"data:(?:image|audio)/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)
Uri = Annotated[str, Field(min_length=1, max_length=16 << 20)]


class Example(Fields):
    """A text, an image, a sound, or several of them."""

    stored = False
    text: Annotated[str, Field(min_length=1)] | None = None
    image: Uri | None = None
    """A data URI of PNG, JPEG, WebP, GIF or BMP."""
    audio: Uri | None = None
    """A data URI of WAV, FLAC, OGG or MP3."""

    @pydantic.model_validator(mode="after")
    def _something(self) -> Example:
        if self.text is None and self.image is None and self.audio is None:
            raise RequestError("an example has a 'text', an 'image' or an 'audio'", param="input")
        return self


def content_of(uri: str, param: str) -> bytes:
    """The bytes of a data URI. Raises RequestError: it is none, since nothing is fetched from elsewhere."""
    match = DATA.match(uri)
    if match is None:
        raise RequestError(f"'{param}' must be a data URI in base64: nothing is fetched", param=param)
    try:
        return base64.b64decode(uri[match.end() :], validate=True)
    except binascii.Error:
        raise RequestError(f"'{param}' is no base64", param=param) from None
