// The Python module unique_attn._runtime: host-side objects that are no tensors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/decode/split_plan.h"
#include "page_pool.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace unique_attn {
namespace {

using Copies = std::vector<std::pair<int32_t, int32_t>>;

Copies pairs(const std::vector<BlockCopy>& copies) {
  Copies out;
  out.reserve(copies.size());
  for (const BlockCopy& copy : copies) out.emplace_back(copy.src, copy.dst);
  return out;
}

py::array_t<int64_t> slots(const PagePool& pool, int64_t seq, int64_t begin, int64_t end) {
  const std::vector<int64_t> values = pool.slots(seq, begin, end);
  return py::array_t<int64_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::array_t<int32_t> block_table(const PagePool& pool, const std::vector<int64_t>& seqs, std::optional<int64_t> width,
                                 int32_t pad) {
  int64_t needed = 0;
  for (const int64_t seq : seqs) needed = std::max<int64_t>(needed, pool.blocks(seq).size());
  const int64_t columns = width.value_or(needed);
  if (columns < needed) {
    throw std::invalid_argument("width is " + std::to_string(columns) + ": the longest sequence has " +
                                std::to_string(needed) + " blocks");
  }
  py::array_t<int32_t> table({static_cast<py::ssize_t>(seqs.size()), static_cast<py::ssize_t>(columns)});
  int32_t* row = table.mutable_data();
  for (const int64_t seq : seqs) {
    const std::vector<int32_t>& blocks = pool.blocks(seq);
    std::fill(std::copy(blocks.begin(), blocks.end(), row), row + columns, pad);
    row += columns;
  }
  return table;
}

py::array_t<int32_t> seq_lens(const PagePool& pool, const std::vector<int64_t>& seqs) {
  py::array_t<int32_t> lengths(static_cast<py::ssize_t>(seqs.size()));
  int32_t* out = lengths.mutable_data();
  for (const int64_t seq : seqs) *out++ = static_cast<int32_t>(pool.length(seq));
  return lengths;
}

std::string describe(const PagePool& pool) {
  return "PagePool(num_blocks=" + std::to_string(pool.num_blocks()) +
         ", block_size=" + std::to_string(pool.block_size()) + ", num_free=" + std::to_string(pool.num_free()) +
         ", sequences=" + std::to_string(pool.sequences().size()) + ")";
}

void bind_page_pool(py::module_& m) {
  // Lives as long as the interpreter: the translator below outlives the module object.
  static PyObject* const pool_full = py::exception<PoolFull>(m, "PoolFullError", PyExc_RuntimeError).release().ptr();
  py::object full = py::reinterpret_borrow<py::object>(pool_full);
  full.attr("__doc__") = "Fewer blocks are free (`free`) than the call needs (`needed`); nothing was changed.";
  py::register_exception<UnknownSequence>(m, "UnknownSequenceError", PyExc_KeyError).attr("__doc__") =
      "No live sequence of the pool has this id.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const PoolFull& error) {
      const py::object type = py::reinterpret_borrow<py::object>(pool_full);
      const py::object instance = type(error.what());
      instance.attr("needed") = error.needed;
      instance.attr("free") = error.free;
      PyErr_SetObject(type.ptr(), instance.ptr());
    }
  });

  py::class_<PagePool>(m, "PagePool", R"(Which physical blocks hold the tokens of which sequence.

A pool of `num_blocks` blocks of `block_size` tokens, shared by sequences (integer ids) that grow and shrink
at their end. Token t of a sequence is at offset t % block_size of its block number t // block_size. Blocks
shared after `fork` are reference counted and copied on write: only the last, partly filled block of a
sequence can be written while shared, and `append` replaces it by a copy first.

Blocks are handed out lowest id first. A call that raises leaves the pool as it was:
PoolFullError when blocks run out, UnknownSequenceError for a dead id, ValueError for any other bad argument.
Not safe for use by several threads at once.)")
      .def(py::init<int64_t, int64_t>(), "num_blocks"_a, "block_size"_a)
      .def("create", &PagePool::create, "A new, empty sequence; ids count up from 0 and are never used twice.")
      .def("fork", &PagePool::fork, "seq"_a, "A new sequence with the tokens of `seq`, sharing all its blocks.")
      .def(
          "append", [](PagePool& pool, int64_t seq, int64_t n) { return pairs(pool.append({seq}, {n})); }, "seq"_a,
          "n"_a,
          "Make room for `n` more tokens. Returns the (src, dst) block copies to perform, in order, before writing.")
      .def(
          "append_many",
          [](PagePool& pool, const std::vector<int64_t>& seqs, const std::vector<int64_t>& n_per_seq) {
            return pairs(pool.append(seqs, n_per_seq));
          },
          "seqs"_a, "n_per_seq"_a, "`append` to every sequence, or, when it raises, to none.")
      .def("truncate", &PagePool::truncate, "seq"_a, "length"_a, "Drop the tokens from `length` on.")
      .def("free", &PagePool::free, "seq"_a, "Drop the sequence.")
      .def("grow", &PagePool::grow, "num_blocks"_a, "Enlarge the pool to `num_blocks` blocks; blocks keep their ids.")
      .def("length", &PagePool::length, "seq"_a, "Tokens of the sequence.")
      .def("blocks", &PagePool::blocks, "seq"_a, "Physical block ids of the sequence, in order.")
      .def("slots", &slots, "seq"_a, "begin"_a, "end"_a,
           "int64 [end - begin]: block * block_size + offset of each of the tokens [begin, end).")
      .def("block_table", &block_table, "seqs"_a, "width"_a = py::none(), "pad"_a = -1,
           "int32 [len(seqs), width] block ids, padded with `pad`; `width` defaults to the longest row.")
      .def("seq_lens", &seq_lens, "seqs"_a, "int32 [len(seqs)] tokens of each sequence.")
      .def("ref_count", &PagePool::ref_count, "block"_a, "How many sequences reference the block.")
      .def("sequences", &PagePool::sequences, "Ids of the live sequences, ascending.")
      .def("check_invariants", &PagePool::check_invariants, "Raise RuntimeError if the pool is inconsistent.")
      .def_property_readonly("num_blocks", &PagePool::num_blocks)
      .def_property_readonly("num_free", &PagePool::num_free)
      .def_property_readonly("block_size", &PagePool::block_size)
      .def("__repr__", &describe);
}

