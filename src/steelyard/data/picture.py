"""The bytes of one image to pixels: bounded, turned, fitted into a square. No torch.

Only bytes that say themselves what they are get decoded, by Pillow's readers of a few plain formats, never more pixels
than `MAX_PIXELS`.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from steelyard.errors import ArtifactError, LargePictureError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64 << 20
MODES = {1: "L", 3: "RGB"}


def fitted(content: bytes, channels: int, side: int, most: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """An image `[channels, side, side]`: turned as its camera says, transparent parts white, scaled to fit, centred.

    Raises:
        LargePictureError: it says that it has more pixels than `most`; none of them is decoded.
        ArtifactError: it is no image that is known here.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            if opened.width * opened.height > most:
                raise LargePictureError(f"has {opened.width} x {opened.height} pixels, which are too many")
            opened.draft(MODES[channels], (side, side))
            turned = ImageOps.exif_transpose(opened)
            if turned.mode.startswith("I;16"):  # Pillow would cut, not scale
                turned = Image.fromarray((np.asarray(turned, dtype=np.uint16) // 257).astype(np.uint8))
            if turned.mode in ("I", "F"):
                raise ArtifactError("has numbers for pixels, whose white nobody knows")
            if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
                layer = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            image = turned.convert(MODES[channels])
    except Image.DecompressionBombError:
        raise LargePictureError("has too many pixels") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        what = "is no PNG, JPEG, WebP, GIF or BMP" if "cannot identify" in str(error) else f"is damaged: {error}"
        raise ArtifactError(what) from None
    if image.size != (side, side):
        image = ImageOps.pad(image, (side, side), Image.Resampling.BILINEAR, color="white")
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
