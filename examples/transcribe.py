"""Transcription of a long recording with an audio language model, decoded on pages over the audio tokens.

python examples/transcribe.py                              # tiny random weights and a generated tone, seconds
python examples/transcribe.py --model ID --audio FILE.wav  # a model of transformers whose chat template takes audio
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `examples`, where this is run as a file

import unique_attn
from examples.support.audio import RATE, read_wav, tiny_qwen2_audio, tone


def load(name: str) -> tuple[Any, Any]:
    architecture = transformers.AutoConfig.from_pretrained(name).architectures[0]
    model = getattr(transformers, architecture).from_pretrained(name, dtype="auto").eval()
    return model, transformers.AutoProcessor.from_pretrained(name)


class Clock(BaseStreamer):
    """When the prompt and each new token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def rate(self) -> float:
        """Tokens a second from the third one on: neither the prompt nor writing it to pages."""
        timed = self.times[2:]
        return (len(timed) - 1) / (timed[-1] - timed[0]) if len(timed) > 1 else float("nan")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder or a name on the Hub; tiny random weights by default")
    parser.add_argument("--audio", metavar="FILE.wav", help="16 kHz, mono, 16 bits; a generated tone by default")
    parser.add_argument("--seconds", type=float, default=75, help="of the generated tone")
    parser.add_argument("--window", type=int, default=30, help="seconds of each audio in the prompt; 0: one for all")
    parser.add_argument("--prompt", default="Transcribe the recording.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=int, default=256, help="tokens that a KV head reads in a step")
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args(arguments)
    for name, least in (("seconds", 1), ("window", 0), ("new_tokens", 3)):
        if (value := getattr(options, name)) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
    try:
        audio = tone(options.seconds) if options.audio is None else read_wav(options.audio)
    except ValueError as error:
        parser.error(str(error))

    model, processor = tiny_qwen2_audio() if options.model == "tiny" else load(options.model)
    model = model.to(options.device)
    window = options.window * RATE or len(audio)
    content = [{"type": "audio", "audio": audio[start : start + window]} for start in range(0, len(audio), window)]
    talk = [{"role": "user", "content": [*content, {"type": "text", "text": options.prompt}]}]
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(talk, **template).to(options.device, dtype=model.dtype)
    length = inputs["input_ids"].shape[1]
    print(f"audio: {len(audio) / RATE:.1f} s, windows: {len(content)}; prompt: {length} tokens")

    def transcribe(name: str) -> None:
        for tokens in (3, options.new_tokens):  # the first one warms up
            settings = {"max_new_tokens": tokens, "do_sample": False, "return_dict_in_generate": True}
            output = model.generate(**inputs, **settings, streamer=(clock := Clock()))
        cache = output["cache" if "cache" in output else "past_key_values"]  # as versions of transformers call it
        pages = [getattr(layer, "on_pages", False) for layer in cache.layers]
        text = processor.tokenizer.decode(output.sequences[0, length:], skip_special_tokens=True)
        print(f"{name}: {clock.rate():.1f} tokens/s, {sum(pages)} of {len(pages)} layers on pages: {text!r}")

    transcribe("dense")
    unique_attn.enable(model, budget=options.budget)
    transcribe(f"{options.budget} of {length} tokens a step")
    if options.model == "tiny":
        print("The weights are random: the words mean nothing, and the speeds say nothing of a model of use.")


if __name__ == "__main__":
    main()
