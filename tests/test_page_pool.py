"""PagePool against a model that really stores tokens, and its errors one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from unique_attn._runtime import PagePool, PoolFullError, UnknownSequenceError


def snapshot(pool: PagePool):
    """Everything that can be seen of a pool, to show that a failed call changed nothing."""
    sequences = {s: (pool.length(s), pool.blocks(s)) for s in pool.sequences()}
    refs = [pool.ref_count(block) for block in range(pool.num_blocks)]
    return sequences, refs, pool.num_free


class PoolMachine(RuleBasedStateMachine):
    """Random histories. ``memory`` is a cache written through the pool's slots, ``tokens`` what it should hold."""

    sequences = Bundle("sequences")

    @initialize(num_blocks=st.integers(0, 12), block_size=st.integers(1, 5))
    def start(self, num_blocks, block_size):
        self.pool = PagePool(num_blocks, block_size)
        self.memory = {}  # slot: token
        self.tokens = {}  # sequence: its tokens
        self.last = 0  # every written token is a new number

    def model_needs(self, seqs, counts):
        """Blocks that an append takes: by definition, not by the pool's arithmetic."""
        size = self.pool.block_size
        holders = {}  # block: sequences that hold it
        for s in self.tokens:
            for block in self.pool.blocks(s):
                holders.setdefault(block, set()).add(s)
        needed = 0
        for s, n in zip(seqs, counts):
            length = len(self.tokens[s])
            needed += sum(1 for t in range(length, length + n) if t % size == 0)
            if n and length % size and len(holders[self.pool.blocks(s)[-1]]) > 1:
                needed += 1
                holders[self.pool.blocks(s)[-1]].discard(s)
        return needed

    def append(self, seqs, counts, call):
        needed, before = self.model_needs(seqs, counts), snapshot(self.pool)
        if needed > self.pool.num_free:
            with pytest.raises(PoolFullError) as error:
                call()
            assert (error.value.needed, error.value.free) == (needed, self.pool.num_free)
            assert snapshot(self.pool) == before
            return
        copies = call()
        assert self.pool.num_free == before[2] - needed
        size = self.pool.block_size
        for src, dst in copies:
            assert before[1][dst] == 0
            for offset in range(size):
                self.memory[dst * size + offset] = self.memory.get(src * size + offset)
        for s, n in zip(seqs, counts):
            length = len(self.tokens[s])
            new = list(range(self.last, self.last + n))
            self.last += n
            self.tokens[s] = self.tokens[s] + new
            assert self.pool.length(s) == length + n
            self.memory.update(zip(self.pool.slots(s, length, length + n).tolist(), new))

    @rule(target=sequences)
    def create(self):
        s = self.pool.create()
        assert s not in self.tokens
        self.tokens[s] = []
        return s

    @rule(target=sequences, parent=sequences)
    def fork(self, parent):
        free = self.pool.num_free
        s = self.pool.fork(parent)
        assert s not in self.tokens
        assert self.pool.num_free == free
        assert self.pool.blocks(s) == self.pool.blocks(parent)
        self.tokens[s] = self.tokens[parent]
        return s

    @rule(s=sequences, n=st.integers(0, 9))
    def append_one(self, s, n):
        self.append([s], [n], lambda: self.pool.append(s, n))

    @rule(data=st.data())
    def append_batch(self, data):
        live = sorted(self.tokens)
        seqs = data.draw(st.lists(st.sampled_from(live), unique=True)) if live else []
        counts = [data.draw(st.integers(0, 3)) for _ in seqs]
        self.append(seqs, counts, lambda: self.pool.append_many(seqs, counts))

    @rule(s=sequences, data=st.data())
    def truncate(self, s, data):
        length = data.draw(st.integers(0, len(self.tokens[s])))
        self.pool.truncate(s, length)
        self.tokens[s] = self.tokens[s][:length]

    @rule(s=sequences, n=st.integers(1, 9))
    def truncate_too_long(self, s, n):
        before = snapshot(self.pool)
        for length in (len(self.tokens[s]) + n, -n):
            with pytest.raises(ValueError, match="cannot truncate"):
                self.pool.truncate(s, length)
        assert snapshot(self.pool) == before

    @rule(s=consumes(sequences))
    def free(self, s):
        self.pool.free(s)
        del self.tokens[s]
        with pytest.raises(UnknownSequenceError):
            self.pool.free(s)

    @rule(target=sequences, order=st.lists(consumes(sequences), max_size=3), data=st.data())
    def reorder(self, order, data):
        """What beam search does: the next beams are forks of some of the old ones, which then go."""
        order = sorted(set(order))
        beams = data.draw(st.lists(st.sampled_from(order), max_size=4)) if order else []
        children = [self.fork(parent) for parent in beams]
        for parent in order:
            self.free(parent)
        return multiple(*children)

    @rule(more=st.integers(0, 6))
    def grow(self, more):
        total, free = self.pool.num_blocks, self.pool.num_free
        self.pool.grow(total + more)
        assert (self.pool.num_blocks, self.pool.num_free) == (total + more, free + more)

    @invariant()
    def holds_the_tokens(self):
        if not hasattr(self, "pool"):
            return
        pool, live = self.pool, sorted(self.tokens)
        pool.check_invariants()
        assert pool.sequences() == live
        blocks = [pool.blocks(s) for s in live]
        used = [block for row in blocks for block in row]
        assert pool.num_free == pool.num_blocks - len(set(used))
        for block in range(pool.num_blocks):
            assert pool.ref_count(block) == used.count(block)
        for s in live:
            slots = pool.slots(s, 0, pool.length(s)).tolist()
            assert [self.memory[slot] for slot in slots] == self.tokens[s]
        table, width = pool.block_table(live, pad=-7), max((len(row) for row in blocks), default=0)
        assert table.dtype == np.int32
        assert table.shape == (len(live), width)
        assert table.tolist() == [row + [-7] * (width - len(row)) for row in blocks]
        assert pool.seq_lens(live).tolist() == [len(self.tokens[s]) for s in live]


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_blocks_come_lowest_first():
    pool = PagePool(6, 2)
    a, b = pool.create(), pool.create()
    pool.append_many([a, b], [4, 4])
    assert (pool.blocks(a), pool.blocks(b)) == ([0, 1], [2, 3])
    pool.free(a)
    pool.append(b, 5)
    assert pool.blocks(b) == [2, 3, 0, 1, 4]


