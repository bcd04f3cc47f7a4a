// csrc/tiling/row_plan.h by itself: plain C++17 that compiles without warnings, and whose plans are constant
// expressions. In those an overflow is an error, so the largest sizes are among them.
#include "tiling/row_plan.h"

#include <type_traits>

using namespace npu_xent;

static_assert(
    std::is_same_v<decltype(&plan_rows), XentPlan (*)(int64_t, int64_t, int64_t, bool, bool)>,
    "the plan depends on the rows, the columns, the dtype and whether there are a softcap and numbers by row, "
    "alone");
static_assert(std::is_trivially_copyable_v<XentPlan> && std::is_standard_layout_v<XentPlan>,
              "kernels take it by value");
static_assert(sizeof(XentPlan) == 7 * sizeof(int64_t), "without padding");

constexpr int64_t kMost = int64_t{1} << 31;
constexpr int64_t kDtypes = 3;

constexpr RowMode mode(int64_t rows, int64_t cols, int64_t dtype) {
  return static_cast<RowMode>(plan_rows(rows, cols, dtype).mode);
}

constexpr bool fits(int64_t rows, int64_t cols) {
  for (int64_t i = 0; i < 4 * kDtypes; ++i) {
    const int64_t dtype = i / 4;
    const bool softcap = i % 2 != 0, by_row = i / 2 % 2 != 0;
    const XentPlan p = plan_rows(rows, cols, dtype, softcap, by_row);
    const bool is_short = mode(rows, cols, dtype) == RowMode::short_rows;
    const int64_t bytes = is_short ? short_buffers(dtype, p.rows_per_tile, cols, softcap, by_row).total
                                   : long_buffers(dtype, p.chunk_cols, p.slots, softcap, by_row).total;
    const bool items = work_items(p, rows) >= 1 && chunk_items(p, rows) >= work_items(p, rows);
    if (bytes > kUbBytes || bytes % kDataBlock != 0 || !items) {
      return false;
    }
  }
  return true;
}

static_assert(mode(65536, 64, 0) == RowMode::short_rows);
static_assert(mode(4096, 8080, 1) == RowMode::resident);
static_assert(mode(2048, 128256, 2) == RowMode::streaming);
static_assert(mode(8, 151936, 2) == RowMode::split);
static_assert(fits(1, 1) && fits(4096, 32000) && fits(1, kMost) && fits(kMost, 1) && fits(kMost, kMost));
static_assert(chunk_items(plan_rows(kMost, kMost, 0), kMost) > kMost * 4);
static_assert(share_of(kMost * kMost / 4, kMaxCores - 1, kMaxCores).end == kMost * kMost / 4);

int main() {
  return 0;
}
