// The planner: how a device kernel cuts the logits. Shared by host and device; plain C++17 without torch or CANN.
//
// The cut depends only on the number of rows and columns, the dtype, and whether there are a softcap and numbers by row
// (a scale of the logits, an entropy, top1). The number of cores decides which core takes which piece, so results are
// bitwise the same on chips with 20, 24, 40 or 48 cores.
//
//   short      a tile holds several whole rows; one value a row is one lane of a vector
//   resident   a row stays in the unified buffer (UB) in chunks, from its statistics to its output: read once
//   streaming  a row passes through UB chunk by chunk, and once more for an output that needs its statistics
//   split      rows fewer than cores: streaming, with the chunks of one row shared out over several cores. Each part
//              yields statistics as a class shard does, reduce_rows joins them, and the gradient is a sweep of its own,
//              so a row that would fit UB is read twice here: it is cut only where two cores and more share it
#pragma once

#include <cstdint>

// Passed to kernels by value. Members are of fundamental types and the names are global: the toolkit's launcher
// generator wants both.
struct XentPlan {
  int64_t mode;             // RowMode
  int64_t rows_per_tile;    // short: rows in a tile
  int64_t chunk_cols;       // other modes: columns in a chunk, a multiple of kChunkUnit
  int64_t chunks;           // of a row
  int64_t parts;            // of a row, that cores share out; 1 unless split
  int64_t chunks_per_part;  // the last part may have fewer
  int64_t slots;            // chunks that UB holds at a time
};

// The members of XentPlan, f(name) for each: csrc/module.cpp tells Python the layout from this list.
#define XENT_PLAN_MEMBERS(f) f(mode) f(rows_per_tile) f(chunk_cols) f(chunks) f(parts) f(chunks_per_part) f(slots)

#define XENT_SIZE(name) +sizeof(XentPlan::name)
static_assert(sizeof(XentPlan) == 0 XENT_PLAN_MEMBERS(XENT_SIZE), "a member is not in the list, or there is padding");
#undef XENT_SIZE

// kernel_operator.h, included before, defines __aicore__ as a macro: device code may call these functions too.
#ifdef __aicore__
#define XENT_SHARED __aicore__ constexpr inline
#else
#define XENT_SHARED constexpr inline
#endif

namespace npu_xent {

enum class RowMode : int64_t { short_rows, resident, streaming, split };
enum class LogitsType : int64_t { fp32, fp16, bf16 };

// The unified buffer: 192 KiB, less 256 bytes and 8 KiB that the toolkit reserves (the latter for Select and
// reductions).
constexpr int64_t kUbBytes = 192 * 1024 - 256 - 8 * 1024;
constexpr int64_t kDataBlock = 32;  // bytes; what UB addresses are aligned to
constexpr int64_t kLanes = 64;      // fp32 numbers in one repeat of a vector instruction
constexpr int64_t kBlock = 8;       // fp32 numbers in a data block

constexpr int64_t kMaxCores = 48;      // of any supported part
constexpr int64_t kPartsEach = 5;      // parts of rows for each core when rows do not share out evenly
constexpr int64_t kShortCols = 1024;   // a row of at most so many columns is short
constexpr int64_t kMaxTileRows = 128;  // rows of a short tile
constexpr int64_t kChunkUnit = 512;    // two block reductions make whole instructions of so many numbers
constexpr int64_t kMaxChunk = 4096;    // columns of a chunk
constexpr int64_t kMinChunk = 1024;    // below, fixed costs of instructions outweigh what a second read costs
constexpr int64_t kStreamSlots = 6;    // chunks in flight when rows do not stay
constexpr int64_t kPrefetch = 2;       // chunks that are copied in ahead of the statistics
constexpr int64_t kOutputLag = 1;      // chunks by which outputs trail the end of their row's statistics
constexpr int64_t kExtraSlots = kPrefetch + kOutputLag + 2;  // besides the row itself; 2 for copies out
constexpr int64_t kFold = 32;                                // chunks whose statistics are joined at a time
constexpr int64_t kFactRows = 64;                            // rows whose targets and the like are held at a time
constexpr int64_t kZeroBytes = 4096;                         // zeros, for the gradient of ignored rows
constexpr int64_t kReduceRows = 256;                         // rows that one task of reduce_rows sums
constexpr int64_t kReduceWeights = 4096;                     // class weights that one task of reduce_rows sums
constexpr int64_t kScaleChunk = 8192;                        // numbers that scale takes at a time

XENT_SHARED int64_t div_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
XENT_SHARED int64_t round_up(int64_t a, int64_t b) {
  return div_up(a, b) * b;
}
XENT_SHARED int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
XENT_SHARED int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// Hands out consecutive pieces of UB.
struct Pieces {
  int64_t end;

