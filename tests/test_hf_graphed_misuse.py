"""What a GraphedDecoder is given that it was not made for: used, or a named error, but never other tokens."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hf_helpers import ALWAYS_SPARSE, SHAPE, VOCAB, prompt, tiny
from op_cases import needs_cuda

import unique_attn as ua
from unique_attn.hf.graphed import GraphedDecoder
from unique_attn.hf.reasons import UnsupportedFeatureError

IDS = prompt(2, 30)["input_ids"]


def made() -> tuple[Any, GraphedDecoder]:
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    return model, GraphedDecoder(model, batch=2, max_length=64)


def stock(model: Any = None, **kwargs: Any) -> torch.Tensor:
    model = tiny() if model is None else model
    return model.generate(IDS, **{"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, **kwargs})


# ---- A model that changes. ----


def replace_head(model: Any) -> None:
    model.lm_head = torch.nn.Linear(64, VOCAB, bias=False)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "disabled": (ua.disable, "expected it to be enabled as when the GraphedDecoder was made, got 'sdpa'"),
    "sdpa": (lambda model: model.set_attn_implementation("sdpa"), "expected it to be enabled .*, got 'sdpa'"),
    "eager": (lambda model: model.set_attn_implementation("eager"), "expected it to be enabled .*, got 'eager'"),
    "cast": (lambda model: model.bfloat16(), "expected .* when the GraphedDecoder was made, but"),
    "cast in part": (lambda model: model.lm_head.half(), "expected its weights where they were .* moved or cast"),
    "moved": (lambda model: model.to("meta"), "expected what it was made of .* is another one"),
    "replaced": (replace_head, "expected what it was made of .*, but lm_head is another one"),
}


@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_a_named_error(change: str, when: str) -> None:
    do, message = CHANGES[change]
    model, decoder = made()
    if when == "between":
        decoder.generate(IDS, 3)
    do(model)
    with pytest.raises(RuntimeError, match=message):
        decoder.generate(IDS, 10)


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_noticed_in_a_step(change: str) -> None:
    do, message = CHANGES[change]
    model, decoder = made()
    decoder.prefill(IDS)
    decoder.step()
    do(model)
    with pytest.raises(RuntimeError, match=message):
        decoder.step()


def test_values_that_change_in_place_are_used() -> None:
    model, decoder = made()
    decoder.generate(IDS, 3)
    other = {name: x + 0.01 * torch.randn_like(x) for name, x in model.state_dict().items()}
    model.load_state_dict(other)
    plain = tiny()
    plain.load_state_dict(other)
    assert torch.equal(decoder.generate(IDS, 10), stock(plain))


def test_training_mode_and_a_training_mask_change_nothing() -> None:
    model = ua.enable(tiny(), ALWAYS_SPARSE, train=ua.TrainConfig(tau=2.0)).train()
    assert torch.equal(GraphedDecoder(model, 2, 64).generate(IDS, 10), stock())


def test_two_decoders_of_one_model() -> None:
    model, one = made()
    two = GraphedDecoder(model, 2, 64)
    one.prefill(IDS)
    two.prefill(IDS.flip(0))
    tokens = [one.tokens.clone()]
    for _ in range(9):
        tokens.append(one.step().clone())
        two.step()
    assert torch.equal(torch.cat([IDS, *tokens], 1), stock())


# ---- Autocast. ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    inputs = prompt(2, 30, [9, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = tiny(dtype=dtype).generate(**inputs, do_sample=False, max_new_tokens=10, pad_token_id=0)
        model = ua.enable(tiny(dtype=dtype), ALWAYS_SPARSE)
        decoder = GraphedDecoder(model, 2, 64)
        got = decoder.generate(inputs["input_ids"], 10, inputs["attention_mask"])
        assert torch.equal(got[:, :33], wanted[:, :33])  # later ones may differ by rounding alone
    with pytest.raises(RuntimeError, match=r"torch.autocast: expected it as when the GraphedDecoder was made"):
        decoder.generate(inputs["input_ids"], 10, inputs["attention_mask"])


# ---- What generate() passes on. ----


def stepwise(model: Any, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Greedy tokens by plain forward calls, whose positions go on (``generate`` of transformers 4 repeats the last)."""
    cache, new = None, ids
    with torch.no_grad():
        for _ in range(8):
            out = model(new, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            cache, new = out.past_key_values, out.logits[:, -1:].argmax(-1)
            ids, mask = torch.cat([ids, new], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = positions[:, -1:] + 1
    return ids


def run(model: Any, **inputs: Any) -> torch.Tensor:
    return model.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=0)


def test_positions_are_used() -> None:
    model, decoder = made()
    mask = prompt(2, 30, [9, 0])["attention_mask"]
    for start, given in ((100, torch.ones_like(mask)), (7, mask)):
        positions = (given.cumsum(-1) - 1).clamp(min=0) + start
        inputs = {"input_ids": IDS, "attention_mask": given, "position_ids": positions}
        wanted = stepwise(tiny(), IDS, given, positions)
        assert torch.equal(run(model, **inputs, custom_generate=decoder), wanted)
    with pytest.raises(ValueError, match=r"position_ids: expected shape \[2, 30\], got \[3, 2, 30\]"):
        decoder.prefill(IDS, position_ids=positions.expand(3, -1, -1))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"inputs_embeds": torch.randn(2, 30, 64)}, "inputs_embeds: expected text alone"),
        ({"num_beams": 2}, "num_beams: expected 1"),
    ],
)
def test_other_inputs_are_named_errors(extra: dict[str, Any], message: str) -> None:
    model, decoder = made()
    inputs = {} if "inputs_embeds" in extra else {"input_ids": IDS}
    with pytest.raises(ValueError, match=message):
        run(model, **inputs, attention_mask=torch.ones_like(IDS), **extra, custom_generate=decoder)


