// Packed sequences, the layout of training: tokens of all sequences one after another, no padding.
#pragma once

#include "core/types.h"

namespace unique_attn {

struct PackedSequences {
  const int32_t* cu_seqlens;  // [B + 1] first token of each sequence, and the number of tokens N at the end
  int batch;                  // B
  int total_tokens;           // N
  int max_seqlen;             // host-known upper bound of the sequence lengths
  int page_size;              // pages start at each sequence's start
};

// The index of a packed batch has one entry per page slot. Slots are numbered so that no prefix sum over page counts is
// needed: sequence b owns the slots from cu_seqlens[b] / page_size + b on; its ceil(len / page_size) pages fit before
// the slots of sequence b + 1.
UA_HD int page_slot(int cu_seqlen, int b, int page_size, int page) { return cu_seqlen / page_size + b + page; }
UA_HD int num_page_slots(int total_tokens, int batch, int page_size) { return total_tokens / page_size + batch; }

// The sequence of a token: the last one that starts at or before it and is not empty.
UA_HD int sequence_of(const PackedSequences& seqs, int token) {
  int low = 0, high = seqs.batch;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (seqs.cu_seqlens[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Candidate pages of a query at `position`: complete pages that are neither sink nor recent; only they have a gate.
UA_HD PageRange candidate_pages(int position, int page_size, int sink_pages, int recent_pages) {
  const int own = position / page_size;
  const int end = own - recent_pages + 1;
  return {sink_pages, end > sink_pages ? (end < own ? end : own) : sink_pages};
}

}  // namespace unique_attn
