"""Every CUDA kernel on small odd shapes, to be run under compute-sanitizer (`make sanitize` on a machine with a GPU).

No test of its own: results are checked by the test suite; here only the memory accesses matter.
"""

from __future__ import annotations

import torch
from op_cases import Spec, build

from unique_attn import ops, train

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def decode_step(
    dtype: torch.dtype, group: int, head_dim: int, page_size: int, tokens: int, rule: str, index_format: str
) -> None:
    """One step of two ragged sequences, with few and with many pages selected (one and several splits)."""
    heads, block_size, max_blocks = 2, 2 * page_size, 9
    seq_lens = torch.tensor([8 * block_size + 3, 5], dtype=torch.int32, device="cuda")
    shape = (2 * max_blocks, heads, block_size, head_dim)
    k_cache, v_cache = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    paging = {"rule": rule, "page_size": page_size, "index_format": index_format}
    index = ops.new_index(k_cache, **paging)
    table = torch.randperm(2 * max_blocks, device="cuda").int().view(2, max_blocks)
    ops.page_index(
        k_cache, index, table, torch.zeros_like(seq_lens), seq_lens,
        max_new_tokens=9 * block_size, **paging,
    )  # fmt: skip
    q = torch.randn(2, tokens, heads * group, head_dim, device="cuda").to(dtype)
    k, v = (torch.randn(2, tokens, heads, head_dim, device="cuda").to(dtype) for _ in range(2))
    for num_pages in (3, 16):
        ops.unique_decode(q, k, v, k_cache, v_cache, index, table, seq_lens, num_pages, **paging, window=0)
    scores = ops.page_scores(q, index, table, seq_lens, **paging)
    ops.topk_pages(scores, seq_lens, 3, page_size=page_size, block_table=table, pages_per_block=2)
    slots = torch.tensor([0, -1, 5], device="cuda")
    ops.append_kv(q[0, :1, :heads].repeat(3, 1, 1), q[0, :1, :heads].repeat(3, 1, 1), k_cache, v_cache, slots)


def out_of_range_step(dtype: torch.dtype, index_format: str, tokens: int) -> None:
    """Lengths, blocks, pages and slots that there are not: nothing outside the tensors is touched."""
    case = build(Spec((61, 38, 30), tokens, group=3, head_dim=64, dtype=dtype, index_format=index_format), "cuda")
    steps = [(61, 0), (65, 0), (2**31 - 1, 0), (-1, 0), (-(2**31), 0), *((61, b) for b in (-1, 20, 2**30, 2**31 - 1))]
    for length, block in steps:
        case.seq_lens[0], case.block_table[0, 7], case.block_table[1, 2] = length, block, block
        table = (case.block_table, case.seq_lens)
        args = (case.q, case.k, case.v, case.k_cache, case.v_cache, case.index, *table, 4)
        ops.unique_decode(*args, **case.scoring)
        scores = ops.page_scores(case.q, case.index, *table, **case.scoring)
        ops.topk_pages(scores, case.seq_lens, 4, page_size=4, block_table=case.block_table, pages_per_block=2)
        starts = torch.tensor([-5, 2**31 - 1, -(2**31)], dtype=torch.int32, device="cuda")
        ops.page_index(
            case.k_cache, case.index, case.block_table, starts, case.seq_lens, max_new_tokens=64, **case.paging
        )
        pages = torch.tensor([0, 16, 2**26, 2**30, 2**31 - 1, -(2**31)], dtype=torch.int32, device="cuda")
        ops.sparse_decode(
            case.q, case.k_cache, case.v_cache, pages.expand(3, tokens, 2, 6).contiguous(), *table, **case.attending
        )
    slots = torch.tensor([2**40, -1, 2**63 - 1, case.k_cache.shape[0] * 8], device="cuda")
    ops.append_kv(case.k[0, :1].repeat(4, 1, 1), case.v[0, :1].repeat(4, 1, 1), case.k_cache, case.v_cache, slots)