def test_images_are_named_errors() -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SHAPE).to_dict(),
        vision_config={"model_type": "clip_vision_model", **small, "image_size": 16, "patch_size": 8},
        image_token_index=VOCAB - 1,
        image_token_id=VOCAB - 1,
    )
    model = ua.enable(transformers.LlavaForConditionalGeneration(config).eval(), ALWAYS_SPARSE)
    decoder = GraphedDecoder(model, 1, 64)
    ids = IDS[:1].clamp(max=VOCAB - 2)
    pictured = ids.clone()
    pictured[:, 5:9] = VOCAB - 1
    image = torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match="expected text alone with a GraphedDecoder"):
        run(model, input_ids=pictured, pixel_values=image, custom_generate=decoder)
    text = run(model, input_ids=ids, custom_generate=decoder)
    assert torch.equal(text, run(model, input_ids=ids))
    for inputs in ({"input_ids": pictured, "pixel_values": image}, {"input_ids": ids}):
        sparse = run(model, **inputs)
        assert torch.equal(sparse, run(ua.disable(model), **inputs))
        ua.enable(model, ALWAYS_SPARSE)


# ---- Families that cannot. ----


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "Lfm2",
            {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
            "layer 0 .* it is a layer of conv",
        ),
        (
            "DeepseekV3",
            {
                "kv_lora_rank": 16,
                "q_lora_rank": 16,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
                "num_key_value_heads": 4,
                "first_k_dense_replace": 2,
            },
            "layer 0 cannot decode on pages",
        ),
    ],
)
def test_other_kinds_of_caches_are_named_errors(name: str, shape: dict[str, Any], message: str) -> None:
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**{**SHAPE, **shape}))
    expected = stock(model.eval())
    ua.enable(model, ALWAYS_SPARSE)
    with pytest.raises(NotImplementedError, match=message):
        GraphedDecoder(model, 2, 64).generate(IDS, 5)
    assert torch.equal(stock(model), expected)


@pytest.mark.filterwarnings("ignore:unique_attn:UserWarning")
def test_a_model_that_keeps_its_own_attention_is_a_named_error() -> None:
    model = tiny()
    model.config.is_encoder_decoder = True
    ua.enable(model, ALWAYS_SPARSE)
    with pytest.raises(NotImplementedError, match="layers that can be sparse, but it is an encoder-decoder model"):
        GraphedDecoder(model, 2, 64)
    with ua.record_selection(model) as records:
        model(IDS)
    assert records == []
    model.config.is_encoder_decoder = False
    GraphedDecoder(ua.enable(model, ALWAYS_SPARSE), 2, 64)


def test_a_model_on_several_devices_is_a_named_error() -> None:
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match="expected all weights on one device, got cpu, meta"):
        GraphedDecoder(model, 2, 64)


@needs_cuda
def test_a_step_that_waits_for_the_device_is_a_named_error() -> None:
    model = ua.enable(tiny().cuda(), ALWAYS_SPARSE)
    handle = model.lm_head.register_forward_hook(lambda module, args, output: output * (output.sum().item() * 0 + 1))
    with pytest.raises(UnsupportedFeatureError, match="LlamaForCausalLM waits for the device"):
        GraphedDecoder(model, batch=2, max_length=64).generate(IDS.cuda(), 10)
    handle.remove()
    got = GraphedDecoder(model, batch=2, max_length=64).generate(IDS.cuda(), 10)
    torch.testing.assert_close(got, model.generate(IDS.cuda(), max_new_tokens=10, do_sample=False, pad_token_id=0))


# ---- Steps that fail, threads, modes. ----


