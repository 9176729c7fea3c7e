"""What the transcription example and its tests need besides a real model: a tiny one, a generated tone, WAV files."""

from __future__ import annotations

import wave
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

RATE = 16_000  # samples a second
SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]


def byte_tokenizer(*more: str) -> Any:
    """A tokenizer of 256 bytes, of :data:`SPECIAL` and of ``more`` special tokens; it pads at the left."""
    special = [*SPECIAL, *more]
    pieces = {piece: i for i, piece in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    text = Tokenizer(models.BPE(pieces, []))
    text.add_special_tokens(special)
    text.pre_tokenizer, text.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=text, pad_token="<pad>", padding_side="left", model_input_names=["input_ids", "attention_mask"]
    )


def tiny_qwen2_audio() -> tuple[Any, Any]:
    """A Qwen2-Audio with random weights, fp32 on the CPU, and its processor over Whisper's features and bytes.

    An audio of up to 30 seconds is 25 tokens a second. Words mean nothing; attention is far from uniform.
    """
    tokenizer = byte_tokenizer()
    config = transformers.Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder", "d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128, "num_mel_bins": 128, "initializer_range": 0.1,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
            "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
        },
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2AudioForConditionalGeneration(config).eval()
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)
    return model, transformers.Qwen2AudioProcessor(extractor, tokenizer)


def read_wav(path: str) -> np.ndarray:
    """The samples ``[N]`` of a file, float32 in -1 to 1.

    Raises:
        ValueError: there is no such file, it is no WAV file, it is not 16 kHz, mono and of 16 bits, or it is empty.
    """
    expected = f"--audio: expected a WAV file of {RATE} Hz, 1 channel, 16 bits and at least 1 sample"
    try:
        with wave.open(path) as file:
            rate, channels, bits = file.getframerate(), file.getnchannels(), 8 * file.getsampwidth()
            frames = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise ValueError(f"{expected}, got {path} ({error})") from error
    if (rate, channels, bits) != (RATE, 1, 16) or not frames:
        samples = len(frames) * 8 // (bits * channels)
        raise ValueError(f"{expected}, got {rate} Hz, {channels} channels, {bits} bits and {samples} samples in {path}")
    return np.frombuffer(frames, "<i2").astype(np.float32) / 2**15


def tone(seconds: float) -> np.ndarray:
    """A tone that goes up and down: the samples ``[N]``, float32 in -1 to 1."""
    frequency = 440 + 330 * np.sin(np.arange(int(seconds * RATE)) / RATE)
    return (0.5 * np.sin(2 * np.pi * np.cumsum(frequency) / RATE)).astype(np.float32)
