// A decode step of few rows in one kernel: where a step is five short kernels in a row, most of its time is their
// beginnings and ends. A cluster of up to 16 thread blocks has a sequence and KV head. Each thread block scores a stretch
// of the pages and keeps the order keys in its shared memory; the cluster selects; each thread block attends to an equal
// share of the selected pages; and each merges an equal share of the outputs, which the others have put into its shared
// memory.
//
// The kernel begins while page_index, the kernel before it, still runs, and waits for it before it reads keys and
// values. Of the index that kernel writes the query's own page only, which recent_pages >= 1 selects without its score;
// everything before that kernel was done when it began.
#include "core/cuda/launch.cuh"
#include "core/cuda/once.cuh"
#include "core/decode/attend_pages.cuh"
#include "core/decode/sm90/cluster_select.cuh"
#include "core/decode/sm90/cluster_step.h"
#include "core/dispatch.h"
#include "core/select/score_products.cuh"

namespace unique_attn {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kUnits = 2;     // of a warp's ring: the keys and the values of 16 tokens
constexpr int kMaxHeads = 8;  // of a group: one tile of columns

// Tiles of index entries of a warp under way.
template <typename Row>
constexpr int kStages = Row::entry_bytes(Row::kHeadDim) * kProductPages * Row::kProducts > 4096 ? 1 : 2;

template <typename T, typename Row, ScoreForm kForm, int kSteps>
struct StepShared {
  static constexpr int DP = kSteps * 16;
  using Cut = ScoreCut<Row, 1, kWarps, kStages<Row>>;
  union {
    alignas(128) AttendShared<T, DP, kWarps, kUnits> attend;
    alignas(128) uint8_t entries[kWarps * Cut::Ring::bytes(DP)];
  };
  Queries<kForm, kSteps, 1, kWarps> queries;
  SelectShared<kWarps> select;
  // From each thread block: its part of this one's share of the outputs, and per head (maximum, sum of weights).
  float sums[kMaxHeads * DP + kMaxCluster];
  float2 weights[kMaxCluster][kMaxHeads];
  int any_visible[kMaxCluster];
};

// Behind it in shared memory: the thread block's share of the selected pages, then its order keys.
struct StepCut {
  int pages_per_block;  // of the selected
  int keys;             // that there is room for, of a thread block
};

template <typename T, typename Row, ScoreForm kForm, int kSteps>
__global__ void __launch_bounds__(kThreads, 1)
    cluster_step_kernel(const DecodeStepParams p, const StepCut cut, const EntryPieces pieces) {
#ifdef UA_HOPPER
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");  // which wait for the end of this kernel
  using Shared = StepShared<T, Row, kForm, kSteps>;
  extern __shared__ __align__(128) char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  int32_t* list = reinterpret_cast<int32_t*>(&shared + 1);
  uint16_t* keys = reinterpret_cast<uint16_t*>(list + cut.pages_per_block);
  cluster_arrive();  // no thread block writes to another that has not begun

  const int rank = cluster_rank(), size = cluster_size();
  const int row_number = blockIdx.x / size;
  const int num_heads = p.scores.num_kv_heads;
  const int b = row_number / num_heads;
  const int head = row_number - b * num_heads;
  const int k = p.selection.k;
  const RowPlan row = plan_row(p.selection, b, 0);
  const int taken = min(row.end - row.first, row.k);
  const int wanted = row.end - row.first > row.k ? row.k - row.sinks - row.recents : 0;

  // This thread block's share of the selected pages, as far as no score decides.
  const int begin = rank * cut.pages_per_block, end = min(begin + cut.pages_per_block, k);
  int32_t* pages = p.selection.pages + int64_t{row_number} * k;
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += kThreads) {
    if (wanted > 0 && i >= row.sinks && i < row.sinks + wanted) continue;
    const int page = i >= taken ? -1 : i < row.sinks ? row.first + i : row.end - taken + i;
    pages[i] = list[i - begin] = page;
  }

