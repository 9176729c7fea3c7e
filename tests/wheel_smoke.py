"""What `.ci/wheel-smoke` runs in an environment that holds torch, numpy and a wheel: the installed package computes.

Without pytest and without the checkout's package. ``--cuda``: the library must hold CUDA kernels.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import unique_attn
from unique_attn import info, ops, reference, train


def decode_step() -> None:
    """Append, index, score, select and attend over 3 sequences, as the reference does it."""
    torch.manual_seed(0)
    heads, group, dim, block, page, tokens = 2, 4, 64, 16, 4, 2
    seq_lens = torch.tensor([150, 37, 5], dtype=torch.int32)
    table = torch.randperm(30, dtype=torch.int32).view(3, 10)
    q = torch.randn(3, tokens, heads * group, dim)
    k, v = torch.randn(2, 3, tokens, heads, dim)
    results = []
    for side in (ops, reference):
        generator = torch.Generator().manual_seed(1)
        k_cache, v_cache = torch.randn(2, 30, heads, block, dim, generator=generator)
        index = ops.new_index(k_cache, rule="directional", page_size=page)
        paging = {"rule": "directional", "page_size": page}
        side.page_index(k_cache, index, table, torch.zeros_like(seq_lens), seq_lens, max_new_tokens=150, **paging)
        results.append((*side.unique_decode(q, k, v, k_cache, v_cache, index, table, seq_lens, 6, **paging), k_cache))
    (out, lse, pages, k_cache), (expected, expected_lse, expected_pages, expected_k_cache) = results
    assert torch.equal(pages, expected_pages)
    assert torch.equal(k_cache, expected_k_cache)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5, check_dtype=False)


def training_step() -> None:
    """The mask of training: without one it is PyTorch's causal attention; the soft one reaches every input."""
    torch.manual_seed(0)
    tokens = torch.tensor([0, 96], dtype=torch.int32)
    q, k, v = (torch.randn(96, heads, 32, requires_grad=True) for heads in (4, 2, 2))
    dense = train.masked_attention(q, k, v, tokens, 96, 4, mode="dense")
    heads_first = (x.transpose(0, 1) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(0, 1)
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-5)
    train.masked_attention(q, k, v, tokens, 96, 4, tau=torch.tensor(1.0)).sum().backward()
    for name, x in (("q", q), ("k", k), ("v", v)):
        assert x.grad is not None, name
        assert x.grad.isfinite().all(), name
        assert x.grad.any(), name


def main() -> None:
    assert Path(unique_attn.__file__).is_relative_to(sys.prefix), unique_attn.__file__
    assert importlib.metadata.version("unique-attn") == unique_attn.__version__
    facts = info.collect()
    library = facts["library"]
    assert library["path"] is not None, library["error"]
    assert library["version"] == facts["runtime"]["version"] == unique_attn.__version__
    if "--cuda" in sys.argv:
        assert library["cuda_archs"], "the library was built without CUDA"
    decode_step()
    training_step()
    pool = unique_attn.PagePool(num_blocks=4, block_size=16)
    print(f"unique_attn {unique_attn.__version__} on torch {torch.__version__}: {pool}")


if __name__ == "__main__":
    main()
