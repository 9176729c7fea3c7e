// One work item is one new token: its keys and values of all heads are copied as they are.
#include "core/cpu/tile.h"
#include "core/index/append_kv.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

UA_INLINE void copy_token(const TokenView& source, const PagedView& cache, int64_t b, int64_t t, TokenPlace place,
                          int heads, int64_t size, int64_t row_bytes) {
  const char* from = static_cast<const char*>(source.data) + (b * source.stride_batch + t * source.stride_token) * size;
  char* to =
      static_cast<char*>(cache.data) + (place.block * cache.stride_block + place.offset * cache.stride_token) * size;
  for (int h = 0; h < heads; ++h) {
    __builtin_memcpy(to + h * cache.stride_head * size, from + h * source.stride_head * size, row_bytes);
  }
}

}  // namespace

void append_kv_cpu(const AppendKvParams& p, const CpuExecutor& exec) {
  const int64_t size = static_cast<int64_t>(dtype_size(p.dtype));
  const int64_t row_bytes = p.head_dim * size;
  const int64_t work = row_bytes * p.num_kv_heads;
  parallel_for(exec, int64_t{p.batch} * p.num_tokens, grain_for(work), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / p.num_tokens;
      const int64_t t = n % p.num_tokens;
      TokenPlace place;
      if (p.table.blocks == nullptr) {
        place = mapped_place(p, n);
      } else if (is_left_out(p, n)) {
        continue;
      } else {
        place = table_place(p.table, b, query_position(p.table.seq_lens[b], p.num_tokens, static_cast<int>(t)));
      }
      if (place.block < 0) continue;
      copy_token(p.k, p.k_cache, b, t, place, p.num_kv_heads, size, row_bytes);
      copy_token(p.v, p.v_cache, b, t, place, p.num_kv_heads, size, row_bytes);
    }
  });
}

}  // namespace UA_ISA
}  // namespace unique_attn
