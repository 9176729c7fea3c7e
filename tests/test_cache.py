"""UniqueCache against DynamicCache under random operations, and what it returns, refuses and adopts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from cache_cases import CONFIG, DIM, HEADS, LAYERS, attend_to, feed, paged_cache, states
from transformers import DynamicCache, LlamaConfig

from unique_attn import UniqueCache, UniqueConfig
from unique_attn.hf.cache import adopt
from unique_attn.hf.compat import cropped_length
from unique_attn.hf.handover import CachedTensor, handed_over
from unique_attn.hf.layer import UniqueLayer
from unique_attn.hf.masks import causal_mask, left_padding, shows_padding, visible
from unique_attn.paging import OutOfStepError

operations = st.one_of(
    st.tuples(st.just("feed"), st.sampled_from([1, 1, 1, 2, 5, 6, 9])),
    st.tuples(st.just("crop"), st.integers(1, 12)),
    st.tuples(st.just("reorder"), st.lists(st.integers(0, 99), min_size=4, max_size=4)),
    st.tuples(st.just("select"), st.lists(st.integers(0, 99), min_size=1, max_size=3)),
    st.tuples(st.just("repeat"), st.integers(1, 2)),
    st.tuples(st.just("unattended"), st.integers(1, 3)),
    st.tuples(st.just("fork"), st.just(0)),
    st.tuples(st.just("reset"), st.just(0)),
)


@settings(max_examples=300)
@given(st.lists(operations, max_size=14), st.integers(1, 14), st.lists(st.integers(0, 6), min_size=1, max_size=3))
def test_contents_equal_a_dynamic_cache(ops, length, padding):
    """Whatever is done to both, the keys and values agree (hidden padding excepted), and forks stay as they were."""
    torch.manual_seed(0)
    cache, stock = UniqueCache(CONFIG), DynamicCache()
    padding = [min(pad, length - 1) for pad in padding]
    forks = []

    def update(tokens, attend=True):
        fed = feed(cache, len(padding), tokens, padding=padding, attend=attend)
        for layer_idx, (k, v) in enumerate(fed):
            stock.update(k, v, layer_idx)

    update(length)
    for name, argument in ops:
        if name == "feed":
            update(argument)
        elif name == "unattended":
            update(argument, attend=False)
        elif name == "crop":
            left = max(max(padding) + 1, stock.get_seq_length() - argument)
            if left < stock.get_seq_length():  # crop(0) is a matter of the version
                for each in (cache, stock):
                    each.crop(left - each.get_seq_length())
        elif name == "reorder":
            rows = torch.tensor([row % len(padding) for row in argument[: len(padding)]])
            padding = [padding[row] for row in rows]
            cache.reorder_cache(rows)
            stock.reorder_cache(rows)
        elif name == "select":
            rows = torch.tensor([row % len(padding) for row in argument])
            padding = [padding[row] for row in rows]
            cache.batch_select_indices(rows)
            stock.batch_select_indices(rows)
        elif name == "repeat" and len(padding) < 6:
            padding = [pad for pad in padding for _ in range(argument)]
            cache.batch_repeat_interleave(argument)
            stock.batch_repeat_interleave(argument)
        elif name == "fork":
            forks.append((cache, [layer.keys.clone() for layer in cache.layers]))
            cache = cache.fork()
        elif name == "reset":
            cache.reset()
            stock = DynamicCache()
            assert cache.get_seq_length() == 0
            update(length)
        for layer_idx, layer in enumerate(cache.layers):
            assert cache.get_seq_length(layer_idx) == stock.get_seq_length(layer_idx)
            shown = (torch.arange(stock.get_seq_length())[None] >= torch.tensor(padding)[:, None])[:, None, :, None]
            expected = stock.layers[layer_idx]
            assert torch.equal(layer.keys * shown, expected.keys * shown)
            assert torch.equal(layer.values * shown, expected.values * shown)
            if layer.on_pages:
                layer._table.pool.check_invariants()
    for fork, keys in forks:
        for layer, expected in zip(fork.layers, keys):
            assert torch.equal(layer.keys, expected)


def test_pages_are_entered_by_the_first_step_that_is_attended_to():
    cache = UniqueCache(UniqueConfig(page_size=4, budget=12, block_size=8))
    feed(cache, 1, 8)
    feed(cache, 1, 1, attend=False)
    feed(cache, 1, 2)
    assert not any(layer.on_pages for layer in cache.layers)
    feed(cache, 1, 1)  # the context is as long as the budget
    assert all(layer.on_pages for layer in cache.layers)
    assert cache.layers[0]._keys is None
    feed(cache, 1, 1, attend=False)
    assert all(layer.on_pages for layer in cache.layers)


# ---- What update returns. ----


@pytest.mark.parametrize("on_pages", [False, True])
def test_reading_what_update_returned_gives_all_keys_and_keeps_the_layer_dense(on_pages):
    cache, stock = UniqueCache(CONFIG), DynamicCache()
    for tokens in (9, 1, 1) if on_pages else (9,):
        for layer_idx, (k, v) in enumerate(feed(cache, 2, tokens)):
            stock.update(k, v, layer_idx)
    assert cache.layers[0].on_pages == on_pages
    k, v = states(2, 1)
    keys, values = cache.update(k, v, 0)
    expected = stock.update(k, v, 0)
    assert type(keys) is CachedTensor
    assert (keys.shape, keys.dtype, keys.device, keys.dim()) == (expected[0].shape, k.dtype, k.device, 4)
    assert "keys, shape=" in repr(keys)
    assert cache.layers[0].on_pages == on_pages  # looking at shapes reads nothing
    query = torch.randn(2, HEADS, 1, DIM)
    assert torch.equal(query @ keys.mT, query @ expected[0].mT)
    assert torch.equal(torch.nn.functional.pad(values[:, :, 1:] * 2, (0, 1)),
                       torch.nn.functional.pad(expected[1][:, :, 1:] * 2, (0, 1)))  # fmt: skip
    assert type(keys + 0) is torch.Tensor
    assert not attend_to((keys, values))
    assert not cache.layers[0].on_pages
    feed(cache, 2, 1)
    assert [layer.on_pages for layer in cache.layers] == [False, True]
    cache.reset()
    feed(cache, 2, 9)
    feed(cache, 2, 1)
    assert all(layer.on_pages for layer in cache.layers)


def test_keys_and_values_of_different_updates_do_not_go_together():
    cache = paged_cache()
    (k0, v0), (k1, v1) = (cache.update(*states(2, 1), layer_idx) for layer_idx in range(2))
    for pair in ((k0, v1), (v0, k0), (k0, k0), (k0, v1 + 0)):
        assert handed_over(*pair) is None
    assert handed_over(k1, v1)[0] is cache.layers[1]


def test_keys_of_a_step_can_be_read_after_it_was_attended_to_but_not_after_the_next():
    cache = paged_cache()
    given = cache.update(*states(2, 1), 0)
    assert attend_to(given)
    late = cache.update(*states(2, 1), 1)
    assert torch.equal(given[0] + 0, cache.layers[0].keys)  # as layers that share keys do
    assert not cache.layers[0].on_pages
    cache.update(*states(2, 1), 1)
    with pytest.raises(RuntimeError, match="12 tokens, to be read before its next call, got 13 tokens by now: clone"):
        late[0] + 0


def test_copies_of_what_update_returned_are_plain_tensors():
    for clone in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        cache = paged_cache()
        keys, _ = cache.update(*states(2, 1), 0)
        twin = clone(keys)
        assert type(twin) is torch.Tensor
        assert torch.equal(twin, cache.layers[0].keys)


def test_context_below_dense_below_leaves_pages():
    cache = UniqueCache(UniqueConfig(page_size=4, budget=12, block_size=8))
    feed(cache, 1, 12)
    feed(cache, 1, 1)
    assert all(layer.on_pages for layer in cache.layers)
    for layer in cache.layers:
        layer.crop(5 - 13 if cropped_length(-8, 13) == 5 else 5)
    feed(cache, 1, 1)
    assert not any(layer.on_pages for layer in cache.layers)


def test_pickled_caches_are_dense():
    cache = paged_cache(padding=[0, 3])
    again = pickle.loads(pickle.dumps(cache))
    assert again.unique_config == CONFIG
    for layer, expected in zip(again.layers, cache.layers):
        assert not layer.on_pages
        assert torch.equal(layer.keys, expected.keys)
    feed(again, 2, 1, padding=[0, 3])
    assert all(layer.on_pages for layer in again.layers)
    assert again.layers[0]._table is again.layers[1]._table


def test_reset_is_empty():
    cache = paged_cache()
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not any(layer.on_pages or layer.is_initialized for layer in cache.layers)
    feed(cache, 3, 7)
    assert cache.layers[0].keys.shape == (3, HEADS, 7, DIM)


def test_interrupted_forward_is_noticed():
    cache = paged_cache()
    attend_to(cache.update(*states(2, 1), 0))  # and layer 1 never hears of it
    with pytest.raises(OutOfStepError, match=r"reset\(\) the cache"):
        feed(cache, 2, 1)
    cache.reset()
    feed(cache, 2, 3)


def test_single_layer_operation_is_noticed():
    cache = paged_cache()
    cache.layers[1].crop(-2 if cropped_length(-2, 11) == 9 else 9)
    with pytest.raises(OutOfStepError):
        feed(cache, 2, 1)


def test_layer_that_joins_late():
    """One layer can use pages only later than the others."""
    cache, stock = UniqueCache(CONFIG), DynamicCache()
    for step, tokens in enumerate((10, 1, 1, 2)):
        for layer_idx, (k, v) in enumerate(states(2, tokens) for _ in range(LAYERS)):
            given = cache.update(k, v, layer_idx)
            stock.update(k, v, layer_idx)
            if layer_idx == 0 or step > 1:
                attend_to(given)
    for layer, expected in zip(cache.layers, stock.layers):
        assert layer.on_pages
        assert torch.equal(layer.keys, expected.keys)
    assert cache.layers[0]._table is cache.layers[1]._table


def test_new_tokens_that_nobody_attended_to_are_kept():
    cache = paged_cache()
    k, v = states(2, 1)
    for layer_idx, layer in enumerate(cache.layers):
        cache.update(k, v, layer_idx)
        assert layer._step is not None
        assert torch.equal(layer.keys[:, :, -1:], k)
        assert torch.equal(layer.values[:, :, -1:], v)
        assert layer._step is None
        assert layer.on_pages


def test_setting_keys_leaves_pages():
    cache = paged_cache()
    values = cache.layers[0].values
    cache.layers[0].keys = torch.zeros(2, HEADS, 11, DIM)
    assert not cache.layers[0].on_pages
    assert not cache.layers[0].keys.any()
    assert torch.equal(cache.layers[0].values, values)


def test_adoption_keeps_the_object_and_its_contents():
    cache = DynamicCache()
    k, v = states(2, 5)
    cache.update(k, v, 0)
    adopt(cache, CONFIG)
    layer = cache.layers[0]
    assert type(layer) is UniqueLayer
    assert torch.equal(layer.keys, k)
    adopt(cache, UniqueConfig())
    assert cache.layers[0] is layer
    cache.update(k, v, 1)  # a layer that did not exist before
    assert cache.layers[1].state is layer.state
    assert layer.config is CONFIG
    empty = DynamicCache()
    adopt(empty, CONFIG, empty=False)
    empty.update(k, v, 0)
    assert type(empty.layers[0]) is not UniqueLayer


def test_arguments():
    with pytest.raises(TypeError, match="config: expected a UniqueConfig or None, got dict"):
        UniqueCache({"budget": 8})
    with pytest.raises(TypeError, match="model_config: expected a transformers config or None, got int"):
        UniqueCache(model_config=3)
    cache = UniqueCache(model_config=LlamaConfig(num_hidden_layers=3))
    assert [type(layer) for layer in cache.layers] == [UniqueLayer] * 3
    assert cache.unique_config == UniqueConfig()


def test_wrong_batch():
    cache = paged_cache()
    with pytest.raises(ValueError, match="key_states: expected the 2 rows of the cache, got 3"):
        feed(cache, 3, 1)
    feed(cache, 2, 1)  # nothing happened


def test_masks():
    padding = torch.tensor([0, 3])
    assert left_padding(None, 2, 1, 9) == [0, 0]
    assert left_padding(causal_mask(padding, 4, 9), 2, 4, 9) == [0, 3]
    assert left_padding(causal_mask(padding, 1, 9), 2, 1, 9) == [0, 3]
    assert left_padding(causal_mask(padding, 1, 9)[:1], 2, 1, 9) == [0, 0]  # one row for all
    holes = causal_mask(padding, 1, 9)
    holes[0, 0, 0, 5] = False
    assert left_padding(holes, 2, 1, 9) is None
    assert left_padding(causal_mask(torch.tensor([0, 9]), 1, 9), 2, 1, 9) is None  # hides the new token
    assert left_padding(causal_mask(padding, 1, 8), 2, 1, 9) is None
    additive = torch.where(causal_mask(padding, 4, 9), 0.0, torch.finfo(torch.float32).min)
    assert left_padding(additive, 2, 4, 9) == [0, 3]
    assert left_padding(additive.masked_fill(additive < 0, -torch.inf), 2, 4, 9) == [0, 3]
    assert left_padding(additive - 0.5, 2, 4, 9) is None  # a bias
    assert left_padding(torch.where(additive < 0, additive, -0.5), 2, 4, 9) is None
    assert left_padding(torch.where(additive < 0, -1e4, 0.0), 2, 4, 9) is None
    assert bool(visible(additive)[1])
    assert left_padding(causal_mask(padding, 1, 9).long(), 2, 1, 9) is None
    assert not shows_padding(holes, padding)
    assert shows_padding(None, padding)
    assert shows_padding(torch.zeros(2, 1, 1, 9), padding)  # additive
    assert not shows_padding(torch.where(holes, 0.0, -torch.inf), padding)
