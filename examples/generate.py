"""Page-sparse generation with a Hugging Face model: the drop-in, and what it changes.

python examples/generate.py                  # a tiny random model, seconds
python examples/generate.py --model smollm2  # SmolLM2-135M-Instruct, fetched once
python examples/generate.py --model ID       # any model of transformers
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `examples`, where this is run as a file

import unique_attn
from examples.support.models import load_model
from unique_attn import UniqueConfig


def tiny_model() -> Any:
    """A Llama with random weights: its text means nothing, its attention is as good as any."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--context", type=int, default=1200, help="tokens of the prompt")
    parser.add_argument("--budget", type=int, default=128, help="tokens that a KV head reads in a step")
    parser.add_argument("--new-tokens", type=int, default=16)
    options = parser.parse_args()

    if options.model == "tiny":
        model, tokenizer = tiny_model().to(options.device), None
        ids = torch.randint(1, 512, (1, options.context), device=options.device)
    else:
        model, tokenizer = load_model(options.model, device=options.device)
        text = " ".join(f"Milestone {n} stands by the road to the sea." for n in range(1, options.context))
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.context].to(options.device)
    settings = {"max_new_tokens": options.new_tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}

    def new_tokens() -> list[int]:
        return model.generate(ids, **settings)[0, ids.shape[1] :].tolist()

    dense = new_tokens()

    # The drop-in. `from_pretrained(..., attn_implementation="unique")` does the same with the default settings.
    unique_attn.enable(model, UniqueConfig(budget=options.budget))
    sparse = new_tokens()

    unique_attn.enable(model, UniqueConfig(budget=-(-(ids.shape[1] + options.new_tokens) // 8) * 8, dense_below=0))
    everything = new_tokens()
    unique_attn.disable(model)

    show = tokenizer.decode if tokenizer is not None else str
    print(f"dense:                               {show(dense)}")
    print(f"{options.budget:>5} of {ids.shape[1]} tokens a step:         {show(sparse)}")
    print(f"a budget that covers the context:    {show(everything)}")
    same = sum(a == b for a, b in zip(dense, sparse))
    print(f"{same} of {len(dense)} tokens agree under the small budget")
    assert everything == dense, "reading everything must be dense attention"


if __name__ == "__main__":
    main()
