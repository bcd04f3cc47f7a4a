// The state of a running core.
#pragma once

#include <deque>
#include <vector>

#include "cann_sim/pipe.h"
#include "cann_sim/queue.h"
#include "launch_state.h"

namespace cann_sim {

constexpr int kEvents = static_cast<int>(AscendC::HardEvent::MAX);
constexpr int kEventIds = 8;

struct Flag {
  bool set = false, by_queue = false;
  Clock clock;
  double time = 0;
  uint16_t place = 0;
  // The last WaitFlag: its sequence number on the waiting pipe, and its place. While the flag is set again, `overtakes`
  // is that place if nothing orders this SetFlag after that WaitFlag, else 0.
  uint32_t wait_seq = 0;
  uint16_t wait_place = 0, overtakes = 0;
};

// One buffer of a queue, and the state of its tensor.
struct QueueBuffer {
  enum class State : uint8_t { idle, allocated, queued, dequeued } state = State::idle;
  uint32_t address = 0, bytes = 0;
  // The flag that orders DeQue after EnQue, then the next AllocTensor after FreeTensor; id < 0 if there is none.
  AscendC::HardEvent event = AscendC::HardEvent::MAX;
  int8_t id = -1;
  uint16_t place = 0;  // of the last AllocTensor, EnQue, DeQue or FreeTensor
  uint64_t turn = 0;   // when it became idle: AllocTensor takes the buffer that has been idle longest
};

// The UB allocated by one InitBuffer.
struct TakenUb {
  AscendC::TPosition position;
  uint32_t count, bytes;  // buffers, and bytes of each
  Place where;
};

struct QueueState {
  AscendC::TPosition position;
  uint32_t depth;
  Place where;
  std::vector<QueueBuffer> buffers;
  std::deque<QueueBuffer*> fifo;
  uint64_t turn = 0;
};

class Timing {
 public:
  void reset(const Launch* launch, CoreResult* result, bool trace);
  void vector(VectorClass kind, const char* op, uint32_t repeats, uint32_t element_bytes, uint16_t place);
  void local_copy(uint64_t bytes, uint32_t blocks, uint16_t place);
  void transfer(Pipe pipe, uint64_t bytes, uint32_t blocks, uint16_t place);
  void scalar(double cycles, uint16_t place);
  double set_flag(Pipe from);
  void wait_flag(Pipe to, double time);
  void barrier(Pipe pipe);
  void barrier_all();
  double finish();

 private:
  double issue(Pipe pipe);  // when the pipe starts an instruction that is issued now
  double take_memory(double start, double need);
  void run(Pipe pipe, double start, double end, double latency, uint16_t place);

  CostModel cost_;
  CoreResult* result_ = nullptr;
  bool trace_ = false;
  double cycle_ns_ = 1, vector_ns_ = 1, issue_ns_ = 1, scalar_ns_ = 1;  // of one cycle, scaled
  double read_ns_ = 0, write_ns_ = 0, share_ns_ = 0;                    // of one byte
  double now_ = 0;
  struct Busy {
    double start, end;
  };
  std::vector<Busy> memory_;  // when the core's share of the memory bandwidth is in use, from now on, sorted
  double free_[kPipes] = {}, done_[kPipes] = {};
  std::vector<double> queue_[kPipes];  // start times of the latest instructions of a pipe
  uint64_t given_[kPipes] = {};
};

struct CoreState {
  const Launch* launch = nullptr;
  CoreResult* result = nullptr;
  bool check = true;
  Clock clocks[kPipes];
  uint32_t issued[kPipes] = {};
  PlaceTable places;
  UbMap ub;
  GmMap gm;
  std::vector<std::pair<uint64_t, uint16_t>> scalar_lines;  // 64-byte lines the scalar unit wrote
  uint64_t last_line = ~uint64_t{0};
  Flag flags[kEvents][kEventIds];
  uint8_t taken_ids[kEvents] = {};              // bits: event ids held by AllocEventID or a queue
  uint16_t id_places[kEvents][kEventIds] = {};  // the place of the AllocEventID; 0 for a queue
  std::deque<QueueState> queues;
  uint32_t ub_used = 0, buffer_count = 0;
  std::vector<TakenUb> ub_taken;
  AscendC::TPipe* pipe = nullptr;
  const Buffer* last_buffer = nullptr;
  Timing timing;

  Instruction begin(Pipe pipe, const char* op, Place where);
  void hazards_ub(Core& core, const Instruction& self, const Accesses& reads, const Accesses& writes);
  void check_read(Core& core, const Instruction& self, uint32_t from, uint32_t to, const Record& record);
  void check_read_ub(Core& core, const Instruction& self, uint32_t start, uint32_t end);
  void check_write_ub(Core& core, const Instruction& self, uint32_t start, uint32_t end);
  void read_ub(Core& core, const Instruction& self, uint32_t start, uint32_t end);
  void write_ub(Core& core, const Instruction& self, uint32_t start, uint32_t end,
                ByteState state = ByteState::written);
  const Buffer& find_buffer(Core& core, const Instruction& self, uint64_t start, uint64_t end, bool writes);
  void read_gm(Core& core, const Instruction& self, uint64_t start, uint64_t end);
  void write_gm(Core& core, const Instruction& self, uint64_t start, uint64_t end);

  void empty_ub() {
    ub_used = buffer_count = 0;
    ub_taken.clear();
  }

  [[noreturn]] void fail_conflict(Core& core, const Instruction& self, const char* memory, uint64_t start, uint64_t end,
                                  bool writes, const Conflict& conflict);
};

// A core and its state as the thread pool reuses them.
class RunningCore : public Core {
 public:
  RunningCore();
  ~RunningCore();
  RunningCore(const RunningCore&) = delete;
  RunningCore& operator=(const RunningCore&) = delete;
  void run(Launch& launch, uint32_t index);

 private:
  void reset(const Launch& launch, CoreResult& result, uint32_t index);
  void collect(CoreResult& result);
};

// Ends a core; caught by RunningCore::run.
struct CoreFailure {
  Error error;
};

void check_leaks(Core& core, Place where, const char* when);  // queue buffers that were not freed
void check_flags(Core& core);                                 // flags not waited for, ids not released
int8_t take_event(AscendC::HardEvent event, Place where);     // takes an event id, without recording an owner
AscendC::HardEvent queue_event(Pipe from, Pipe to);
const char* event_name(AscendC::HardEvent event);
// The kind of a flag's synchronisation in the list of sites.
const char* flag_site(AscendC::HardEvent event);

}  // namespace cann_sim
