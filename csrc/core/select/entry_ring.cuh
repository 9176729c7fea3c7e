// Entries of the page index on their way to a warp: copied to shared memory by the warp itself (cp.async), a tile of
// pages at a time and some tiles ahead, without a barrier of the thread block. Entries of neighbouring pages of a block
// lie together in memory as a rule, so a tile is a few long pieces, each copied by an equal share of the lanes.
#pragma once

#include <climits>

#include "core/cuda/mma.cuh"
#include "core/select/page_scores_common.cuh"

namespace unique_attn {

// How the entries of a tile lie in memory; what a thread block need not divide for.
struct EntryPieces {
  int pages_log2;  // of a piece, whose entries follow each other
  int num_blocks;
  int table_pages;              // of a block of the table
  int step_blocks, step_pages;  // from a tile of a warp to its next
};

inline EntryPieces entry_pieces(const PageScoresParams& p, int tile_pages, int step) {
  const int64_t entry_bytes = index_entry_bytes(p.rule, p.index.format, p.dtype, p.head_dim);
  EntryPieces pieces;
  pieces.num_blocks = p.table.num_blocks;
  pieces.table_pages = p.table.block_size / p.table.page_size;
  pieces.step_blocks = step / pieces.table_pages;
  pieces.step_pages = step % pieces.table_pages;
  pieces.pages_log2 = 0;
  while (p.index.stride_page == entry_bytes && 2 << pieces.pages_log2 <= tile_pages &&
         pieces.table_pages % (2 << pieces.pages_log2) == 0) {
    ++pieces.pages_log2;
  }
  return pieces;
}

// Tiles of 16 or 32 pages, each kStep pages after the one before.
template <typename Row, int kPages, int kStep, int kStages>
class EntryRing {
 public:
  // Shared memory of a warp.
  static UA_HD constexpr int bytes(int head_dim) { return kStages * kPages * Row::entry_bytes(head_dim); }

  // `page`: the first of the warp's first tile. `shared` begins at a multiple of 16.
  __device__ __forceinline__ EntryRing(const PageScoresParams& p, const ScoreTile& tile, const EntryPieces& pieces,
                                       uint8_t* shared, int page)
      : pieces_(pieces),
        stride_block_(static_cast<unsigned>(p.index.stride_block)),
        stride_page_(static_cast<unsigned>(p.index.stride_page)),
        entry_bytes_(Row::entry_bytes(p.head_dim)),
        end_(min(tile.seen.end, tile.page_end)),
        shared_(shared) {
    const int lane = threadIdx.x % kWarp;
    const int lanes_log2 = pieces.pages_log2 + kLanesLog2;  // of a piece
    const int piece = lane >> lanes_log2;
    const int at = (lane & ((1 << lanes_log2) - 1)) * kChunk;
    const int bytes = entry_bytes_ << pieces.pages_log2;
    step_ = kChunk << lanes_log2;
    copies_ = (bytes - at + step_ - 1) >> (lanes_log2 + kChunkLog2);
    to_ = piece * bytes + at;
    entries_ = p.index.data + tile.head * p.index.stride_head + at;
    table_ = p.table.blocks + tile.b * p.table.stride_seq;
    asm volatile("" : "+l"(entries_), "+l"(table_));  // or they are computed again for every tile
    page_ = page + (piece << pieces.pages_log2);
    block_ = page_ / pieces.table_pages;
    within_ = page_ - block_ * pieces.table_pages;
    first_ = max(tile.seen.first, tile.page_begin) - (1 << pieces.pages_log2);
    look_up();
#pragma unroll
    for (int i = 0; i < kStages; ++i) copy();
  }

  // Waits for the next tile. Entries of pages that no token sees hold anything.
  __device__ __forceinline__ void wait() {
    copy_async_wait<kStages - 1>();
    __syncwarp();
  }
  __device__ __forceinline__ const uint8_t* entry(int page_of_tile) const {
    return shared_ + stage_ + page_of_tile * entry_bytes_;
  }
  // The tile has been read; the next one that is not under way takes its place.
  __device__ __forceinline__ void next() {
    __syncwarp();
    copy();
  }

 private:
  static_assert(kPages == 16 || kPages == 32, "a page has one lane or two");
  static constexpr int kLanesLog2 = kPages == 32 ? 0 : 1;
  static constexpr int kChunkLog2 = 4, kChunk = 1 << kChunkLog2;  // bytes of a copy
  static constexpr int kMaxBytes = kPages * Row::entry_bytes(Row::kHeadDim);
  static constexpr int kCopies = (kMaxBytes + kWarp * kChunk - 1) / (kWarp * kChunk);  // of a lane

  static constexpr int kUnseen = INT_MIN;

  // The block of this lane's piece of the tile to copy next, or kUnseen if nobody sees it; such blocks are not looked
  // up: the table ends with the sequence, and what a window left behind may be gone.
  __device__ __forceinline__ void look_up() {
    physical_block_ = page_ > first_ && page_ < end_ ? table_[block_] : kUnseen;
    offset_ = within_ * stride_page_;
    page_ += kStep;
    block_ += pieces_.step_blocks;
    within_ += pieces_.step_pages;
    if (within_ >= pieces_.table_pages) {
      within_ -= pieces_.table_pages;
      ++block_;
    }
  }
  // Copies the tile after those under way to the stage, which is free, and turns to the next stage.
  __device__ __forceinline__ void copy() {
    if (is_index(physical_block_, pieces_.num_blocks)) {
      // The product of unsigned 32-bit factors is one instruction.
      const uint8_t* from = entries_ + uint64_t{static_cast<unsigned>(physical_block_)} * stride_block_ + offset_;
      uint8_t* to = shared_ + stage_ + to_;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (i < copies_) copy_async16(to, from, true);
        from += step_;
        to += step_;
      }
    } else if (physical_block_ != kUnseen) {
      // No such block: its pages' scores are NaN, which all bits set make of every format.
      uint8_t* to = shared_ + stage_ + to_;
#pragma unroll 1
      for (int i = 0; i < copies_; ++i, to += step_) *reinterpret_cast<uint4*>(to) = make_uint4(~0u, ~0u, ~0u, ~0u);
    }
    copy_async_commit();
    look_up();
    const int tile_bytes = kPages * entry_bytes_;
    stage_ = stage_ == (kStages - 1) * tile_bytes ? 0 : stage_ + tile_bytes;
  }

  const EntryPieces& pieces_;
  const uint8_t* entries_;  // of the head
  const int32_t* table_;    // of the sequence
  const unsigned stride_block_, stride_page_;
  const int entry_bytes_;
  int first_;  // pages after this one and before `end_` are seen, if a piece counts as its first page
  const int end_;
  int step_, to_, copies_;     // of this lane
  int page_, block_, within_;  // of this lane's piece
  int physical_block_;
  unsigned offset_;
  uint8_t* const shared_;
  int stage_ = 0;  // where the next tile to read begins
};

}  // namespace unique_attn
