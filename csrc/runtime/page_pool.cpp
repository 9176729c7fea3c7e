#include "page_pool.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <unordered_set>

namespace unique_attn {

namespace {

constexpr int64_t kMaxInt32 = std::numeric_limits<int32_t>::max();

std::string str(int64_t value) { return std::to_string(value); }

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// Both copies and tables hold block ids, and sequence lengths travel to the device, as int32.
void require_num_blocks(int64_t num_blocks, int64_t lowest) {
  require(num_blocks >= lowest && num_blocks <= kMaxInt32,
          "num_blocks is " + str(num_blocks) + ": expected " + str(lowest) + " to " + str(kMaxInt32));
}

}  // namespace

PoolFull::PoolFull(int64_t needed, int64_t free)
    : std::runtime_error("the page pool is full: " + str(needed) + " more blocks are needed, " + str(free) +
                         " are free"),
      needed(needed),
      free(free) {}

UnknownSequence::UnknownSequence(int64_t seq)
    : std::runtime_error("no sequence " + str(seq) + " is in the page pool") {}

PagePool::PagePool(int64_t num_blocks, int64_t block_size) : block_size_(block_size) {
  require(block_size >= 1 && block_size <= kMaxInt32,
          "block_size is " + str(block_size) + ": expected 1 to " + str(kMaxInt32));
  require_num_blocks(num_blocks, 0);
  grow(num_blocks);
}

void PagePool::grow(int64_t num_blocks) {
  require_num_blocks(num_blocks, this->num_blocks());
  // All memory that later calls need for the free list is taken here, so that releasing never throws.
  free_.reserve(num_blocks);
  refs_.reserve(num_blocks);
  while (this->num_blocks() < num_blocks) {
    free_.push_back(static_cast<int32_t>(refs_.size()));
    std::push_heap(free_.begin(), free_.end(), std::greater<>());
    refs_.push_back(0);
  }
}

int64_t PagePool::create() {
  sequences_.emplace(next_id_, Sequence());
  return next_id_++;
}

int64_t PagePool::fork(int64_t seq) {
  Sequence copy = get(seq);
  const auto [it, inserted] = sequences_.emplace(next_id_, std::move(copy));
  for (const int32_t block : it->second.blocks) ++refs_[block];
  return next_id_++;
}

std::vector<BlockCopy> PagePool::append(const std::vector<int64_t>& seqs, const std::vector<int64_t>& counts) {
  require(seqs.size() == counts.size(), "counts holds " + str(counts.size()) +
                                            " entries: expected one for each of the " + str(seqs.size()) +
                                            " sequences");

  // Plan: everything that can fail does so before anything changes.
  struct Step {
    Sequence* sequence;
    bool copy_last;
    int64_t new_blocks;
  };
  std::vector<Step> steps;
  steps.reserve(seqs.size());
  std::unordered_set<int64_t> seen;
  std::unordered_map<int32_t, int32_t> given_up;  // references that earlier steps drop by copying
  int64_t needed = 0;
  int64_t num_copies = 0;
  for (size_t i = 0; i < seqs.size(); ++i) {
    Sequence& sequence = get(seqs[i]);
    require(seen.insert(seqs[i]).second, "sequence " + str(seqs[i]) + " is named twice in one append");
    require(counts[i] >= 0, "cannot append " + str(counts[i]) + " tokens to sequence " + str(seqs[i]));
    require(counts[i] <= kMaxInt32 - sequence.length,
            "sequence " + str(seqs[i]) + " would be longer than " + str(kMaxInt32) + " tokens");
    Step step{&sequence, false, blocks_for(sequence.length + counts[i]) - blocks_for(sequence.length)};
    if (counts[i] > 0 && sequence.length % block_size_ != 0) {
      const int32_t last = sequence.blocks.back();
      step.copy_last = refs_[last] - given_up[last] > 1;
      if (step.copy_last) ++given_up[last];
    }
    num_copies += step.copy_last;
    needed += step.new_blocks + step.copy_last;
    steps.push_back(step);
  }
  if (needed > num_free()) throw PoolFull(needed, num_free());
  std::vector<BlockCopy> copies;
  copies.reserve(num_copies);
  for (const Step& step : steps) {
    std::vector<int32_t>& blocks = step.sequence->blocks;
    const size_t size = blocks.size() + step.new_blocks;
    if (size > blocks.capacity()) blocks.reserve(std::max(size, 2 * blocks.capacity()));
  }

  // Act: nothing below throws.
  for (size_t i = 0; i < steps.size(); ++i) {
    Sequence& sequence = *steps[i].sequence;
    if (steps[i].copy_last) {
      const BlockCopy copy{sequence.blocks.back(), take_block()};
      release_block(copy.src);
      sequence.blocks.back() = copy.dst;
      copies.push_back(copy);
    }
    for (int64_t n = 0; n < steps[i].new_blocks; ++n) sequence.blocks.push_back(take_block());
    sequence.length += counts[i];
  }
  return copies;
}

void PagePool::truncate(int64_t seq, int64_t length) {
  Sequence& sequence = get(seq);
  require(length >= 0 && length <= sequence.length,
          "cannot truncate sequence " + str(seq) + " to " + str(length) + " tokens: it holds " + str(sequence.length));
  const int64_t kept = blocks_for(length);
  while (static_cast<int64_t>(sequence.blocks.size()) > kept) {
    release_block(sequence.blocks.back());
    sequence.blocks.pop_back();
  }
  sequence.length = length;
}

void PagePool::free(int64_t seq) {
  for (const int32_t block : get(seq).blocks) release_block(block);
  sequences_.erase(seq);
}

std::vector<int64_t> PagePool::slots(int64_t seq, int64_t begin, int64_t end) const {
  const Sequence& sequence = get(seq);
  require(
      begin >= 0 && begin <= end && end <= sequence.length,
      "tokens [" + str(begin) + ", " + str(end) + ") of sequence " + str(seq) + ": it holds " + str(sequence.length));
  std::vector<int64_t> slots;
  slots.reserve(end - begin);
  for (int64_t t = begin; t < end; ++t) {
    slots.push_back(sequence.blocks[t / block_size_] * block_size_ + t % block_size_);
  }
  return slots;
}

std::vector<int64_t> PagePool::sequences() const {
  std::vector<int64_t> ids;
  ids.reserve(sequences_.size());
  for (const auto& [id, sequence] : sequences_) ids.push_back(id);
  std::sort(ids.begin(), ids.end());
  return ids;
}

int64_t PagePool::ref_count(int64_t block) const {
  require(block >= 0 && block < num_blocks(), "block " + str(block) + ": the pool holds " + str(num_blocks()));
  return refs_[block];
}

void PagePool::check_invariants() const {
  const auto check = [](bool condition, const std::string& message) {
    if (!condition) throw std::logic_error("the page pool is corrupt: " + message);
  };
  std::vector<int32_t> refs(refs_.size(), 0);
  struct Place {
    size_t index;      // of the block in its sequence
    int32_t previous;  // block before it, -1 for none
  };
  std::unordered_map<int32_t, Place> places;
  for (const auto& [id, sequence] : sequences_) {
    check(id < next_id_, "sequence " + str(id) + " has an id that was not handed out");
    check(static_cast<int64_t>(sequence.blocks.size()) == blocks_for(sequence.length),
          "sequence " + str(id) + " of " + str(sequence.length) + " tokens has " + str(sequence.blocks.size()) +
              " blocks");
    std::unordered_set<int32_t> own;
    for (size_t i = 0; i < sequence.blocks.size(); ++i) {
      const int32_t block = sequence.blocks[i];
      check(block >= 0 && block < num_blocks(), "sequence " + str(id) + " names block " + str(block));
      check(own.insert(block).second, "sequence " + str(id) + " names block " + str(block) + " twice");
      const Place place{i, i == 0 ? -1 : sequence.blocks[i - 1]};
      const Place& first = places.emplace(block, place).first->second;
      check(first.index == place.index && first.previous == place.previous,
            "block " + str(block) + " is shared by sequences that differ before it");
      ++refs[block];
    }
  }
  std::vector<bool> is_free(refs_.size(), false);
  for (const int32_t block : free_) {
    check(block >= 0 && block < num_blocks(), "block " + str(block) + " is in the free list");
    check(!is_free[block], "block " + str(block) + " is twice in the free list");
    is_free[block] = true;
  }
  for (size_t block = 0; block < refs_.size(); ++block) {
    check(refs_[block] == refs[block], "block " + str(block) + " counts " + str(refs_[block]) + " references, " +
                                           str(refs[block]) + " sequences hold it");
    check(is_free[block] == (refs[block] == 0),
          "block " + str(block) + (is_free[block] ? " is held and free" : " is lost"));
  }
  check(std::is_heap(free_.begin(), free_.end(), std::greater<>()), "the free list is out of order");
}

const PagePool::Sequence& PagePool::get(int64_t seq) const {
  const auto it = sequences_.find(seq);
  if (it == sequences_.end()) throw UnknownSequence(seq);
  return it->second;
}

int32_t PagePool::take_block() {
  std::pop_heap(free_.begin(), free_.end(), std::greater<>());
  const int32_t block = free_.back();
  free_.pop_back();
  refs_[block] = 1;
  return block;
}

void PagePool::release_block(int32_t block) {
  if (--refs_[block] > 0) return;
  free_.push_back(block);
  std::push_heap(free_.begin(), free_.end(), std::greater<>());
}

}  // namespace unique_attn