  if (wanted > 0) {
    // Stretches of whole tiles, from the tile of the first candidate.
    constexpr int kTile = Shared::Cut::kPages;
    const int low = row.first + row.sinks, high = row.end - row.recents;
    const int first_tile = low / kTile;
    const int tiles = (high + kTile - 1) / kTile - first_tile;
    const int per_block = (tiles + size - 1) / size;
    ScoreTile tile;
    tile.head = head;
    tile.b = b;
    tile.token_begin = 0;
    tile.num_tokens = 1;
    tile.page_begin = (first_tile + rank * per_block) * kTile;
    tile.page_end = min(tile.page_begin + per_block * kTile, high);
    tile.seq_len = 0;  // for the scores of several tokens
    tile.seen = {low, high};
    const int stretch = max(low, tile.page_begin);
    score_pages<T, Row, kForm, kSteps, 1, kWarps, kStages<Row>>(
        p.scores, tile, pieces, shared.queries, shared.entries,
        [&](int page, __nv_bfloat16 score) { keys[page - stretch] = static_cast<uint16_t>(order_key(score)); });
    cluster_wait();
    __syncthreads();
    cluster_select(shared.select, keys, max(tile.page_end - stretch, 0), wanted, [&](int place, int key) {
      const int at = row.sinks + place;
      const int owner = at / cut.pages_per_block;
      pages[at] = stretch + key;
      *in_block(list + at - owner * cut.pages_per_block, owner) = stretch + key;
    });
    cluster_sync();
  } else {
    cluster_wait();
    __syncthreads();
  }

  asm volatile("griddepcontrol.wait;" ::: "memory");
  const SparseDecodeParams& attention = p.attention;
  const int group = attention.num_q_heads / num_heads;
  const int outputs = group * attention.head_dim;
  const int share = (outputs + size - 1) / size;
  const auto store = [&](int row, int d, float sum, float m, float l, bool empty) {
    const int at = row * attention.head_dim + d;
    const int owner = at / share;
    *in_block(shared.sums + rank * share + at - owner * share, owner) = sum;
    // The first channels tell all thread blocks of the rest; head_dim may be less than the cluster.
    for (int c = d; c < size; c += attention.head_dim) {
      *in_block(&shared.weights[rank][row], c) = make_float2(m, l);
      if (row == 0) *in_block(&shared.any_visible[rank], c) = !empty;
    }
  };
  attend_pages<T, Shared::DP, 1, kWarps, kUnits>(attention, shared.attend, b, 0, head, list, max(end - begin, 0),
                                                 store);
  cluster_sync();
  for (int i = threadIdx.x; i < share && rank * share + i < outputs; i += kThreads) {
    const int at = rank * share + i;
    const int row = at / attention.head_dim;
    bool any = false;
    float m = -INFINITY, l = 0.f, sum = 0.f;
    // Not unrolled: to fetch code that runs once takes longer than to run it, 1 µs more a step.
    for (int c = 0; c < size; ++c) {
      any = any || shared.any_visible[c];
      m = fmaxf(m, shared.weights[c][row].x);
    }
    for (int c = 0; c < size; ++c) {
      const float2 there = shared.weights[c][row];
      const float weight = softmax_weight(there.x, m);
      l += there.y * weight;
      sum += shared.sums[c * share + i] * weight;
    }
    const int64_t q_head = int64_t{b} * attention.num_q_heads + head * group;
    // A row without a visible token is 0; one whose logits are all -inf is 0 / 0 = NaN, as in any softmax.
    static_cast<T*>(attention.out)[q_head * attention.head_dim + at] = from_float<T>(any ? sum / l : 0.f);
    if (at == row * attention.head_dim) static_cast<float*>(attention.lse)[q_head + row] = (m + log2f(l)) * kLn2;
  }
#endif
}

