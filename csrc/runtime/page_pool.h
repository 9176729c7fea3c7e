// Which physical blocks hold the tokens of which sequence. Pure bookkeeping: no tensor, no framework.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace unique_attn {

// Fewer blocks are free than an operation needs.
struct PoolFull : std::runtime_error {
  PoolFull(int64_t needed, int64_t free);
  int64_t needed;
  int64_t free;
};

// No live sequence has this id.
struct UnknownSequence : std::runtime_error {
  explicit UnknownSequence(int64_t seq);
};

// Keys, values and index entries of block `src` are to be copied to block `dst`.
struct BlockCopy {
  int32_t src;
  int32_t dst;
};

// A pool of `num_blocks` physical blocks of `block_size` tokens, shared by sequences that grow and shrink at
// their end. Token t of a sequence is at offset t % block_size of its block number t / block_size.
//
// - A block is referenced by one or more sequences; with no reference left it is free again.
// - Sequences that share a block agree on its tokens as far as both reach. A sequence writes only at its
//   end, so only the last, partly filled block of a sequence can be written while shared: append replaces
//   it by a copy first (copy on write) and tells the caller which blocks to copy.
// - Blocks are handed out lowest id first, so equal histories give equal tables.
// - A call that throws leaves the pool as it was. Bad arguments throw std::invalid_argument.
//
// Not safe for use by several threads at once.
class PagePool {
 public:
  PagePool(int64_t num_blocks, int64_t block_size);

  // A new, empty sequence. Ids count up from 0 and are never used twice.
  int64_t create();
  // A new sequence with the tokens of `seq`, sharing all its blocks.
  int64_t fork(int64_t seq);
  // Makes room for counts[i] more tokens at the end of seqs[i], for all of them or, when it throws, for none.
  // The copies are to be made, in order, before the new tokens are written. Each sequence at most once.
  std::vector<BlockCopy> append(const std::vector<int64_t>& seqs, const std::vector<int64_t>& counts);
  // Drops the tokens from `length` on.
  void truncate(int64_t seq, int64_t length);
  // Drops the sequence.
  void free(int64_t seq);
  // Enlarges the pool to `num_blocks` blocks; existing blocks keep their ids.
  void grow(int64_t num_blocks);

  int64_t length(int64_t seq) const { return get(seq).length; }
  const std::vector<int32_t>& blocks(int64_t seq) const { return get(seq).blocks; }
  // block * block_size + offset of each of the tokens [begin, end) of `seq`.
  std::vector<int64_t> slots(int64_t seq, int64_t begin, int64_t end) const;
  // Ids of the live sequences, ascending.
  std::vector<int64_t> sequences() const;

  int64_t block_size() const { return block_size_; }
  int64_t num_blocks() const { return static_cast<int64_t>(refs_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  // How many sequences reference `block`.
  int64_t ref_count(int64_t block) const;

  // Throws std::logic_error, naming the first violation, unless every block is either free or referenced
  // exactly as often as its count says, every sequence has just the blocks its length needs, and sequences that
  // share a block share all blocks before it.
  void check_invariants() const;

 private:
  struct Sequence {
    int64_t length = 0;
    std::vector<int32_t> blocks;
  };

  const Sequence& get(int64_t seq) const;
  Sequence& get(int64_t seq) { return const_cast<Sequence&>(static_cast<const PagePool*>(this)->get(seq)); }
  int64_t blocks_for(int64_t length) const { return (length + block_size_ - 1) / block_size_; }
  int32_t take_block();
  void release_block(int32_t block);

  int64_t block_size_;
  int64_t next_id_ = 0;
  std::vector<int32_t> refs_;  // [num_blocks] references of each block
  std::vector<int32_t> free_;  // blocks without references, a heap with the lowest id on top
  std::unordered_map<int64_t, Sequence> sequences_;
};

}  // namespace unique_attn
