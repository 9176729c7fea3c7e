"""The ops by hand, without transformers: a paged cache, two sequences with a shared prefix, a few decode steps.

    python examples/kv_cache_ops.py [--device cuda]

Each step is checked twice: with a budget that covers the context the result must be dense attention's; with a small
budget it must be exact attention over the pages that were chosen.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from unique_attn import PagePool, ops

HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64  # query heads, KV heads, channels
BLOCK, PAGE = 64, 8  # tokens per physical block, tokens per selection page
RULE = "directional"


class Cache:
    """What an engine would own: the storage, its page index, and the bookkeeping of a PagePool."""

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self.pool = PagePool(num_blocks, BLOCK)
        self.k = torch.zeros(num_blocks, KV_HEADS, BLOCK, HEAD_DIM, device=device)
        self.v = torch.zeros_like(self.k)
        self.index = ops.new_index(self.k, rule=RULE, page_size=PAGE)
        self.device = device

    def write(self, seqs: list[int], k: torch.Tensor, v: torch.Tensor) -> None:
        """Append ``k`` and ``v`` ``[B, T, H, D]`` to the sequences and bring their index up to date."""
        tokens = k.shape[1]
        starts = self.pool.seq_lens(seqs)
        for source, target in self.pool.append_many(seqs, [tokens] * len(seqs)):  # blocks no longer shared
            for storage in (self.k, self.v, self.index):
                storage[target] = storage[source]
        slots = [self.pool.slots(seq, int(start), int(start) + tokens) for seq, start in zip(seqs, starts)]
        slot_mapping = torch.cat([torch.from_numpy(s) for s in slots]).to(self.device)
        ops.append_kv(k.flatten(0, 1), v.flatten(0, 1), self.k, self.v, slot_mapping)
        table, lens = self.tables(seqs)
        ops.page_index(
            self.k, self.index, table, torch.from_numpy(starts).to(self.device), lens,
            max_new_tokens=tokens, rule=RULE, page_size=PAGE,
        )  # fmt: skip

    def tables(self, seqs: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The block table ``[B, max_blocks]`` and the lengths ``[B]``."""
        table = torch.from_numpy(self.pool.block_table(seqs, pad=0)).to(self.device)
        return table, torch.from_numpy(self.pool.seq_lens(seqs)).to(self.device)

    def attend(self, seqs: list[int], q: torch.Tensor, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of ``q`` ``[B, 1, Hq, D]`` over at most ``budget`` tokens, and the pages read ``[B, 1, H, k]``."""
        table, lens = self.tables(seqs)
        scores = ops.page_scores(q, self.index, table, lens, rule=RULE, page_size=PAGE)
        pages = ops.topk_pages(scores, lens, budget // PAGE, page_size=PAGE)
        out, _ = ops.sparse_decode(q, self.k, self.v, pages, table, lens, page_size=PAGE)
        return out, pages

    def tokens(self, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a sequence in a row, ``[H, N, D]``."""
        blocks, length = self.pool.blocks(seq), self.pool.length(seq)
        k, v = (storage[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for storage in (self.k, self.v))
        return k, v


def dense(cache: Cache, seq: int, q: torch.Tensor, pages: torch.Tensor | None = None) -> torch.Tensor:
    """SDPA of ``q`` ``[Hq, D]`` over a whole sequence, or over the tokens of ``pages`` ``[H, k]``."""
    k, v = cache.tokens(seq)
    mask = None
    if pages is not None:
        read = torch.zeros(KV_HEADS, k.shape[1], dtype=torch.bool, device=k.device)
        for head, chosen in enumerate(pages):
            for page in chosen[chosen >= 0].tolist():
                read[head, page * PAGE : (page + 1) * PAGE] = True
        mask = read[:, None]
    grouped = q.view(KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)  # the heads of a group as query rows
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).view(HEADS, HEAD_DIM)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prefix", type=int, default=1500, help="tokens that both sequences share")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--budget", type=int, default=256, help="tokens a KV head reads")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)

    def random(batch: int, tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(batch, tokens, heads, HEAD_DIM, device=device)

    cache = Cache(num_blocks=2 * (options.prefix + options.steps) // BLOCK + 4, device=device)
    first = cache.pool.create()
    cache.write([first], random(1, options.prefix, KV_HEADS), random(1, options.prefix, KV_HEADS))
    second = cache.pool.fork(first)  # shares every block of the prefix
    seqs = [first, second]
    used = cache.pool.num_blocks - cache.pool.num_free
    print(f"two sequences of {options.prefix} tokens share {used} blocks of {BLOCK}")

    full = -(-(options.prefix + options.steps) // PAGE) * PAGE  # a budget that covers everything
    worst_full = worst_sparse = 0.0
    for _ in range(options.steps):
        cache.write(seqs, random(2, 1, KV_HEADS), random(2, 1, KV_HEADS))
        q = 3 * random(2, 1, HEADS)
        out_full, _ = cache.attend(seqs, q, full)
        out, pages = cache.attend(seqs, q, options.budget)
        for row, seq in enumerate(seqs):
            expected = dense(cache, seq, q[row, 0])
            worst_full = max(worst_full, (out_full[row, 0] - expected).abs().max().item())
            expected = dense(cache, seq, q[row, 0], pages[row, 0])
            worst_sparse = max(worst_sparse, (out[row, 0] - expected).abs().max().item())
    cache.pool.check_invariants()

    length = cache.pool.length(first)
    used = cache.pool.num_blocks - cache.pool.num_free
    print(f"after {options.steps} steps: {length} tokens each, {used} blocks in use")
    print(f"budget {full} (everything):  largest difference from dense attention {worst_full:.1e}")
    print(f"budget {options.budget} ({options.budget / length:.0%} of it):  largest difference from exact attention "
          f"over the chosen pages {worst_sparse:.1e}")  # fmt: skip
    assert worst_full < 1e-4
    assert worst_sparse < 1e-4
    print("both agree within rounding")


if __name__ == "__main__":
    main()