def test_after_a_step_that_failed_a_prefill_is_needed() -> None:
    model, decoder = made()
    wanted = decoder.generate(IDS, 8)
    decoder.prefill(IDS)
    decoder.step()

    def fail(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        decoder.step()
    handle.remove()
    with pytest.raises(RuntimeError, match=r"expected a prefill\(\) before it, as the last .* was interrupted"):
        decoder.step()
    torch.testing.assert_close(decoder.generate(IDS, 8), wanted, rtol=0, atol=0)


def test_a_second_thread_is_a_named_error() -> None:
    model, decoder = made()
    wanted = decoder.generate(IDS, 30)
    inside, go_on = threading.Event(), threading.Event()
    results: list[Any] = []

    def pause(module: Any, args: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    handle = model.register_forward_pre_hook(pause)
    thread = threading.Thread(target=lambda: results.append(decoder.generate(IDS, 30)))
    thread.start()
    assert inside.wait(60)
    for use in (lambda: decoder.generate(IDS, 3), lambda: decoder.prefill(IDS), decoder.step):
        with pytest.raises(RuntimeError, match="expected one thread at a time"):
            use()
    handle.remove()
    go_on.set()
    thread.join()
    torch.testing.assert_close(results[0], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("made_in", [False, True])
def test_inference_mode_may_come_and_go(made_in: bool) -> None:
    with torch.inference_mode(made_in):
        _, decoder = made()
        first = decoder.generate(IDS, 8)
    with torch.inference_mode(not made_in):
        assert torch.equal(decoder.generate(IDS, 8), first)
    assert torch.equal(decoder.generate(IDS, 8), first)


# ---- generate()'s arguments that it does not pass on. ----


class Collects(transformers.generation.streamers.BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


def test_a_streamer_gets_every_token() -> None:
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    streamers = [Collects(), Collects()]
    for streamer, loop in zip(streamers, (ua.GraphedDecoder(model, batch=1, max_length=64), None)):
        model.generate(
            IDS[:1], streamer=streamer, custom_generate=loop, do_sample=False, max_new_tokens=10, pad_token_id=0
        )
    got, wanted = streamers
    assert torch.equal(torch.cat(got.tokens), torch.cat(wanted.tokens))
    assert got.ended
    assert len(got.tokens) == 11


def test_an_assistant_is_a_named_error() -> None:
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    decoder = ua.GraphedDecoder(model, batch=1, max_length=64)
    with pytest.raises(ValueError, match="assistant_model: expected none with a GraphedDecoder, got LlamaForCausalLM"):
        model.generate(IDS[:1], assistant_model=tiny(), custom_generate=decoder, max_new_tokens=10, pad_token_id=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("penalty_alpha", 0.6),
        ("dola_layers", "low"),
        ("prompt_lookup_num_tokens", 3),
        ("assistant_early_exit", 1),
        ("prefill_chunk_size", 8),
        ("num_beams", 2),
    ],
)
def test_settings_of_other_loops_are_named_errors(name: str, value: Any) -> None:
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    decoder = ua.GraphedDecoder(model, batch=1, max_length=64)
    with pytest.raises(ValueError, match=f"^{name}: expected (None|1) with a GraphedDecoder, got {value}"):
        model.generate(IDS[:1], **{name: value}, custom_generate=decoder, max_new_tokens=4, pad_token_id=0)


def test_a_row_of_padding_alone_is_a_named_error() -> None:
    decoder = ua.GraphedDecoder(ua.enable(tiny(), ALWAYS_SPARSE), batch=2, max_length=64)
    mask = torch.ones_like(IDS[:2])
    mask[0] = 0
    with pytest.raises(ValueError, match="attention_mask: expected a token that is shown in every row"):
        decoder.generate(IDS[:2], 4, attention_mask=mask)


# ---- Its own arguments. ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": None}, TypeError, r"model: expected a model from unique_attn.enable\(\), got NoneType"),
        ({"config": {"budget": 512}}, TypeError, "config: expected a UniqueConfig or None, got dict"),
        ({"max_length": 128.5}, TypeError, "max_length: expected an int, got 128.5"),
        ({"batch": 0}, ValueError, "batch: expected at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = ua.enable(tiny(), ALWAYS_SPARSE)
    with pytest.raises(error, match=message):
        ua.GraphedDecoder(**{"model": model, "batch": 2, "max_length": 64, **arguments})


def test_a_model_without_weights_is_a_named_error() -> None:
    with pytest.raises(ValueError, match="model: expected weights on a device, got meta tensors"):
        ua.GraphedDecoder(ua.enable(tiny(), ALWAYS_SPARSE).to("meta"), 2, 64)


def test_a_copy_is_a_named_error() -> None:
    with pytest.raises(TypeError, match="GraphedDecoder: a copy would share"):
        copy.deepcopy(made()[1])


def test_check_every_and_kinds_of_eos() -> None:
    _, decoder = made()
    free = decoder.generate(IDS, 20)
    eos = int(free[0, 35])
    with pytest.raises(ValueError, match="check_every: expected at least 1, got 0"):
        decoder.generate(IDS, 20, eos_token_id=eos, check_every=0)
    wanted = decoder.generate(IDS, 20, eos_token_id=[eos, 3])
    for ends in (torch.tensor([eos, 3]), (eos, 3), [torch.tensor(eos), 3]):
        assert torch.equal(decoder.generate(IDS, 20, eos_token_id=ends), wanted)
    one = decoder.generate(IDS, 20, eos_token_id=eos)
    for end in (torch.tensor(eos), torch.tensor(eos).numpy()):
        assert torch.equal(decoder.generate(IDS, 20, eos_token_id=end), one)
