// One work item is one row of shares.
#include "core/cpu/tile.h"
#include "core/prefill/select_blocks.h"

namespace unique_attn {
namespace UA_ISA {
namespace {

template <typename T>
class RowSelection {
 public:
  UA_INLINE explicit RowSelection(const SelectBlocksParams& params)
      : p(params), scratch(Scratch::padded<uint32_t>(p.key_blocks) + Scratch::padded<uint64_t>(p.key_blocks)) {
    keys = scratch.take<uint32_t>(p.key_blocks);
    units = scratch.take<uint64_t>(p.key_blocks);
  }

  void run(int64_t item) {
    const SelectRow row = select_row(p, p.first_slot + static_cast<int>(item / p.num_heads));
    const T* shares = static_cast<const T*>(p.shares) + item * p.key_blocks;
    const uint32_t threshold = share_key(p.threshold);
    const bool has_threshold = p.threshold <= 1.f;
    uint64_t total = 0;
    int at_threshold = 0;
    for (int block = 0; block < row.visible; ++block) {
      const uint32_t key = share_key(static_cast<float>(shares[block]));
      units[block] = fixed_share(key);
      total += units[block];
      keys[block] = row.forces(block) ? kForcedKey : key;
      at_threshold += has_threshold && keys[block] >= threshold;
    }
    const auto reach = [&](uint32_t key) {
      CountAndSum sum{0, 0};
      for (int block = 0; block < row.visible; ++block) {
        const bool in = keys[block] >= key;
        sum.count += in;
        sum.sum += in ? units[block] : 0;
      }
      return sum;
    };
    SelectCut cut = select_cut(select_goal(p, row, at_threshold, total), reach);
    uint32_t* mask = p.mask + item * p.mask_words;
    for (int word = 0; word < p.mask_words; ++word) mask[word] = 0;
    uint64_t sum = 0;
    for (int block = 0; block < row.visible; ++block) {
      if (keys[block] < cut.key || (keys[block] == cut.key && --cut.ties < 0)) continue;
      mask[block / kMaskBits] |= 1u << block % kMaskBits;
      sum += units[block];
    }
    p.kept[item] = total == 0 ? 1.f : static_cast<float>(static_cast<double>(sum) / static_cast<double>(total));
  }

 private:
  const SelectBlocksParams& p;
  Scratch scratch;
  uint32_t* keys;   // [key_blocks]
  uint64_t* units;  // [key_blocks] shares
};

template <typename T>
void select(const SelectBlocksParams& p, const CpuExecutor& exec) {
  const int64_t items = int64_t{p.end_slot - p.first_slot} * p.num_heads;
  parallel_for(exec, items, grain_for(int64_t{p.key_blocks} * 32), [&](int64_t begin, int64_t end) {
    RowSelection<T> selection(p);
    for (int64_t item = begin; item < end; ++item) selection.run(item);
  });
}

}  // namespace

void select_blocks_cpu(const SelectBlocksParams& params, const CpuExecutor& exec) {
  if (params.dtype == DType::kFloat64) {
    select<double>(params, exec);
  } else {
    select<float>(params, exec);
  }
}

}  // namespace UA_ISA
}  // namespace unique_attn
