// Keys in pages, found through a table, and which of them a row may select. Plain structs and
// functions without torch, for the CPU and the CUDA kernels. Tables and lengths are data, never
// trusted.
//
// A paged call is the call on packed keys in which every sequence has `room` for all pages of its
// row of the table, rounded up to whole blocks: token t of sequence s has the number s * room + t,
// and block j the number s * room / B + j. No memory is that large; numbers only say what is meant.
#pragma once

#include "windows.h"

namespace hisa {

// Pages of sequences.
struct PageTable {
  const int32_t* ids;  // [sequences, width], rows `stride` elements apart
  const int32_t* lengths;  // [sequences], tokens
  int64_t sequences;
  int64_t width;
  int64_t stride;
  int64_t pages;  // that exist: other ids are none

  // Id of a sequence's page `i`, negative if there is none.
  HISA_HOST_DEVICE int64_t page(int64_t sequence, int64_t i) const {
    if (i >= width) return -1;
    const int64_t id = ids[sequence * stride + i];
    return id < pages ? id : -1;
  }

  // Tokens of a sequence: it ends where its row of the table does, or before a page that is none.
  HISA_HOST_DEVICE int64_t length(int64_t sequence, int64_t page_size) const {
    const int64_t wanted = lengths[sequence];
    for (int64_t i = 0; i * page_size < wanted; ++i)
      if (page(sequence, i) < 0) return i * page_size;
    return wanted < 0 ? 0 : wanted;
  }
};

// Keys that the pages of a table hold: those of tokens, or pooled ones, of which a page has one.
struct PagedKeys {
  const void* data;  // [pages, page_size, dim] of `type`, pages `stride` bytes apart
  const void* scale;  // [pages, page_size] fp32, pages `scale_stride` bytes apart; null: all 1
  int64_t stride, scale_stride;
  int64_t page_size;  // keys of a page
  int64_t entries;  // of the table that belong to one page: the last of them is its id
  int64_t room;  // keys of a sequence
  int64_t count;  // of all sequences
  int64_t dim;
  ElementType type;
  PageTable table;
};

// A paged row sees what lies before it, and itself.
struct PagedWindows {
  int64_t next_n;  // rows per sequence: its last tokens
};

struct PagedPoolParams {
  PagedKeys keys;
  void* pooled;  // [pages, dim] of the keys' type, rows `pooled_stride` bytes apart
  float* pooled_scale;  // [pages] fp32, `scale_stride` elements apart
  int64_t pooled_stride, scale_stride;
  int64_t block_size;
  int64_t new_tokens;  // only blocks that a sequence's last `new_tokens` tokens complete
  Pooling pooling;
};

struct PagedIndexParams {
  Queries queries;
  PagedKeys keys;
  PagedKeys pooled;
  PagedWindows windows;
  Output output;
  int64_t block_size;
  int64_t block_topk;
  bool physical;  // indices are page id * page_size + place in the page, in order of position
};

// Row m's window, in numbers of tokens.
HISA_HOST_DEVICE inline Row find_row(const PagedWindows& windows, const PagedKeys& keys,
                                     int64_t m) {
  const int64_t sequence = m / windows.next_n;
  const int64_t origin = sequence * keys.room;
  const int64_t later = windows.next_n - 1 - m % windows.next_n;  // rows behind this one
  return {origin, origin + keys.table.length(sequence, keys.page_size) - later, origin};
}

}  // namespace hisa
