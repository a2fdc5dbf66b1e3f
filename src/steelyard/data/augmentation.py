"""How examples are changed while a network learns from them: the settings of `[augment]`."""

from __future__ import annotations

import msgspec

from steelyard.errors import ConfigError


class Augmentation(msgspec.Struct, frozen=True, kw_only=True):
    """What is done to examples while a network learns from them; nothing by default."""

    flip: bool = False
    """Images: mirror half of them."""
    shift: int = 0
    """Images: move each by up to so many pixels, up or down and to a side."""
    erase: int = 0
    """Images: hide a square of up to so many pixels a side in each (DeVries and Taylor 2017)."""
    tempo: float = 0.0
    """Sound: make each faster or slower by up to this share."""
    mask_bands: int = 0
    """Sound: leave up to so many of 80 frequency bands unheard, twice (Park et al. 2019)."""
    mask_frames: int = 0
    """Sound: leave up to so many hundredths of a second unheard, twice."""


IMAGE, SOUND = ("flip", "shift", "erase"), ("tempo", "mask_bands", "mask_frames")
"""Which settings are for which examples."""


def check(config: Augmentation, kept: tuple[str, ...] = (*IMAGE, *SOUND)) -> None:
    """Refuse what cannot be, and, for examples of one kind, what is for others.

    Raises:
        ConfigError: the key.
    """
    for key in ("shift", "erase", "mask_bands", "mask_frames"):
        if getattr(config, key) < 0:
            raise ConfigError(f"augment.{key} must be at least 0, not {getattr(config, key)}")
    if not 0 <= config.tempo < 1:
        raise ConfigError(f"augment.tempo must be at least 0 and below 1, not {config.tempo}")
    if config.mask_bands > 80:
        raise ConfigError(f"augment.mask_bands must be at most 80, not {config.mask_bands}")
    for key in config.__struct_fields__:
        if key not in kept and getattr(config, key) != getattr(Augmentation(), key):
            what = "images" if key in IMAGE else "sound"
            raise ConfigError(f"augment.{key} changes {what}, which these examples are not: leave it out")
