"""Audio language models on tiny random weights, from synthetic audio to logits: decoding on pages over audio tokens.

Stock attention of the same model is the oracle. Features are those of Whisper's extractor, which transformers ships;
Granite Speech gets them two frames at a time, since its own extractor needs torchaudio.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers
from hf_helpers import assert_same, generate, layers_on_pages, logits
from test_hf_generate import simulated_attention
from transformers import AttentionInterface, AttentionMaskInterface, WhisperFeatureExtractor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import unique_attn as ua
from examples.support.audio import RATE, byte_tokenizer

FULL = ua.UniqueConfig(budget=2048, dense_below=0)  # more tokens than any prompt here
SMALL = ua.UniqueConfig(budget=64, dense_below=0)
WINDOW = 30 * RATE
SOUND = "<sound>"
TOKENIZER = byte_tokenizer(SOUND)
AUDIO = TOKENIZER.convert_tokens_to_ids(SOUND)
TEXT = {
    "vocab_size": len(TOKENIZER), "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ENCODER = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
WHISPER = {"d_model": 32, "encoder_ffn_dim": 128, "encoder_layers": 1, "encoder_attention_heads": 2}
Inputs = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise whose loudness and colour change twice a second, so that no two audio tokens are alike."""
    noise = np.random.default_rng(seed).standard_normal((int(2 * seconds), RATE // 2)).astype(np.float32)
    for i, part in enumerate(noise):
        part[:] = np.convolve(part, np.ones(1 + i % 7) / (1 + i % 7), "same") * (0.1 + 0.1 * (i % 5))
    return noise.reshape(-1)


def windows(audio: np.ndarray) -> list[np.ndarray]:
    return [audio[start : start + WINDOW] for start in range(0, len(audio), WINDOW)]


def padded_left(rows: list[list[int]]) -> Inputs:
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def around(audio_tokens: int) -> list[int]:
    """Audio tokens with text before and behind."""
    return [*TOKENIZER.encode("Listen: "), *[AUDIO] * audio_tokens, *TOKENIZER.encode(" Transcribe.")]


def qwen2_audio(clips: list[np.ndarray]) -> tuple[Any, Inputs]:
    """Its own processor; an audio for each window of 30 seconds, 25 tokens a second."""
    config = transformers.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **WHISPER}, text_config={"model_type": "qwen2", **TEXT},
        audio_token_index=AUDIO,
    )  # fmt: skip
    processor = transformers.Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=128), TOKENIZER, None, SOUND)
    text = [" ".join([SOUND] * len(windows(each))) + " Transcribe." for each in clips]
    audio = [part for each in clips for part in windows(each)]
    return config, processor(text=text, audio=audio, sampling_rate=RATE, return_tensors="pt", padding=True)


def audio_flamingo(clips: list[np.ndarray]) -> tuple[Any, Inputs]:
    """Its own processor, which makes windows itself."""
    config = transformers.AudioFlamingo3Config(
        audio_config={"model_type": "audioflamingo3_encoder", **ENCODER}, text_config={"model_type": "qwen2", **TEXT},
        audio_token_id=AUDIO,
    )  # fmt: skip
    extractor = WhisperFeatureExtractor(feature_size=128, return_attention_mask=True)
    processor = transformers.AudioFlamingo3Processor(extractor, TOKENIZER)
    return config, processor(text=[f"Listen: {SOUND} Transcribe."] * len(clips), audio=clips, return_tensors="pt")


def voxtral(clips: list[np.ndarray]) -> tuple[Any, Inputs]:
    """Whole windows of 375 tokens, as its processor makes them where mistral_common is installed."""
    config = transformers.VoxtralConfig(
        audio_config={"model_type": "voxtral_encoder", **ENCODER}, text_config={"model_type": "llama", **TEXT},
        audio_token_id=AUDIO,
    )  # fmt: skip
    extractor, parts = WhisperFeatureExtractor(feature_size=128), [windows(each) for each in clips]
    features = extractor([part for each in parts for part in each], sampling_rate=RATE, return_tensors="pt")[
        "input_features"
    ]
    return config, {**padded_left([around(375 * len(each)) for each in parts]), "input_features": features}


