"""Which rows come next: shuffled anew each epoch by (seed, epoch), and a position that can be saved and restored."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from steelyard.errors import ConfigError


@dataclass(slots=True)
class Loader:
    """An endless sequence of batches of row numbers; its whole state is `epoch` and `position`.

    Args:
        rows: how many rows there are.
        batch_size: rows of a batch; the last of an epoch may be smaller. 0 means all rows.
        seed: decides every order.
        epoch: passes over the data that are complete.
        position: rows of the current epoch that are done.
    """

    rows: int
    batch_size: int
    seed: int
    epoch: int = 0
    position: int = 0
    _order: tuple[int, npt.NDArray[np.int64]] = field(
        default=(-1, np.empty(0, np.int64)), init=False, repr=False, compare=False
    )
    """The current epoch and its order."""

    def __post_init__(self) -> None:
        if self.batch_size == 0:
            self.batch_size = self.rows

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one pass over the data."""
        return -(-self.rows // self.batch_size)

    def next(self) -> list[int]:
        """The next batch's row numbers; moves the position."""
        if self._order[0] != self.epoch:
            key = np.array([self.seed % 2**64, self.epoch], np.uint64)
            self._order = self.epoch, np.random.Generator(np.random.Philox(key=key)).permutation(self.rows)
        batch: list[int] = self._order[1][self.position : self.position + self.batch_size].tolist()
        self.position += len(batch)
        if self.position >= self.rows:
            self.epoch, self.position = self.epoch + 1, 0
        return batch

    def state(self) -> dict[str, int]:
        """What `restore` needs."""
        return {"epoch": self.epoch, "position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken.

        Raises:
            ConfigError: the position is beyond the rows: they are not those that the state was taken over.
        """
        if state["epoch"] < 0 or not 0 <= state["position"] < self.rows:
            raise ConfigError(
                f"the saved position {state['position']} is beyond the {self.rows} rows: the data has changed since; "
                "start over with --fresh"
            )
        self.epoch, self.position = state["epoch"], state["position"]
