#include "value_checks.h"

namespace unique_attn {

AppendKvCall prepare_append_kv(const Arguments& args, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                               const Tensor& v_cache, const int64_t* slots, const PageTable& table) {
  AppendKvCall call;
  AppendKvParams& p = call.params;
  p.dtype = args.dtype();
  p.k_cache = args.cache("k_cache", k_cache);
  p.v_cache = args.cache("v_cache", v_cache);
  for (int64_t dim = 0; dim < 4; ++dim) args.size("v_cache", v_cache, dim, k_cache.size(dim), "as in k_cache");
  args.apart(k_cache, v_cache);
  p.k = args.tokens("k", k, call.k);
  p.v = args.tokens("v", v, call.v);
  for (int64_t dim = 0; dim < 4; ++dim) args.size("v", v, dim, k.size(dim), "as in k");
  args.size("k", k, 2, k_cache.size(1), "KV heads of the cache");
  args.size("k", k, 3, k_cache.size(3), "head dimension of the cache");
  p.batch = static_cast<int>(k.size(0));
  p.num_tokens = static_cast<int>(k.size(1));
  p.num_kv_heads = static_cast<int>(k.size(2));
  p.head_dim = static_cast<int>(k.size(3));
  p.block_size = static_cast<int>(k_cache.size(2));
  p.num_blocks = static_cast<int>(k_cache.size(0));
  p.slots = slots;
  p.table = table;
  return call;
}

void append_kv(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slot_mapping) {
  constexpr const char* kOp = "append_kv";
  const Arguments args(kOp, "k_cache", k_cache);
  args.floating("k", k, 3);
  args.floating("v", v, 3);
  args.cache("k_cache", k_cache);
  for (int64_t dim = 0; dim < 3; ++dim) args.size("v", v, dim, k.size(dim), "as in k");
  args.size("k", k, 1, k_cache.size(1), "KV heads of the cache");
  args.size("k", k, 2, k_cache.size(3), "head dimension of the cache");
  args.tensor("slot_mapping", slot_mapping, ScalarType::Long, 1);
  args.size("slot_mapping", slot_mapping, 0, k.size(0), "tokens of k");
  args.contiguous("slot_mapping", slot_mapping);
  if (checks_values(args)) check_slots(kOp, slot_mapping, k_cache.size(0) * k_cache.size(2));
  // One token per "sequence": the slots say where each goes.
  const AppendKvCall call =
      prepare_append_kv(args, torch::stable::unsqueeze(k, 1), torch::stable::unsqueeze(v, 1), k_cache, v_cache,
                        static_cast<const int64_t*>(slot_mapping.data_ptr()), PageTable{});
  Runner(kOp, k_cache).run(call.params, append_kv_cpu, UA_CUDA(append_kv_cuda));
}

}  // namespace unique_attn