def granite_speech(clips: list[np.ndarray]) -> tuple[Any, Inputs]:
    """A conformer over the whole clip and a window Q-Former: 10 tokens a second."""
    q_former = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = {"input_dim": 160, "num_layers": 1, "hidden_dim": 32, "num_heads": 2, "feedforward_mult": 2}
    config = transformers.GraniteSpeechConfig(
        encoder_config=encoder, text_config={"model_type": "granite", **TEXT}, audio_token_index=AUDIO,
        projector_config={"model_type": "blip_2_qformer", "encoder_hidden_size": 32, **q_former},
        has_lora_adapter=False, tie_word_embeddings=False,
    )  # fmt: skip
    extractor, longest = WhisperFeatureExtractor(feature_size=80), max(map(len, clips))
    mels = extractor(clips, sampling_rate=RATE, return_tensors="pt", max_length=longest)["input_features"]
    tokens = [-(-(len(each) // 320) // 15) * 3 for each in clips]  # 3 for each 15 frames of 20 ms, the last ones padded
    mask = torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]
    stacked = mels.mT.reshape(len(clips), -1, 160)
    return config, {
        **padded_left([around(each) for each in tokens]), "input_features": stacked, "input_features_mask": mask,
    }  # fmt: skip


FAMILIES: dict[str, Callable[[list[np.ndarray]], tuple[Any, Inputs]]] = {
    "GraniteSpeech": granite_speech, "Qwen2Audio": qwen2_audio, "Voxtral": voxtral,
}  # fmt: skip
if transformers.__version__ >= "5":  # before, there is no such model
    FAMILIES["AudioFlamingo3"] = audio_flamingo
ENCODERS = {"GraniteSpeech": "GraniteSpeechCTCEncoder"}


def build(family: str, clips: list[np.ndarray], device: torch.device) -> tuple[Any, Inputs]:
    """A random model of the family and what it reads of ``clips``, at least three audio tokens to one of text."""
    config, inputs = FAMILIES[family](clips)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15, generator=generator)  # far from uniform attention
    audio = (inputs["input_ids"] == AUDIO).sum(1)
    assert (audio > 3 * (inputs["attention_mask"].sum(1) - audio)).all()
    return model.to(device), {name: tensor.to(device) for name, tensor in inputs.items()}


def encoder_of(model: Any, family: str) -> Any:
    name = ENCODERS.get(family, f"{family}Encoder")
    return next(module for module in model.modules() if type(module).__name__ == name)


def heard(model: Any, family: str, inputs: Inputs) -> tuple[Any, torch.Tensor]:
    """What the model generates, and what its audio encoder gave it for that."""
    seen: list[Any] = []
    hook = encoder_of(model, family).register_forward_hook(lambda *args: seen.append(args[-1]))
    output = generate(model, inputs)
    hook.remove()
    (features,) = seen  # for the prompt alone
    return output, getattr(features, "last_hidden_state", features)


@pytest.mark.parametrize("clips", [[70.0], [65.0, 40.0]], ids=["one", "batch"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget(family: str, clips: list[float], device: torch.device):
    stock, inputs = build(family, [clip(seconds, i) for i, seconds in enumerate(clips)], device)
    assert bool((inputs["attention_mask"] == 0).any()) == (len(clips) > 1)  # left padding of the shorter clip
    model = ua.enable(copy.deepcopy(stock), FULL)
    kept = encoder_of(stock, family).config._attn_implementation
    assert encoder_of(model, family).config._attn_implementation == kept != "unique"
    assert model.config.get_text_config(decoder=True)._attn_implementation == "unique"
    expected, features = heard(stock, family, inputs)
    output, same_features = heard(model, family, inputs)
    torch.testing.assert_close(same_features, features)
    assert_same(output, expected, tolerance=1e-4)
    assert layers_on_pages(output.past_key_values) == [True] * TEXT["num_hidden_layers"]
    assert not any(layers_on_pages(expected.past_key_values))


@pytest.mark.parametrize("family", FAMILIES)
def test_small_budget(family: str, device: torch.device):
    """All but the first and the last page of those that are read are chosen: most are audio, by the head."""
    stock, inputs = build(family, [clip(70.0)], device)
    audio = (inputs["input_ids"][0] == AUDIO).nonzero()
    first, last = int(audio[0]) // SMALL.page_size, int(audio[-1]) // SMALL.page_size
    model = ua.enable(copy.deepcopy(stock), SMALL)
    with ua.record_selection(model) as records:
        output = generate(model, inputs)
    assert all(layers_on_pages(output.past_key_values))
    assert {record.layer_idx for record in records} == set(range(TEXT["num_hidden_layers"]))
    pages = torch.stack([record.pages[0, 0] for record in records])  # [records, H, k]
    assert pages.shape[-1] == SMALL.num_pages
    chosen = pages[:, :, SMALL.sink_pages : -SMALL.recent_pages]
    assert ((chosen >= first) & (chosen <= last)).float().mean() > 0.75
    assert not torch.equal(chosen[:, 0], chosen[:, 1])
    expected = logits(generate(stock, inputs))
    torch.testing.assert_close(logits(output)[0], expected[0], rtol=1e-4, atol=1e-4)  # of the prompt: dense
    assert (logits(output)[1] - expected[1]).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_small_budget_is_the_oracle(family: str, monkeypatch: pytest.MonkeyPatch):
    stock, inputs = build(family, [clip(35.0), clip(65.0, 1)], torch.device("cpu"))
    monkeypatch.setitem(AttentionInterface._global_mapping, "simulated", simulated_attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "simulated", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = ua.enable(copy.deepcopy(stock), SMALL)
    stock.set_attn_implementation({"text_config": "simulated"})
    stock.config.text_config.simulated = SMALL
    output = generate(model, inputs, 6)
    assert all(layers_on_pages(output.past_key_values))
    assert_same(output, generate(stock, inputs, 6))
