// The public CPU entry points: every *_cpu.cpp is compiled once per instruction set into a namespace of that name, and
// the functions here call the one that was chosen when the first of them ran.
#include "core/cpu/isa.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/decode/sparse_decode.h"
#include "core/index/append_kv.h"
#include "core/index/page_index.h"
#include "core/prefill/block_sparse.h"
#include "core/prefill/composite_blocks.h"
#include "core/prefill/select_blocks.h"
#include "core/select/page_scores.h"
#include "core/select/topk_pages.h"
#include "core/train/page_boundary.h"
#include "core/train/soft_mask_attention.h"

#if defined(__x86_64__)
#include <cpuid.h>
#define UA_FOR_EACH_ISA(DO) DO(baseline) DO(avx2) DO(avx512)
#else
#define UA_FOR_EACH_ISA(DO) DO(baseline)
#endif

namespace unique_attn {

#define UA_DECLARE_ISA(isa)                                                       \
  namespace isa {                                                                 \
  void append_kv_cpu(const AppendKvParams&, const CpuExecutor&);                  \
  void page_index_cpu(const PageIndexParams&, const CpuExecutor&);                \
  void page_scores_cpu(const PageScoresParams&, const CpuExecutor&);              \
  void topk_pages_cpu(const TopkPagesParams&, const CpuExecutor&);                \
  void sparse_decode_cpu(const SparseDecodeParams&, const CpuExecutor&);          \
  void page_boundary_cpu(const PageBoundaryParams&, const CpuExecutor&);          \
  void soft_mask_forward_cpu(const SoftMaskForwardParams&, const CpuExecutor&);   \
  void soft_mask_backward_cpu(const SoftMaskBackwardParams&, const CpuExecutor&); \
  void block_sparse_attention_cpu(const BlockSparseParams&, const CpuExecutor&);  \
  void composite_blocks_cpu(const CompositeBlocksParams&, const CpuExecutor&);    \
  void select_blocks_cpu(const SelectBlocksParams&, const CpuExecutor&);          \
  }
UA_FOR_EACH_ISA(UA_DECLARE_ISA)

namespace {

struct Kernels {
  const char* isa;
  void (*append_kv)(const AppendKvParams&, const CpuExecutor&);
  void (*page_index)(const PageIndexParams&, const CpuExecutor&);
  void (*page_scores)(const PageScoresParams&, const CpuExecutor&);
  void (*topk_pages)(const TopkPagesParams&, const CpuExecutor&);
  void (*sparse_decode)(const SparseDecodeParams&, const CpuExecutor&);
  void (*page_boundary)(const PageBoundaryParams&, const CpuExecutor&);
  void (*soft_mask_forward)(const SoftMaskForwardParams&, const CpuExecutor&);
  void (*soft_mask_backward)(const SoftMaskBackwardParams&, const CpuExecutor&);
  void (*block_sparse_attention)(const BlockSparseParams&, const CpuExecutor&);
  void (*composite_blocks)(const CompositeBlocksParams&, const CpuExecutor&);
  void (*select_blocks)(const SelectBlocksParams&, const CpuExecutor&);
};

#define UA_KERNELS(isa)             \
  {#isa,                            \
   isa::append_kv_cpu,              \
   isa::page_index_cpu,             \
   isa::page_scores_cpu,            \
   isa::topk_pages_cpu,             \
   isa::sparse_decode_cpu,          \
   isa::page_boundary_cpu,          \
   isa::soft_mask_forward_cpu,      \
   isa::soft_mask_backward_cpu,     \
   isa::block_sparse_attention_cpu, \
   isa::composite_blocks_cpu,       \
   isa::select_blocks_cpu},
constexpr Kernels kKernels[] = {UA_FOR_EACH_ISA(UA_KERNELS)};  // from the lowest
constexpr int kNumIsas = sizeof(kKernels) / sizeof(kKernels[0]);

// Index into kKernels of the best instruction set that the machine and its operating system have.
int best_isa() {
#if defined(__x86_64__)
  // F16C by its CPUID bit: older compilers do not know it by name.
  unsigned eax, ebx, ecx, edx;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
  if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? 2 : 1;
#else
  return 0;
#endif
}

const Kernels& choose_kernels() {
  const int best = best_isa();
  const char* cap = std::getenv("UNIQUE_ATTN_ISA");
  if (cap == nullptr || *cap == '\0') return kKernels[best];
  for (int i = 0; i < kNumIsas; ++i) {
    if (std::strcmp(cap, kKernels[i].isa) == 0) return kKernels[i < best ? i : best];
  }
  std::fprintf(stderr, "unique_attn: UNIQUE_ATTN_ISA=%s is ignored; expected one of %s\n", cap, cpu_isas());
  return kKernels[best];
}

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace

const char* cpu_isa() { return kernels().isa; }

#define UA_NAME(isa) "," #isa
const char* cpu_isas() { return &(UA_FOR_EACH_ISA(UA_NAME))[1]; }

void append_kv_cpu(const AppendKvParams& params, const CpuExecutor& exec) { kernels().append_kv(params, exec); }
void page_index_cpu(const PageIndexParams& params, const CpuExecutor& exec) { kernels().page_index(params, exec); }
void page_scores_cpu(const PageScoresParams& params, const CpuExecutor& exec) { kernels().page_scores(params, exec); }
void topk_pages_cpu(const TopkPagesParams& params, const CpuExecutor& exec) { kernels().topk_pages(params, exec); }
void sparse_decode_cpu(const SparseDecodeParams& params, const CpuExecutor& exec) {
  kernels().sparse_decode(params, exec);
}
void page_boundary_cpu(const PageBoundaryParams& params, const CpuExecutor& exec) {
  kernels().page_boundary(params, exec);
}
void soft_mask_forward_cpu(const SoftMaskForwardParams& params, const CpuExecutor& exec) {
  kernels().soft_mask_forward(params, exec);
}
void soft_mask_backward_cpu(const SoftMaskBackwardParams& params, const CpuExecutor& exec) {
  kernels().soft_mask_backward(params, exec);
}
void block_sparse_attention_cpu(const BlockSparseParams& params, const CpuExecutor& exec) {
  kernels().block_sparse_attention(params, exec);
}
void composite_blocks_cpu(const CompositeBlocksParams& params, const CpuExecutor& exec) {
  kernels().composite_blocks(params, exec);
}
void select_blocks_cpu(const SelectBlocksParams& params, const CpuExecutor& exec) {
  kernels().select_blocks(params, exec);
}

}  // namespace unique_attn
