"""Sound as a network reads it: log-mel features, as Whisper has them (Radford et al. 2023, section 2.2).

The filters are Slaney's (Auditory Toolbox 1998): even below 1 kHz, logarithmic above, each of the same area.
"""

# S samples  F frames  M mel bands

from __future__ import annotations

import functools
import math

import torch

RATE = 16_000
"""Samples a second."""
WINDOW, HOP = 400, 160
"""Samples of a window, and between two of them: 100 frames a second."""
BANDS = 80
FLOOR = 1e-10
RANGE = 8.0
"""Decades below the loudest that are told apart."""


def log_mel(sound: torch.Tensor, bands: int = BANDS) -> torch.Tensor:
    """Samples `[S]` float32 of 16 kHz -> `[M, S // 160]` float32, about -1 to 1."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(sound, WINDOW, HOP, window=window, return_complex=True)[:, :-1]
    power = spectrum.real.square() + spectrum.imag.square()
    decades = (filters(bands) @ power).clamp_min(FLOOR).log10()
    return (torch.maximum(decades, decades.max() - RANGE) + 4) / 4


@functools.cache
def filters(bands: int) -> torch.Tensor:
    """`[M, 201]`: how much each band takes of each frequency."""
    frequencies = torch.linspace(0, RATE / 2, WINDOW // 2 + 1, dtype=torch.float64)
    edges = _hertz(torch.linspace(0, _mel(RATE / 2), bands + 2, dtype=torch.float64))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
    triangles = torch.minimum(rising, falling).clamp_min(0)
    return (triangles * 2 / (high - low)).float()


def _mel(hertz: float) -> float:
    return hertz * 3 / 200 if hertz < 1000 else 15 + math.log(hertz / 1000) * 27 / math.log(6.4)


def _hertz(mels: torch.Tensor) -> torch.Tensor:
    return torch.where(mels < 15, mels * 200 / 3, 1000 * torch.exp((mels - 15) * math.log(6.4) / 27))