  XENT_SHARED int64_t take(int64_t bytes) {
    const int64_t begin = end;
    end += round_up(bytes, kDataBlock);
    return begin;
  }
};

XENT_SHARED int64_t element_bytes(int64_t dtype) {
  return dtype == static_cast<int64_t>(LogitsType::fp32) ? 4 : 2;
}

// Byte offsets of the buffers of the kernels for long rows (all modes except short) in UB.
struct LongBuffers {
  int64_t ring, work, weight, zeros;  // chunks; two of `work`
  int64_t reduced;                    // results of the first block reduction of a chunk, then of the second
  int64_t max_out;                    // two maxima on their way to the scalar unit
  int64_t chunk_max, chunk_sum, chunk_wsum, chunk_weight;  // two rows of [kFold], every second number
  int64_t fold, row_sum;                                   // of a fold
  int64_t target, picked, target_weight;                   // facts: the last two a data block a row
  int64_t lse, lse_low, grad_loss, grad_z_loss;            // facts of a backward
  int64_t out_lse, out_lse_low, out_picked, out_wsum, out_weight;
  int64_t cap, cap_mask, capped;  // with a softcap: scratch [chunk_cols], a bit for half of these; targets' logits
  int64_t row_scale, entropy, grad_entropy;       // by row: facts
  int64_t chunk_tilted, fold_tilted, row_tilted;  // by row: as chunk_sum, fold and row_sum
  int64_t out_entropy, out_top1;
  int64_t total;
};

XENT_SHARED LongBuffers long_buffers(int64_t dtype, int64_t chunk_cols, int64_t slots, bool softcap = false,
                                     bool by_row = false) {
  LongBuffers b{};
  Pieces ub{};
  b.ring = ub.take(slots * chunk_cols * element_bytes(dtype));
  b.work = ub.take(2 * chunk_cols * 4);
  b.weight = ub.take(chunk_cols * 4);
  b.zeros = ub.take(kZeroBytes);
  b.reduced = ub.take((kMaxChunk / kBlock + kLanes) * 4);
  b.max_out = ub.take(2 * kDataBlock);
  b.chunk_max = ub.take(2 * kLanes * 4);
  b.chunk_sum = ub.take(2 * kLanes * 4);
  b.chunk_wsum = ub.take(2 * kLanes * 4);
  b.chunk_weight = ub.take(2 * kLanes * 4);
  b.fold = ub.take(kLanes * 4);
  b.row_sum = ub.take(kDataBlock);
  b.target = ub.take(kFactRows * 8);
  b.picked = ub.take(kFactRows * kDataBlock);
  b.target_weight = ub.take(kFactRows * kDataBlock);
  b.lse = ub.take(kFactRows * 4);
  b.lse_low = ub.take(kFactRows * 4);
  b.grad_loss = ub.take(kFactRows * 4);
  b.grad_z_loss = ub.take(kFactRows * 4);
  b.out_lse = ub.take(kFactRows * 4);
  b.out_lse_low = ub.take(kFactRows * 4);
  b.out_picked = ub.take(kFactRows * 4);
  b.out_wsum = ub.take(kFactRows * 4);
  b.out_weight = ub.take(kFactRows * 4);
  if (softcap) {
    b.cap = ub.take(chunk_cols * 4);
    b.cap_mask = ub.take(chunk_cols / 2 / 8);
    b.capped = ub.take(kFactRows * 4);
  }
  if (by_row) {
    b.row_scale = ub.take(kFactRows * 4);
    b.entropy = ub.take(kFactRows * 4);
    b.grad_entropy = ub.take(kFactRows * 4);
    b.chunk_tilted = ub.take(2 * kLanes * 4);
    b.fold_tilted = ub.take(kLanes * 4);
    b.row_tilted = ub.take(kDataBlock);
    b.out_entropy = ub.take(kFactRows * 4);
    b.out_top1 = ub.take(kFactRows * 4);
  }
  b.total = ub.end;
  return b;
}

// A row in a short tile takes so many columns, a whole number of data blocks in fp32 and in the logits' dtype.
XENT_SHARED int64_t short_row_cols(int64_t dtype, int64_t cols) {
  return round_up(cols, kDataBlock / element_bytes(dtype));
}

// What the kernel for short rows keeps in UB for tiles of [rows, cols]: two queue buffers each for tiles coming in,
// tiles going out and what comes in a row at a time, and the rest at these byte offsets.
struct ShortBuffers {
  int64_t tile_bytes, row_bytes;   // of one queue buffer
  int64_t tile;                    // numbers of a tile in fp32
  int64_t x, exps;                 // the tile in fp32, its exponentials
  int64_t hot;                     // one bit an element: is it the target's?
  int64_t columns, weight, floor;  // [cols] column numbers, class weights, and 0 where these are 0, else -inf
  int64_t parts;                   // of reductions: a data block for each row and 64 columns
  int64_t block;                   // a data block a row: the row's value eight times
  int64_t mask;                    // one bit a row
  int64_t target;                  // [rows] int64
  int64_t target_weight;           // a data block a row
  int64_t lanes;                   // kShortLanes vectors [rows], and kLanesByRow more
  int64_t cap;                     // with a softcap: another tile in fp32
  int64_t rest;                    // bytes of these
  int64_t total;
};

constexpr int64_t kShortLanes = 28, kLanesByRow = 4;
constexpr int64_t kShortOperands = 4, kOperandsByRow = 3;  // vectors [rows] that come in with a tile

XENT_SHARED ShortBuffers short_buffers(int64_t dtype, int64_t rows, int64_t cols, bool softcap = false,
                                       bool by_row = false) {
  ShortBuffers b{};
  Pieces ub{};
  const int64_t padded = short_row_cols(dtype, cols), width = round_up(padded, kLanes);
  const int64_t lanes = round_up(rows, kLanes);
  b.tile = softcap ? round_up(rows * padded, kLanes) : rows * padded;  // a comparison takes whole instructions
  b.tile_bytes = round_up(rows * padded * element_bytes(dtype), kDataBlock);
  b.row_bytes = (kShortOperands + (by_row ? kOperandsByRow : 0)) * lanes * 4;
  b.x = ub.take(b.tile * 4);
  b.exps = ub.take(b.tile * 4);
  b.hot = ub.take(width / kLanes * lanes * 8);
  b.columns = ub.take(width * 4);
  b.weight = ub.take(width * 4);
  b.floor = ub.take(width * 4);
  b.parts = ub.take(larger(1, cols / kLanes) * rows * kDataBlock);
  b.block = ub.take(lanes * kDataBlock);
  b.mask = ub.take(lanes / 8);
  b.target = ub.take(lanes * 8);
  b.target_weight = ub.take(rows * kDataBlock);
  b.lanes = ub.take((kShortLanes + (by_row ? kLanesByRow : 0)) * lanes * 4);
  b.cap = softcap ? ub.take(b.tile * 4) : 0;
  b.rest = ub.end;
  b.total = b.rest + 2 * (b.tile_bytes + b.tile_bytes + b.row_bytes);
  return b;
}

// Rows of a tile: as many as UB holds, then evened out so that kMaxCores cores get the same number of tiles of about
// the same size.
XENT_SHARED int64_t short_tile_rows(int64_t rows, int64_t cols, int64_t dtype, bool softcap, bool by_row) {
  int64_t most = smaller(kMaxTileRows, div_up(rows, kMaxCores));
  while (most > 1 && short_buffers(dtype, most, cols, softcap, by_row).total > kUbBytes) {
    --most;
  }
  const int64_t tiles_each = div_up(rows, kMaxCores * most);
  return div_up(rows, kMaxCores * tiles_each);
}

XENT_SHARED bool fits_resident(int64_t cols, int64_t dtype, int64_t chunk_cols, bool softcap, bool by_row) {
  return long_buffers(dtype, chunk_cols, div_up(cols, chunk_cols) + kExtraSlots, softcap, by_row).total <= kUbBytes;
}

// Into how many parts to cut a row so that kMaxCores cores share it out best. A row that fits in UB pays for parts with
// its second read, so it is cut only if each row gets two cores or more; a row that does not is cut so fine that cores
// differ little.
XENT_SHARED int64_t parts_worth_having(int64_t rows, bool fits) {
  if (rows >= kMaxCores || (fits && 2 * rows > kMaxCores)) {
    return 1;
  }
  return fits || kMaxCores % rows == 0 ? kMaxCores / rows : div_up(kPartsEach * kMaxCores, rows);
}

// The plan for logits [rows, cols], rows > 0 and cols > 0.
XENT_SHARED XentPlan plan_rows(int64_t rows, int64_t cols, int64_t dtype, bool softcap = false, bool by_row = false) {
  XentPlan p{};
  p.parts = 1;
  if (cols <= kShortCols) {
    p.mode = static_cast<int64_t>(RowMode::short_rows);
    p.rows_per_tile = short_tile_rows(rows, cols, dtype, softcap, by_row);
    p.chunk_cols = cols;
    p.chunks = p.chunks_per_part = 1;
    p.slots = 2;
    return p;
  }
  int64_t width = smaller(kMaxChunk, round_up(cols, kChunkUnit));
  while (width >= kMinChunk && !fits_resident(cols, dtype, width, softcap, by_row)) {
    width -= kChunkUnit;
  }
  // An entropy, top1 or their gradient come from sweeps with statistics alone or an output alone: no row has to stay,
  // and wider chunks cost less.
  const bool fits = width >= kMinChunk, stays = fits && !by_row;
  if (!stays) {
    width = kMaxChunk;
  }
  const int64_t wanted_parts = parts_worth_having(rows, fits);
  const bool split = wanted_parts > 1;
  if (split) {
    // So many chunks a part, and then all parts about as long.
    const int64_t each = div_up(div_up(cols, kMaxChunk), wanted_parts);
    width = larger(kMinChunk, round_up(div_up(cols, wanted_parts * each), kChunkUnit));
  }
  p.chunks = div_up(cols, width);
  p.chunk_cols = round_up(div_up(cols, p.chunks), kChunkUnit);  // chunks of one size
  p.chunks = div_up(cols, p.chunk_cols);
  p.chunks_per_part = p.chunks;
  p.mode = static_cast<int64_t>(stays ? RowMode::resident : RowMode::streaming);
  p.slots = stays ? p.chunks + kExtraSlots : kStreamSlots;
  if (split && p.chunks > 1) {
    p.mode = static_cast<int64_t>(RowMode::split);
    p.chunks_per_part = div_up(p.chunks, smaller(p.chunks, wanted_parts));
    p.parts = div_up(p.chunks, p.chunks_per_part);
    p.slots = kStreamSlots;
  }
  return p;
}

// Items [begin, end) of `total` for one core of `cores`: contiguous, and the cores' numbers differ by one at most.
struct Share {
  int64_t begin, end;
};

XENT_SHARED Share share_of(int64_t total, int64_t core, int64_t cores) {
  const int64_t each = total / cores, rest = total % cores;
  const int64_t begin = core * each + smaller(core, rest);
  return {begin, begin + each + (core < rest ? 1 : 0)};
}

// The number of items that cores share out: tiles, rows or parts of rows; for a gradient of long rows, chunks.
XENT_SHARED int64_t work_items(const XentPlan& p, int64_t rows) {
  return p.mode == static_cast<int64_t>(RowMode::short_rows) ? div_up(rows, p.rows_per_tile) : rows * p.parts;
}
XENT_SHARED int64_t chunk_items(const XentPlan& p, int64_t rows) {
  return p.mode == static_cast<int64_t>(RowMode::short_rows) ? work_items(p, rows) : rows * p.chunks;
}

}  // namespace npu_xent
