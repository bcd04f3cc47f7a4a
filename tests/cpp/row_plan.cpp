// The planner of csrc/tiling/row_plan.h on a grid of shapes: its plans fit a core's memory and cover the logits once,
// and are the same on every architecture.
//   row_plan --write FILE    puts all answers into a file
//   row_plan --expect FILE   compares them with a file that another architecture has written
#include "tiling/row_plan.h"

#include <cstddef>
#include <fstream>
#include <sstream>
#include <string>

#include "check.h"
#include "tiling/row_args.h"

namespace {

using namespace npu_xent;
using test::check;

constexpr int64_t kRows[] = {1,
                             2,
                             3,
                             5,
                             8,
                             17,
                             23,
                             24,
                             25,
                             31,
                             47,
                             48,
                             49,
                             63,
                             96,
                             97,
                             128,
                             240,
                             957,
                             4096,
                             6038,
                             6144,
                             19138,
                             65536,
                             200000,
                             int64_t{1} << 31,
                             (int64_t{1} << 32) + 5,
                             (int64_t{1} << 33) - 1};
constexpr int64_t kCols[] = {1,
                             2,
                             7,
                             8,
                             9,
                             21,
                             63,
                             64,
                             65,
                             97,
                             500,
                             1000,
                             1023,
                             1024,
                             1025,
                             1536,
                             1537,
                             1833,
                             4095,
                             4096,
                             4097,
                             8000,
                             14127,
                             29951,
                             34816,
                             34817,
                             52211,
                             74752,
                             74753,
                             112595,
                             1 << 17,
                             128256,
                             151936,
                             152000,
                             1000003,
                             int64_t{1} << 31,
                             (int64_t{1} << 32) + 5,
                             (int64_t{1} << 33) - 1};

void check_plan(int64_t rows, int64_t cols, const XentPlan& p, int64_t ub_bytes) {
  const auto is = [&](RowMode mode) { return p.mode == static_cast<int64_t>(mode); };
  check(ub_bytes > 0 && ub_bytes <= kUbBytes, "%lld bytes do not fit", static_cast<long long>(ub_bytes));
  check((p.chunks - 1) * p.chunk_cols < cols && cols <= p.chunks * p.chunk_cols,
        "chunks do not cover the columns once");
  check((p.parts - 1) * p.chunks_per_part < p.chunks && p.chunks <= p.parts * p.chunks_per_part,
        "parts do not cover the chunks once");
  check((p.parts > 1) == is(RowMode::split), "%lld parts in mode %lld", static_cast<long long>(p.parts),
        static_cast<long long>(p.mode));
  check(is(RowMode::short_rows) == (cols <= kShortCols), "%lld columns in mode %lld", static_cast<long long>(cols),
        static_cast<long long>(p.mode));
  if (is(RowMode::short_rows)) {
    const int64_t tiles = work_items(p, rows);
    check(p.rows_per_tile >= 1 && p.rows_per_tile <= kMaxTileRows, "%lld rows in a tile",
          static_cast<long long>(p.rows_per_tile));
    check((tiles - 1) * p.rows_per_tile < rows && rows <= tiles * p.rows_per_tile, "tiles do not cover the rows once");
  } else {
    check(p.chunk_cols % kChunkUnit == 0 && p.chunk_cols <= kMaxChunk, "%lld columns in a chunk",
          static_cast<long long>(p.chunk_cols));
    check(work_items(p, rows) == rows * p.parts && chunk_items(p, rows) == rows * p.chunks, "items are not counted");
  }
  check(!is(RowMode::resident) || p.slots == p.chunks + kExtraSlots, "%lld slots for %lld chunks",
        static_cast<long long>(p.slots), static_cast<long long>(p.chunks));
}

void check_shares(int64_t total) {
  for (const int64_t cores : {1, 20, 24, 40, 48}) {
    int64_t end = 0, least = total, most = 0;
    for (int64_t core = 0; core < cores; ++core) {
      const Share share = share_of(total, core, cores);
      check(share.begin == end, "core %lld of %lld begins at %lld", static_cast<long long>(core),
            static_cast<long long>(cores), static_cast<long long>(share.begin));
      end = share.end;
      least = smaller(least, share.end - share.begin);
      most = larger(most, share.end - share.begin);
    }
    check(end == total && most - least <= 1, "shares of %lld", static_cast<long long>(total));
  }
}

std::string all_answers() {
  std::ostringstream lines;
  lines << "XentPlan has " << sizeof(XentPlan) << " bytes, XentArgs " << sizeof(XentArgs) << ", logit_scale at "
        << offsetof(XentArgs, logit_scale) << "\n";
  for (const int64_t rows : kRows) {
    for (const int64_t cols : kCols) {
      for (int64_t i = 0; i < 12; ++i) {
        const int64_t dtype = i / 4;
        const bool softcap = i % 2 != 0, by_row = i / 2 % 2 != 0;
        const XentPlan p = plan_rows(rows, cols, dtype, softcap, by_row);
        const bool is_short = p.mode == static_cast<int64_t>(RowMode::short_rows);
        const int64_t bytes = is_short ? short_buffers(dtype, p.rows_per_tile, cols, softcap, by_row).total
                                       : long_buffers(dtype, p.chunk_cols, p.slots, softcap, by_row).total;
        std::ostringstream shape;
        shape << "[" << rows << ", " << cols << "] dtype " << dtype << (softcap ? " softcap" : "")
              << (by_row ? " by row" : "");
        test::context = shape.str();
        check_plan(rows, cols, p, bytes);
        check_shares(work_items(p, rows));
        check_shares(chunk_items(p, rows));
        const Share last = share_of(chunk_items(p, rows), kMaxCores - 1, kMaxCores);
        lines << shape.str() << ": mode " << p.mode << " rows_per_tile " << p.rows_per_tile << " chunk_cols "
              << p.chunk_cols << " chunks " << p.chunks << " parts " << p.parts << " chunks_per_part "
              << p.chunks_per_part << " slots " << p.slots << " bytes " << bytes << " work_items "
              << work_items(p, rows) << " chunk_items " << chunk_items(p, rows) << " last core [" << last.begin << ", "
              << last.end << ")\n";
      }
    }
  }
  return lines.str();
}

void compare(const std::string& answers, const char* path) {
  std::ifstream file(path);
  std::istringstream ours(answers);
  std::string line, expected;
  int64_t lines = 0;
  test::context = std::string("beside ") + path;
  while (std::getline(ours, line)) {
    std::getline(file, expected);
    check(file && line == expected, "\n  here:  %s\n  there: %s", line.c_str(), file ? expected.c_str() : "nothing");
    ++lines;
  }
  check(lines > 1 && !std::getline(file, expected), "the file has more than %lld lines", static_cast<long long>(lines));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string option = argc == 3 ? argv[1] : "";
  if (option != "--write" && option != "--expect") {
    std::fprintf(stderr, "usage: row_plan --write FILE | --expect FILE\n");
    return 2;
  }
  const std::string answers = all_answers();
  if (option == "--expect") {
    compare(answers, argv[2]);
  } else {
    test::context = argv[2];
    check(static_cast<bool>(std::ofstream(argv[2]) << answers << std::flush), "cannot be written");
  }
  return test::finish("row_plan");
}
