"""What the processors have used, by the counters that Linux shows of them (RAPL: Intel's, and AMD's by the same files).

A counter is of a whole package, whoever computes on it, so this is the machine's energy and not that of one request.
Most systems let only root read it. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
READ_SECONDS = 30.0
"""How often counters are read between scrapes: the smallest, 65 kJ, comes round after a minute at 1 kW."""
MICRO = 1_000_000

log = logging.getLogger("steelyard.serve")


@dataclass
class Package:
    """One processor's counter, which begins again at 0 after `range`."""

    name: str
    file: Path
    range: int
    """Microjoules, as all here."""
    shown: int
    total: int = 0
    """Since the server's start."""

    @classmethod
    def open(cls, folder: Path) -> Package:
        """The counter in a folder of powercap's.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        name, file = (folder / "name").read_text().strip(), folder / "energy_uj"
        return cls(name, file, int((folder / "max_energy_range_uj").read_text()), int(file.read_text()))

    def read(self) -> None:
        """Add what has been used since the last time; it came round once at most.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        before, self.shown = self.shown, int(self.file.read_text())
        self.total += (self.shown - before) % self.range


class Energy:
    """The counters of every package, from now on.

    Args:
        folder: where the system shows them.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._packages: list[Package] = []
        try:
            zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if _is_package(zone)]
            self._packages = [Package.open(zone) for zone in zones]
        except (OSError, ValueError) as error:
            log.warning("no energy in /metrics: a counter cannot be read: %s", error)

    def joules(self) -> dict[str, float]:
        """What each package has used since the start; none where the counters cannot be read."""
        try:
            for package in self._packages:
                package.read()
        except (OSError, ValueError) as error:
            log.warning("no more energy in /metrics: a counter cannot be read: %s", error)
            self._packages = []
        return {package.name: package.total / MICRO for package in self._packages}

    async def watch(self) -> None:
        """Read the counters before they come round twice, for ever."""
        while self.joules():
            await asyncio.sleep(READ_SECONDS)


def _is_package(zone: Path) -> bool:
    """Whether it is a whole processor's; others are parts of one, or the whole machine's."""
    return (zone / "name").read_text().startswith("package")
