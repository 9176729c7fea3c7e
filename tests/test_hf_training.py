"""Training of enabled models: layouts, the mask against the oracle and decoding, what stays dense, bad arguments."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from hf_helpers import assert_same, generate, prompt, run_and_collect, tiny
from hf_training_cases import CLOSE, HARD, HUGE, PACED, SMALL, SOFT, ids, step, trained
from torch._dynamo.testing import CompileCounterWithBackend

import unique_attn as ua
from unique_attn import reference_train, train
from unique_attn.hf import training
from unique_attn.hf.attention import unique_attention_forward
from unique_attn.hf.hooks import attention_modules


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.allclose(a, b, rtol=1e-2, atol=1e-2)


# ---- What is computed. ----


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("how", [SOFT, HARD])
def test_with_room_for_all_pages_it_is_dense(family, how):
    loss, grads = step(trained(family, HUGE, how), input_ids=ids(45, batch=2))
    expected, expected_grads = step(tiny(family).train(), input_ids=ids(45, batch=2))
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert grads.keys() == expected_grads.keys()
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("padding", [None, [7, 0]])
def test_attention_of_a_layer_is_that_of_the_oracle(mode, padding):
    model = trained(how=ua.TrainConfig(mode=mode, tau=2.0))
    module = attention_modules(model)[1]
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 50, 16, requires_grad=True) for heads in (4, 2, 2))
    mask = None
    if padding is not None:
        mask = torch.ones(50, 50, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
        mask[0, :, :, :7] = False
    out, _ = unique_attention_forward(module, q, k, v, mask, 0.3)
    rows = [slice((padding or [0, 0])[b], 50) for b in range(2)]
    weight = torch.randn(2, 50, 4, 16)
    got = torch.autograd.grad(sum((out[b, r] * weight[b, r]).sum() for b, r in enumerate(rows)), (q, k, v))
    total = torch.zeros((), dtype=torch.float64)
    for b, r in enumerate(rows):
        packed = [x[b, :, r].transpose(0, 1) for x in (q, k, v)]
        bounds = torch.tensor([0, packed[0].shape[0]], dtype=torch.int32)
        kwargs = {"rule": "directional", "page_size": 4}
        if mode == "soft":
            theta = reference_train.page_boundary(*packed[:2], bounds, 4, **kwargs)
            chosen = {"theta": theta, "tau": 2.0}
        else:
            index = train.packed_index(packed[1], bounds, 50, **kwargs)
            chosen = {"pages": train.select_pages(packed[0], index, bounds, 50, 4, **kwargs)}
        expected, _ = reference_train.soft_mask_attention(*packed, bounds, **chosen, **kwargs, scale=0.3)
        torch.testing.assert_close(out[b, r].double(), expected, **CLOSE)
        total = total + (expected * weight[b, r]).sum()
    torch.testing.assert_close(got, torch.autograd.grad(total, (q, k, v)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", {"dense_layers": (0,)}),
        ("qwen3", {}),
        ("llama-mha", {"rule": "minmax"}),
        ("llama", {"index_format": "compressed"}),
    ],
)
def test_hard_training_is_decoding(family, change):
    """Teacher-forced logits with the hard mask against decoding the same tokens one by one."""
    config = dataclasses.replace(SMALL, **change)
    model, tokens = trained(family, config, HARD), ids(70, batch=2)
    with torch.no_grad():
        forced = model(tokens, use_cache=False).logits
        model.eval()
        assert differ(forced, model(tokens).logits)
        cache, steps = ua.UniqueCache(config), []
        for t in range(70):
            steps.append(model(tokens[:, t : t + 1], past_key_values=cache).logits)
    torch.testing.assert_close(forced, torch.cat(steps, 1), rtol=1e-3, atol=1e-3)


def test_modes_differ_and_a_default_cache_changes_nothing():
    tokens = ids(60)
    losses = {mode: step(trained(how=ua.TrainConfig(mode=mode, tau=2.0)), input_ids=tokens)[0] for mode in
              ("soft", "hard", "dense")}  # fmt: skip
    torch.testing.assert_close(losses["dense"], step(tiny().train(), input_ids=tokens)[0], **CLOSE)
    assert len({round(float(x), 4) for x in losses.values()}) == 3
    assert torch.equal(losses["soft"], step(trained(), input_ids=tokens, use_cache=False)[0])


# ---- Layouts. ----


def test_padded_rows_agree_with_the_same_sequences_alone():
    model, lengths, width = trained(), [31, 50, 44], 50
    alone = [model(ids(n, seed=n)).logits[0] for n in lengths]
    for side in ("left", "right"):
        tokens, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
        where = [slice(width - n, width) if side == "left" else slice(0, n) for n in lengths]
        for row, (n, part) in enumerate(zip(lengths, where)):
            tokens[row, part], mask[row, part] = ids(n, seed=n)[0], 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        for use_cache in (True, False):
            logits = model(tokens, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
            for row, part in enumerate(where):
                torch.testing.assert_close(logits[row, part], alone[row], **CLOSE)


@pytest.mark.parametrize("kind", ["position_ids", "cu_seq_lens", "both"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("family", "dense_layer", "how"),
    [
        ("llama", (), SOFT),
        ("llama", (1,), SOFT),
        ("llama", (), ua.TrainConfig(mode="dense")),
        ("qwen2-window", (), SOFT),
    ],
)
def test_packed_sequences_agree_with_the_same_sequences_alone(kind, use_cache, family, dense_layer, how):
    config = dataclasses.replace(SMALL, dense_layers=dense_layer)
    model, lengths = trained(family, config, how), [31, 50, 3, 44]
    parts = [ids(n, seed=n) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    # Without position_ids the positions go on, and rotated keys do not have the same spread.
    starts = bounds.tolist() if kind == "cu_seq_lens" else [0] * 4
    places = [torch.arange(start, start + n)[None] for start, n in zip(starts, lengths)]
    alone = torch.cat([model(part, position_ids=place).logits for part, place in zip(parts, places)], 1)
    extra: dict[str, Any] = {"use_cache": use_cache}
    if kind != "cu_seq_lens":
        extra["position_ids"] = torch.cat(places, 1)
    if kind != "position_ids":
        extra |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), bounds)
        extra |= dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
    torch.testing.assert_close(model(torch.cat(parts, 1), **extra).logits, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("positions", ["every second", "none", "backwards"])
def test_positions_in_equal_steps_are_one_sequence(positions):
    """As they are to stock where a cache is filled, which is the default."""
    tokens, count = ids(60), torch.arange(60)[None]
    given = {"every second": count * 2, "none": count * 0, "backwards": count.flip(-1)}[positions]
    want = tiny("llama").train()(tokens, position_ids=given).logits
    torch.testing.assert_close(trained(config=HUGE)(tokens, position_ids=given).logits, want, **CLOSE)


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_layouts_of_masks(monkeypatch, rows):
    monkeypatch.setattr(training, "_MASK_BYTES", rows * 6)  # how many are looked at in one go
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    assert training.mask_layout(causal[None, None], 2, 6).cu_seqlens.tolist() == [0, 6, 12]
    holes = causal & torch.tensor([False, True, False, True, True, False])
    layout = training.mask_layout(holes[None, None], 1, 6)
    assert layout.order.tolist() == [1, 3, 4, 0, 2, 5]
    x = torch.randn(1, 2, 6, 8)
    assert torch.equal(layout.unpack(layout.pack(x), 1).transpose(1, 2), x)
    packed = causal.clone()
    packed[4:, :4] = False
    assert training.mask_layout(torch.stack([packed, causal])[:, None], 2, 6).cu_seqlens.tolist() == [0, 4, 6, 12]
    assert training.mask_layout(torch.zeros(1, 1, 6, 6, dtype=torch.bool), 1, 6) is not None  # only padding
    prefix, window, strict, again = causal.clone(), causal.triu(-2), causal.tril(-1), packed.clone()
    prefix[:3, :3] = True
    again[5, 2:] = True  # a sequence that changes where it starts
    for custom in (prefix, window, strict, again, causal.T):
        assert training.mask_layout(custom[None, None], 1, 6) is None
    for wrong in (causal[None, None].float(), causal[None], causal.expand(1, 2, 6, 6), causal[None, None, :5]):
        assert training.mask_layout(wrong, 1, 6) is None


# ---- What stays dense. ----


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt-oss", {}, "attention sinks"),
        ("qwen2", {"dropout": 0.1}, "dropout"),
        ("llama-mha", {"mask": True}, "attention mask"),
    ],
)
def test_what_has_no_training_mask_is_dense_with_one_warning(family, change, message):
    model, plain, tokens = trained(family), tiny(family).train(), ids(50)
    extra = {}
    for each in (model, plain):
        for module in attention_modules(each):
            module.attention_dropout = change.get("dropout", module.attention_dropout)
    if "mask" in change:
        extra["attention_mask"] = torch.ones(1, 1, 50, 50, dtype=torch.bool).tril().triu(-9)

    def run(model: Any) -> torch.Tensor:
        torch.manual_seed(5)
        return model(tokens, **extra).logits

    ua.hf.compat._warned.clear()
    logits, messages = run_and_collect(lambda: run(model))
    assert sum(message in each for each in messages) == 1
    assert not run_and_collect(lambda: run(model))[1]
    torch.testing.assert_close(logits, run(plain), **CLOSE)


def test_sliding_layers_stay_dense_silently():
    ua.hf.compat._warned.clear()
    (loss, _), messages = run_and_collect(lambda: step(trained("qwen2-window", HUGE), input_ids=ids(50)))
    assert not messages
    torch.testing.assert_close(loss, step(tiny("qwen2-window").train(), input_ids=ids(50))[0], **CLOSE)


def test_eval_and_generate_are_those_of_an_untrained_state():
    model, plain, inputs = trained(how=HARD), ua.enable(tiny(), SMALL), prompt(2, 40, [5, 0])
    step(model, input_ids=ids(40))
    expected = generate(plain, inputs)
    assert_same(generate(model.eval(), inputs), expected)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert_same(generate(model.train(), inputs), expected)  # generate() in training mode


# ---- State and bad arguments. ----


def test_tau_is_changed_in_place_and_state_survives_copies():
    model = trained(how=PACED)
    state = training.train_state(model)
    tau = state.tau_on(torch.device("cpu"))
    model(**prompt(2, 20, [3, 0]))
    state.update(0.25)
    assert tau is state.tau_on(torch.device("cpu"))
    assert tau.dtype == torch.float32
    assert tau.shape == ()
    assert float(tau) == pytest.approx(2.0)
    twin = training.train_state(copy.deepcopy(model))
    assert twin is not state
    twin.update(1.0)
    assert (twin.mode, state.mode, float(tau)) == ("hard", "soft", pytest.approx(2.0))
    assert pickle.loads(pickle.dumps(state)).tau == state.tau
    assert training.train_state(ua.enable(model, SMALL)) is None


def test_statistics_of_known_gates():
    state = training.train_state(trained(how=ua.TrainConfig(tau=1e6)))
    assert state.statistics() == {}
    model = trained(how=ua.TrainConfig(tau=1e6))
    state = training.train_state(model)
    state.collect = True
    model(ids(90))
    found = state.statistics()
    assert not state.collect
    assert found["gate_mean"] == pytest.approx(0.5, abs=1e-3)
    assert found["gate_open_share"] == 1
    assert 0 < found["mass_kept"] < 1
    state.collect = True
    model(ids(10))  # fewer pages than the budget
    assert state.statistics() == {}


def test_bad_arguments():
    with pytest.raises(TypeError, match="train: expected a TrainConfig or None, got dict"):
        ua.enable(tiny(), SMALL, train={})  # type: ignore[arg-type]
    none_recent = ua.UniqueConfig(recent_pages=0, max_decode_tokens=1)  # decoding can do that
    for how in (SOFT, HARD, PACED, ua.TrainConfig(mode="dense", hard_after=0.5)):
        model = tiny()
        with pytest.raises(ValueError, match=r"config.recent_pages: expected at least 1 to train, got 0"):
            ua.enable(model, none_recent, train=how)
        assert model.config._attn_implementation == "sdpa"  # refused before anything was changed
    ua.enable(tiny(), none_recent, train=ua.TrainConfig(mode="dense"))
    with pytest.raises(ValueError, match=r"config.rule: expected mean, unique or directional with mode 'soft'"):
        trained(config=ua.UniqueConfig(rule="minmax"))
    with pytest.raises(ValueError, match=r"config.index_format: expected exact with mode 'soft', got 'compressed'"):
        trained(config=ua.UniqueConfig(index_format="compressed"))
    with pytest.raises(ValueError, match="progress: expected a share of the training from 0 to 1, got nan"):
        training.train_state(trained()).update(float("nan"))
    bounds = torch.tensor([0, 5, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_k: expected the sequences of cu_seq_lens_q, 2, got 1"):
        trained()(ids(10), cu_seq_lens_q=bounds, cu_seq_lens_k=bounds[::2])


def test_a_deeper_model_compiles_no_more_code():
    """With a mask to look at the graph breaks in each layer, but one compiled piece serves them all."""
    given = {**prompt(2, 60, padding=[0, 13]), "use_cache": False}
    counts = []
    for layers in (3, 12):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        config = tiny("llama").config
        config.num_hidden_layers = layers
        model = ua.enable(type(tiny("llama"))(config), SMALL, train=SOFT).train()
        step(torch.compile(model, backend=counter), **given)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]
