"""The pool of blocks: shared, kept, found again by their owner alone, and never lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from steelyard.infer.blocks import BlockPool

SIZE = 4


def kept(pool: BlockPool, root: bytes, tokens: list[int]) -> list[int]:
    """Allocate the blocks of a text and let others find the full ones."""
    chain = pool.links(root, tokens)
    table = [pool.allocate() for _ in range(-(-len(tokens) // SIZE))]
    for block, link in zip(table, chain, strict=False):
        pool.keep(block, link)
    return table


def test_a_beginning_is_found_as_far_as_it_is_the_same() -> None:
    pool = BlockPool(16, SIZE)
    root = pool.root("project", "")
    table = kept(pool, root, list(range(14)))
    assert pool.find(pool.links(root, list(range(14)))) == table[:3]
    assert pool.find(pool.links(root, [*range(8), 99, 99, 99, 99])) == table[:2]
    assert pool.find(pool.links(root, [99, *range(1, 14)])) == []
    assert pool.find(pool.links(root, list(range(3)))) == []
    pool.release(table)
    assert pool.available == 16
    assert len(pool.find(pool.links(root, list(range(14))))) == 3, "kept although nobody holds them"
    pool.check_integrity([])


def test_another_project_or_adapter_finds_nothing() -> None:
    pool = BlockPool(16, SIZE)
    tokens = list(range(12))
    kept(pool, pool.root("a", "spam"), tokens)
    for owner in (("b", "spam"), ("a", ""), ("a", "other"), ("aspam", ""), ("", "aspam"), ("as", "pam")):
        assert pool.find(pool.links(pool.root(*owner), tokens)) == []
    assert BlockPool(16, SIZE).root("a", "spam") != pool.root("a", "spam"), "the key is this pool's own"


def test_links_go_on_from_what_is_known() -> None:
    pool = BlockPool(4, SIZE)
    root = pool.root("a")
    tokens = list(range(23))
    chain = pool.links(root, tokens[:9])
    assert len(chain) == 2
    assert pool.links(root, tokens, chain) == pool.links(root, tokens)


def test_the_longest_unused_gives_way_first_and_a_text_from_its_end() -> None:
    pool = BlockPool(4, SIZE)
    root = pool.root("a")
    old, new = list(range(8)), list(range(100, 108))
    for tokens in (old, new):
        pool.release(kept(pool, root, tokens))
    assert pool.available == 4
    pool.allocate()
    assert len(pool.find(pool.links(root, old))) == 1
    pool.allocate()
    assert pool.find(pool.links(root, old)) == []
    assert len(pool.find(pool.links(root, new))) == 2


def test_without_reuse_nothing_is_kept() -> None:
    pool = BlockPool(4, SIZE, reuse=False)
    table = kept(pool, pool.root("a"), list(range(8)))
    assert pool.find(pool.links(pool.root("a"), list(range(8)))) == []
    pool.release(table)
    assert len(pool.free) == 4


class AnyUse(RuleBasedStateMachine):
    """Texts of a small alphabet come and go, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12, SIZE)
        self.tables: list[list[int]] = []
        self.contents: dict[int, tuple[str, tuple[int, ...]]] = {}  # by block: owner, all tokens to its end

    @rule(owner=st.sampled_from("ab"), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def come(self, owner: str, tokens: list[int]) -> None:
        chain = self.pool.links(self.pool.root(owner), tokens)
        found = self.pool.find(chain)
        for place, block in enumerate(found):
            assert self.contents[block] == (owner, tuple(tokens[: (place + 1) * SIZE])), "another text's block"
        missing = -(-len(tokens) // SIZE) - len(found)
        if missing > self.pool.available - sum(map(self.pool.is_idle, found)):
            return
        for block in found:
            self.pool.hold(block)
        table = [*found, *(self.pool.allocate() for _ in range(missing))]
        for place in range(len(found), len(table)):
            self.contents[table[place]] = (owner, tuple(tokens[: (place + 1) * SIZE]))
            if place < len(chain):
                self.pool.keep(table[place], chain[place])
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        self.pool.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def nothing_is_lost(self) -> None:
        self.pool.check_integrity(self.tables)


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6))
def test_everything_comes_back(texts: list[list[int]]) -> None:
    pool = BlockPool(32, SIZE)
    tables = [kept(pool, pool.root("a"), tokens) for tokens in texts]
    pool.check_integrity(tables)
    for table in tables:
        pool.release(table)
    pool.check_integrity([])
    assert pool.available == 32