def training_step(dtype: torch.dtype, group: int, head_dim: int, page_size: int, rule: str, mode: train.Mode) -> None:
    """Forward and backward over packed sequences of awkward lengths."""
    heads, lengths = 2, (70, 1, 3 * page_size + 2)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    tokens = sum(lengths)
    q = torch.randn(tokens, heads * group, head_dim, device="cuda").to(dtype).requires_grad_()
    k, v = (torch.randn(tokens, heads, head_dim, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    out = train.masked_attention(
        q, k, v, cu_seqlens, max(lengths), 4,
        mode=mode, tau=torch.tensor(2.0, device="cuda"), rule=rule, page_size=page_size,
    )  # fmt: skip
    out.backward(torch.randn_like(out))


def prefill(dtype: torch.dtype, head_dim: int, block_q: int, block_k: int, mask_heads: int) -> None:
    """Attention over listed blocks of two sequences, one with more keys than queries, and over blocks that are chosen,
    with every size of pools."""
    q = torch.randn(300, 4, head_dim, device="cuda").to(dtype)
    k, v = torch.randn(2, 500, 2, head_dim, device="cuda").to(dtype)
    cu_seqlens_q, cu_seqlens_k = (
        torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 170, 300], [0, 333, 500])
    )
    listed = torch.rand(300 // block_q + 2, mask_heads, -(-333 // block_k), device="cuda") < 0.6
    ops.block_sparse_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, 170, ops.pack_block_mask(listed), block_q=block_q, block_k=block_k
    )
    blocks = {"block_q": block_q, "block_k": block_k}
    for i, pool_q in enumerate((8, 16, 32, 64)):
        estimate = {"pool_q": pool_q, "pool_k": (32, 8, 64, 16)[i], "method": ("directional", "unisparse")[i % 2]}
        bounds = (cu_seqlens_q, cu_seqlens_k, 170, 333)
        shares = ops.composite_blocks(q, k, *bounds, **estimate, **blocks)
        ops.select_blocks(shares, *bounds[:2], top_p=0.7, **blocks)
        ops.select_blocks(shares, *bounds[:2], threshold=0.2, min_blocks=2, max_blocks=4, **blocks)
        ops.unique_prefill(q, k, v, *bounds, **estimate, **blocks)


def main() -> None:
    torch.manual_seed(0)
    shapes = [(4, 128, 8), (3, 64, 4), (7, 72, 16), (16, 256, 64), (1, 8, 32)]
    rules = ("mean", "unique", "directional", "minmax")
    for i, (group, head_dim, page_size) in enumerate(shapes):
        for j, dtype in enumerate(DTYPES):
            decode_step(dtype, group, head_dim, page_size, 1 + 4 * (i % 2), rules[(i + j) % 4], "exact")
            decode_step(dtype, group, head_dim, page_size, 1 + 4 * (j % 2), rules[(i + j) % 3], "compressed")
            for mode in ("soft", "hard"):
                training_step(dtype, group, head_dim, page_size, rules[(i + j) % 3], mode)
    for dtype in DTYPES:
        for index_format in ("exact", "compressed"):
            for tokens in (3, 1):
                out_of_range_step(dtype, index_format, tokens)
        for shape in ((64, 128, 64, 4), (128, 128, 128, 2), (128, 64, 64, 1), (40, 64, 128, 4), (256, 128, 64, 1)):
            prefill(dtype, *shape)
    shares = torch.rand(1, 3, 3001, device="cuda")  # of few queries and many keys
    cu_seqlens_q, cu_seqlens_k = (torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (70, 3001 * 64 - 5))
    ops.select_blocks(shares, cu_seqlens_q, cu_seqlens_k, top_p=0.5)
    topk = torch.randn(2, 1, 2, 9000, device="cuda")
    lens = torch.full((2,), 9000 * 8, dtype=torch.int32, device="cuda")
    for scores in (topk, topk.bfloat16()):
        ops.topk_pages(scores, lens, 64, page_size=8)
    torch.cuda.synchronize()
    print("sanitizer workload done")


if __name__ == "__main__":
    main()
