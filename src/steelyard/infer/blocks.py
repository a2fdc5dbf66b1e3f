"""Which blocks of the cache are whose: reference counts, and full blocks that are kept for whoever begins alike.

A full block is known by a hash chained over all tokens up to its end. The chain's first link is keyed by a secret of
this process over the project and the adapter, so that one tenant's blocks are never another's, and no request can name
them. Sharing copies nothing; a block that nobody holds is kept until its place is needed, the longest unused first.
Knows nothing of tensors.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """The blocks.

    Args:
        blocks: how many there are.
        block_size: tokens of a block.
        reuse: keep full blocks for others.
    """

    def __init__(self, blocks: int, block_size: int, reuse: bool = True) -> None:
        self.blocks, self.block_size, self.reuse = blocks, block_size, reuse
        self.free = list(range(blocks - 1, -1, -1))
        self.references = [0] * blocks
        self._secret = secrets.token_bytes(32)
        self._known: dict[bytes, int] = {}
        self._links: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept, held by nobody; the longest unused first

    @property
    def available(self) -> int:
        """Blocks that can be allocated: free, or kept for nobody in particular."""
        return len(self.free) + len(self._idle)

    def allocate(self) -> int:
        """Take a block that holds nothing any more. The caller has checked that there is one."""
        if self.free:
            block = self.free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._known[self._links.pop(block)]
        assert self.references[block] == 0, "a free block has a holder"
        self.references[block] = 1
        return block

    def hold(self, block: int) -> None:
        """Hold a kept block as well."""
        self._idle.pop(block, None)
        self.references[block] += 1

    def release(self, table: list[int]) -> None:
        """Give up one reference to each block of `table`, and empty it."""
        for block in reversed(table):  # the end of a text is of less use to others than its beginning
            self.references[block] -= 1
            assert self.references[block] >= 0, "a block was released twice"
            if self.references[block] == 0:
                if block in self._links:
                    self._idle[block] = None
                else:
                    self.free.append(block)
        table.clear()

    def root(self, *owner: str) -> bytes:
        """The first link of the chains of an owner (project, adapter): nobody outside can compute it."""
        content = b"".join(len(part.encode()).to_bytes(4, "little") + part.encode() for part in owner)
        return hmac.digest(self._secret, content, hashlib.sha256)

    def links(self, root: bytes, tokens: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
        """The chain over the full blocks of `tokens`; `known` are its first links, if they were computed before."""
        chain = list(known)
        for begin in range(len(chain) * self.block_size, len(tokens) - self.block_size + 1, self.block_size):
            content = array("q", tokens[begin : begin + self.block_size]).tobytes()
            chain.append(hashlib.blake2b(content, key=chain[-1] if chain else root, digest_size=32).digest())
        return chain

    def find(self, chain: Sequence[bytes]) -> list[int]:
        """The kept blocks that a chain begins with."""
        found = []
        for link in chain:
            block = self._known.get(link)
            if block is None:
                break
            found.append(block)
        return found

    def is_idle(self, block: int) -> bool:
        """Whether a kept block is held by nobody."""
        return block in self._idle

    def keep(self, block: int, link: bytes) -> None:
        """Let others find a full block by its link; of two with the same content the first is kept."""
        if self.reuse and link not in self._known and block not in self._links:
            self._known[link], self._links[block] = block, link

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """Every block is free, kept, or held exactly by the tables that name it. Called when idle and in tests."""
        held = [0] * self.blocks
        for table in tables:
            for block in table:
                held[block] += 1
        assert held == self.references, "reference counts differ from the tables"
        loose = sorted([*self.free, *self._idle])
        assert loose == [block for block in range(self.blocks) if not held[block]], "a block was lost"
        assert {block: link for link, block in self._known.items()} == self._links, "a kept block cannot be found"
        assert set(self._idle) <= self._links.keys(), "a block is kept that nobody can find"