def test_copy_on_write_only_of_a_shared_partial_block():
    pool = PagePool(8, 4)
    a = pool.create()
    pool.append(a, 6)
    b = pool.fork(a)
    assert pool.append(a, 0) == []
    assert pool.append(b, 1) == [(1, 2)]
    assert (pool.blocks(a), pool.blocks(b)) == ([0, 1], [0, 2])
    assert pool.append(a, 1) == []  # no longer shared
    pool.truncate(a, 4)
    assert pool.append(pool.fork(a), 1) == []  # shared, but full


def test_batch_that_shares_a_block_leaves_it_to_the_last():
    pool = PagePool(3, 4)
    a = pool.create()
    pool.append(a, 2)
    b, c = pool.fork(a), pool.fork(a)
    assert pool.append_many([a, b, c], [1, 1, 1]) == [(0, 1), (0, 2)]
    assert (pool.blocks(a), pool.blocks(b), pool.blocks(c)) == ([1], [2], [0])


def test_full_pool_appends_to_none_of_a_batch():
    pool = PagePool(3, 2)
    a, b = pool.create(), pool.create()
    pool.append_many([a, b], [2, 2])
    before = snapshot(pool)
    with pytest.raises(PoolFullError, match="2 more blocks are needed, 1 are free") as error:
        pool.append_many([a, b], [1, 1])
    assert isinstance(error.value, RuntimeError)
    assert (error.value.needed, error.value.free) == (2, 1)
    assert snapshot(pool) == before
    pool.grow(4)
    pool.append_many([a, b], [1, 1])
    assert pool.num_free == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda p, s: p.append(s, 1),
        lambda p, s: p.append_many([0, s], [1, 1]),
        lambda p, s: p.fork(s),
        lambda p, s: p.truncate(s, 0),
        lambda p, s: p.free(s),
        lambda p, s: p.length(s),
        lambda p, s: p.blocks(s),
        lambda p, s: p.slots(s, 0, 0),
        lambda p, s: p.block_table([0, s]),
        lambda p, s: p.seq_lens([0, s]),
    ],
)
@pytest.mark.parametrize("dead", [1, 7, -1])
def test_unknown_sequence(call, dead):
    pool = PagePool(4, 2)
    pool.append(pool.create(), 3)
    pool.free(pool.create())
    before = snapshot(pool)
    with pytest.raises(UnknownSequenceError, match=f"no sequence {dead} ") as error:
        call(pool, dead)
    assert isinstance(error.value, KeyError)
    assert snapshot(pool) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.append(0, -1), "cannot append -1 tokens to sequence 0"),
        (lambda p: p.append(0, 2**31), "would be longer than"),
        (lambda p: p.append_many([0], [1, 1]), "counts holds 2 entries: expected one for each of the 1 sequences"),
        (lambda p: p.append_many([0, 0], [1, 1]), "sequence 0 is named twice"),
        (lambda p: p.append_many([1, 0], [1, -1]), "cannot append -1"),
        (lambda p: p.truncate(0, 4), "to 4 tokens: it holds 3"),
        (lambda p: p.slots(0, -1, 2), r"tokens \[-1, 2\) of sequence 0: it holds 3"),
        (lambda p: p.slots(0, 2, 1), r"tokens \[2, 1\)"),
        (lambda p: p.slots(0, 0, 4), "it holds 3"),
        (lambda p: p.block_table([0], width=1), "width is 1: the longest sequence has 2 blocks"),
        (lambda p: p.block_table([], width=-1), "width is -1"),
        (lambda p: p.ref_count(4), "block 4: the pool holds 4"),
        (lambda p: p.ref_count(-1), "block -1"),
        (lambda p: p.grow(3), "num_blocks is 3: expected 4 to"),
        (lambda p: p.grow(2**31), "num_blocks is 2147483648"),
        (lambda p: PagePool(-1, 4), "num_blocks is -1"),
        (lambda p: PagePool(4, 0), "block_size is 0: expected 1 to"),
    ],
)
def test_bad_arguments(call, message):
    pool = PagePool(4, 2)
    pool.append_many([pool.create(), pool.create()], [3, 1])
    before = snapshot(pool)
    with pytest.raises(ValueError, match=message):
        call(pool)
    assert snapshot(pool) == before


def test_arguments_of_wrong_type():
    pool = PagePool(4, 2)
    s = pool.create()
    with pytest.raises(TypeError):
        pool.append(s, 1.5)
    with pytest.raises(TypeError):
        pool.append(s, 2**70)
    with pytest.raises(TypeError):
        PagePool(4)


def test_a_long_history_leaves_an_empty_pool():
    rng = np.random.default_rng(0)
    pool = PagePool(64, 8)
    live: list[int] = []
    for _ in range(5000):
        choice = rng.integers(5)
        if choice == 0 or not live:
            live.append(pool.create())
        elif choice == 1:
            live.append(pool.fork(int(rng.choice(live))))
        elif choice == 2 and len(live) > 8:
            pool.free(live.pop(int(rng.integers(len(live)))))
        else:
            s = int(rng.choice(live))
            try:
                pool.append(s, int(rng.integers(0, 12)))
            except PoolFullError:
                pool.truncate(s, int(rng.integers(0, pool.length(s) + 1)))
    pool.check_invariants()
    for s in live:
        pool.free(s)
    pool.check_invariants()
    assert pool.num_free == 64
