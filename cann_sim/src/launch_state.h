// One launch: its configuration, the device memory it may access, and its cores' results.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cann_sim/cost_model.h"
#include "hazards.h"

namespace cann_sim {

struct Config {
  bool check = true;
  int trace_core = -1;
  int threads = 0;  // 0: as many as the host has
  double bandwidth_scale = 1, vector_scale = 1, scalar_scale = 1;
  std::vector<PlaceTable::Removed> removed;
};

// An allocation of device memory. Launches share it, so the registry's lock protects `written`.
struct Allocation {
  uint64_t start, bytes;
  bool all_written;
  ByteSet written;
  bool part = false;                  // part of another allocation
  std::shared_ptr<Allocation> whole;  // that allocation, or null
};

// An allocation used by a launch: found when the launch is enqueued; its written bytes are loaded when it runs.
struct Buffer {
  uint64_t start, end;
  std::shared_ptr<Allocation> allocation;
  bool all_written = false;
  ByteSet written;
};

struct Error {
  std::string kind, file, message;
  int line = 0;
  explicit operator bool() const { return !kind.empty(); }
};

// A read of device memory that neither an earlier launch nor this core has written. Writes of the launch's other cores
// are only known after all have run.
struct UnwrittenRead {
  bool found = false;
  uint64_t start = 0, end = 0;
  uint16_t place = 0;
};

struct Interval {
  Pipe pipe;
  uint16_t place;
  double start, end;
};

// A core's use of device memory, for the comparison between cores. Kind `line` is a whole 64-byte cache line, used by a
// scalar write.
struct GmUse {
  uint64_t start, end;
  enum class Kind : uint8_t { read, write, line } kind;
  uint16_t place;
  uint32_t core;
};

struct CoreResult {
  Error error;
  UnwrittenRead unwritten;
  uint64_t read_bytes = 0, written_bytes = 0;
  uint64_t instructions[kPipes] = {};
  double busy[kPipes] = {};
  double time = 0;
  std::vector<GmUse> uses;
  std::vector<PlaceEntry> places;
  std::vector<Interval> trace;
};

struct Launch {
  const char* kernel;
  uint32_t blocks;
  void (*run)(void* args);
  void* args;
  Config config;
  CostModel cost;
  std::vector<Buffer> buffers;
  std::vector<CoreResult> results;
  Error error;
  int error_core = -1;
};

constexpr uint32_t kMaxCores = 48;  // vector cores of the largest Atlas A2 and A3 parts

// Runs all cores and fills in `results` and `error`.
void run_cores(Launch& launch);
// Checks the cores' uses of device memory for conflicts; sets the launch's error.
void check_across_cores(Launch& launch);
std::string report_json(const Launch& launch);
std::string place_text(const PlaceEntry& place);

}  // namespace cann_sim