void bind_split_plan(py::module_& m) {
  m.def(
      "plan_sparse_decode",
      [](int batch, int num_query_tokens, int num_q_heads, int num_kv_heads, int head_dim, int k, int page_size,
         int num_sms) {
        for (const int value : {batch, num_query_tokens, num_kv_heads, head_dim, k, page_size, num_sms}) {
          if (value < 1) throw std::invalid_argument("every argument must be at least 1, got " + std::to_string(value));
        }
        if (num_q_heads < 1 || num_q_heads % num_kv_heads != 0) {
          throw std::invalid_argument("num_q_heads is " + std::to_string(num_q_heads) +
                                      ": expected a multiple of the " + std::to_string(num_kv_heads) + " KV heads");
        }
        const SplitPlan plan =
            plan_sparse_decode(batch, num_query_tokens, num_q_heads, num_kv_heads, head_dim, k, page_size, num_sms);
        return std::make_pair(plan.num_splits, plan.workspace_bytes);
      },
      py::kw_only(), "batch"_a, "num_query_tokens"_a, "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a, "k"_a,
      "page_size"_a, "num_sms"_a, "(number of splits over the selected pages, workspace bytes) of sparse_decode.");
}

py::dict build_info() {
  return py::dict("version"_a = UA_VERSION, "compiler"_a = __VERSION__, "python"_a = PY_VERSION,
                  "pybind11"_a = UA_PYBIND11_VERSION);
}

}  // namespace
}  // namespace unique_attn

PYBIND11_MODULE(_runtime, m) {
  m.doc() = "Host-side objects of unique_attn that are no tensors.";
  unique_attn::bind_page_pool(m);
  unique_attn::bind_split_plan(m);
  m.def("build_info", &unique_attn::build_info, "What this module was built with.");
}
