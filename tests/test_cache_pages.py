"""The paged table and storage below UniqueCache: an exact index, shared tables and blocks, what is refused."""

from __future__ import annotations

import copy
import gc
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")

from cache_cases import CONFIG, feed, index_is_exact, paged_cache, states

from unique_attn.block_storage import BlockStorage
from unique_attn.paging import LayerPages, OutOfStepError, PagedTable, unsupported


def test_index_stays_exact_through_crops_and_forks():
    cache = paged_cache(length=30)
    fork = cache.fork()
    cache.crop(-5)
    feed(cache, 2, 1)
    feed(fork, 2, 3)
    cache.reorder_cache(torch.tensor([1, 1]))
    feed(cache, 2, 2)
    for each in (cache, fork):
        for layer in each.layers:
            index_is_exact(layer)


def test_padding_is_not_stored():
    cache = paged_cache(length=11, padding=[0, 7])
    assert cache.layers[0].seq_lens.tolist() == [11, 4]
    assert cache.get_seq_length() == 11
    assert not cache.layers[0].keys[1, :, :7].any()


def test_storage_grows_with_the_pool():
    cache = paged_cache(batch=1)
    before = cache.layers[0]._pages.storage.num_blocks
    kept = cache.layers[0].keys
    for _ in range(5):
        feed(cache, 1, 90)
    pages = cache.layers[0]._pages
    assert before < pages.pool.num_blocks <= pages.storage.num_blocks
    assert torch.equal(cache.layers[0].keys[:, :, :11], kept)
    assert cache.layers[0]._table.seq_lens(torch.device("cpu")).tolist() == [461]


def test_tables_are_shared_by_layers_and_steps():
    cache = paged_cache(length=10)
    table = cache.layers[0]._table
    assert cache.layers[1]._table is table
    cpu = torch.device("cpu")
    blocks = table.block_table(cpu)
    feed(cache, 2, 1)
    assert table.block_table(cpu) is blocks  # no new block: the same tensor
    feed(cache, 2, 6)
    assert table.block_table(cpu) is not blocks
    assert table.seq_lens(cpu).tolist() == [17, 17]


def test_a_fork_shares_blocks_until_it_writes():
    cache = paged_cache(batch=1, length=20)
    pool, table = cache.layers[0]._table.pool, cache.layers[0]._table
    free = pool.num_free
    fork = copy.deepcopy(cache)
    assert fork.layers[0]._pages is cache.layers[0]._pages
    assert pool.num_free == free
    feed(fork, 1, 1)
    assert pool.num_free == free - 1  # the last block, partly filled
    assert pool.blocks(table.seqs[0])[:2] == pool.blocks(fork.layers[0]._table.seqs[0])[:2]
    del fork
    gc.collect()
    assert pool.num_free == free
    cache.reset()
    del table
    gc.collect()
    assert pool.num_free == pool.num_blocks


def test_table_refuses_what_is_out_of_step():
    table = PagedTable.create(5, [0, 2], block_size=4)
    assert (table.length, table.lengths) == (5, [5, 3])
    table.append(0, 2)
    table.append(0, 2)  # the next layer
    assert (table.length, table.version) == (7, 1)
    with pytest.raises(OutOfStepError):
        table.append(0, 3)
    with pytest.raises(OutOfStepError):
        table.truncate(0, 2)
    table.truncate(1, 1)
    assert (table.lengths, table.padding) == ([1, 0], [0, 1])
    table.select(2, torch.tensor([True, False]))
    assert table.batch == 1


def test_write_then_gather_in_one_layer():
    table = PagedTable.create(7, [0, 4], block_size=4)
    k, v = states(2, 7)
    config = CONFIG.from_dict({**CONFIG.to_dict(), "block_size": 4})
    pages = LayerPages(table.pool, BlockStorage.create(table.pool.num_blocks, k, 4, config), config)
    pages.write(k, v, table, 0)
    keys, values = pages.gather(table, 7)
    k[1, :, :4] = v[1, :, :4] = 0
    assert torch.equal(keys, k)
    assert torch.equal(values, v)


def test_unsupported_shapes():
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 3, 16)
    assert unsupported(q, k, k) is None
    assert "(16, 16, 8)" in unsupported(q, k, k[..., :8])
    assert "head dim 12" in unsupported(q[..., :12], k[..., :12], k[..., :12])
    assert "4 query heads do not share 3" in unsupported(q, torch.randn(1, 3, 3, 16), torch.randn(1, 3, 3, 16))
    assert "torch.int8" in unsupported(q, k.to(torch.int8), k.to(torch.int8))
    assert "meta" in unsupported(q.to("meta"), k.to("meta"), k.to("meta"))


def test_blocks_come_ahead_a_few_layers_at_a_time():
    cache = paged_cache(batch=1, length=20)
    table = cache.layers[0]._table
    pool, storages = table.pool, [layer._pages.storage for layer in cache.layers]
    table.grow_ahead()
    before = pool.num_blocks
    assert all(each.num_blocks == before for each in storages)  # there is room enough
    while pool.num_free >= 2:
        feed(cache, 1, 1)
    grown = []
    for _ in range(20):
        table.grow_ahead()
        grown.append([each.num_blocks for each in storages])
        if pool.num_blocks > before:
            break
    assert all(sum(b > a for a, b in zip(x, y)) <= 2 for x, y in pairwise(grown))
    assert all(each.num_blocks >= pool.num_blocks > before for each in storages)
    place = storages[0].k.data_ptr()
    feed(cache, 1, 30)
    assert storages[0].k.data_ptr() == place
    assert all(index_is_exact(layer) is None for layer in cache.layers)


def test_no_memory_for_blocks_to_come(monkeypatch):
    cache = paged_cache(batch=1, length=20)
    table = cache.layers[0]._table
    while table.pool.num_free >= 2:
        feed(cache, 1, 1)
    asked = []

    def full(self, num_blocks):
        asked.append(num_blocks)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(BlockStorage, "fit", full)
        for _ in range(3):
            table.grow_ahead()
    assert len(asked) == 1
    feed(cache, 1, 100)
    assert all(index_is_exact(layer) is None for layer in cache.layers)