// Clusters of each size that a device runs at once, 0 if it cannot: a question to the runtime the first time.
class ActiveClusters {
 public:
  template <typename Kernel>
  int get(const DeviceFacts& device, Kernel* kernel, int size, size_t shared_bytes) {
    const int log2 = size >= 16 ? 4 : size >= 8 ? 3 : size >= 4 ? 2 : 1;
    const bool keeps = device.index < kDevices;
    const int stored = keeps ? known_[device.index][log2].load(std::memory_order_relaxed) : 0;
    if (stored > 0) return stored - 1;
    int known = 0;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(size);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&known, kernel, &config) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      known = 0;
    }
    if (keeps) known_[device.index][log2].store(known + 1, std::memory_order_relaxed);
    return known;
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int> known_[kDevices][5] = {};  // and 1
};

template <typename T, typename Row, ScoreForm kForm, int kSteps>
cudaError_t launch(const DecodeStepParams& p, const DeviceFacts& device, cudaStream_t stream) {
  using Shared = StepShared<T, Row, kForm, kSteps>;
  constexpr int kMost = 227 * 1024;  // of shared memory
  static_assert(sizeof(Shared) <= 192 * 1024, "room for keys");
  const auto kernel = cluster_step_kernel<T, Row, kForm, kSteps>;
  const int64_t rows = int64_t{p.scores.batch} * p.scores.num_kv_heads;
  int size = plan_cluster_size(rows, device.multiprocessors);
  if (size < 2) return cudaErrorNotSupported;
  static OncePerDevice once;
  const cudaError_t error = once(device, [&] {
    // More than 8 thread blocks: where that is refused, no such cluster is active.
    if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
    }
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMost);
  });
  if (error != cudaSuccess) return error;
  static ActiveClusters active;
  while (size > 2 && active.get(device, kernel, size, sizeof(Shared)) < rows) size /= 2;
  if (active.get(device, kernel, size, sizeof(Shared)) == 0) return cudaErrorNotSupported;

  StepCut cut;
  cut.pages_per_block = (p.selection.k + size - 1) / size;
  constexpr int kTile = Shared::Cut::kPages;
  cut.keys = ((p.scores.row_pages + kTile - 1) / kTile + size) / size * kTile;
  const size_t bytes = sizeof(Shared) + cut.pages_per_block * sizeof(int32_t) + cut.keys * sizeof(uint16_t);
  if (bytes > kMost) return cudaErrorNotSupported;
  const EntryPieces pieces = entry_pieces(p.scores, kTile, Shared::Cut::kStep);
  return launch_cluster(kernel, dim3(static_cast<unsigned>(rows * size)), size, kThreads, bytes, stream, p, cut,
                        pieces);
}

template <typename T, ScoreForm kForm, int kSteps>
cudaError_t launch_format(const DecodeStepParams& p, const DeviceFacts& device, cudaStream_t stream) {
  if (p.scores.index.format == IndexFormat::kExact) {
    return launch<T, ExactRow<T, kForm, kSteps>, kForm, kSteps>(p, device, stream);
  }
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return launch<T, CompressedRow<kForm, kSteps>, kForm, kSteps>(p, device, stream);
  }
  return cudaErrorNotSupported;
}

template <typename T>
cudaError_t launch_form(const DecodeStepParams& p, const DeviceFacts& device, cudaStream_t stream) {
  UA_DISPATCH_FORM(rule_facts(p.scores.rule).form, kForm, {
    return p.scores.head_dim <= 64 ? launch_format<T, kForm, 4>(p, device, stream)
                                   : launch_format<T, kForm, 8>(p, device, stream);
  });
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t cluster_step_cuda(const DecodeStepParams& p, cudaStream_t stream) {
  DeviceFacts device;
  const cudaError_t error = device_facts(device);
  if (error != cudaSuccess) return error;
  const bool served = device.runs_sm90 && p.scores.num_query_tokens == 1 && p.selection.recent_pages >= 1 &&
                      p.scores.head_dim <= 128 && p.scores.num_kv_heads > 0 &&
                      p.scores.num_q_heads / p.scores.num_kv_heads <= kMaxHeads && page_scores_on_mma(p.scores);
  if (!served) return cudaErrorNotSupported;
  return p.scores.dtype == DType::kBFloat16 ? launch_form<__nv_bfloat16>(p, device, stream)
                                            : launch_form<__half>(p, device, stream);
}

}  // namespace unique_attn
