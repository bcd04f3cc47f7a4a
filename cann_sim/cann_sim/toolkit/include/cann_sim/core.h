// The simulated AI core as the Ascend C headers see it: unified buffer, pipes, hazard checks, counters and clocks.
// Every API function tells its core what it is about to read and write, then performs its effect on host memory at
// once; the core proves that any schedule the documented orderings allow would have given the same result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

namespace cann_sim {

enum class Pipe : uint8_t { S, V, MTE2, MTE3 };
constexpr int kPipes = 4;
const char* pipe_name(Pipe pipe);

constexpr uint32_t kUbBytes = 192 * 1024;
constexpr uint32_t kUbReserved = 256 + 8 * 1024;  // what the compiler keeps for itself: not to be had from InitBuffer
constexpr uint32_t kUbUsable = kUbBytes - kUbReserved;

// A line of the kernel's source.
struct Place {
  const char* file;
  int line;

  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Last parameter of every API function: default arguments are evaluated at the call, so it is the kernel's own line.
// (The two builtins have to be default arguments themselves: written out here, templates would give this line.)
#define CANN_SIM_HERE ::cann_sim::Place where = ::cann_sim::Place::here()

// A byte range of the unified buffer.
struct Access {
  uint32_t offset, bytes;
};

// A short list of ranges; neighbours are merged as they are added, and up to kInline of them need no allocation.
class Accesses {
 public:
  Accesses() {}  // leaves the inline items unset
  Accesses(uint32_t offset, uint64_t bytes) { add(offset, bytes); }
  Accesses(const Accesses&) = delete;
  Accesses& operator=(const Accesses&) = delete;
  ~Accesses() {
    if (items_ != inline_) {
      std::free(items_);
    }
  }

  void add(uint64_t offset, uint64_t bytes) {
    if (bytes == 0) {
      return;
    }
    if (size_ != 0 && items_[size_ - 1].offset + items_[size_ - 1].bytes == offset) {
      items_[size_ - 1].bytes += static_cast<uint32_t>(bytes);
      return;
    }
    if (size_ == capacity_) {
      grow();
    }
    items_[size_++] = Access{static_cast<uint32_t>(offset), static_cast<uint32_t>(bytes)};
  }
  const Access* begin() const { return items_; }
  const Access* end() const { return items_ + size_; }
  bool empty() const { return size_ == 0; }
  uint32_t size() const { return size_; }

 private:
  static constexpr uint32_t kInline = 16;

  void grow() {
    capacity_ *= 4;
    auto* larger = static_cast<Access*>(std::malloc(capacity_ * sizeof(Access)));
    std::memcpy(larger, items_, size_ * sizeof(Access));
    if (items_ != inline_) {
      std::free(items_);
    }
    items_ = larger;
  }

  Access inline_[kInline];
  Access* items_ = inline_;
  uint32_t size_ = 0, capacity_ = kInline;
};

// What a vector instruction costs a repeat; the numbers are in cost_model.h.
enum class VectorClass : uint8_t {
  move,     // Duplicate, Copy, Brcb, CreateVecIndex
  logic,    // And, Or, Not, shifts
  add,      // Add, Sub, Max, Min, Abs, Relu and their scalar forms
  mul,      // Mul, Muls
  fma,      // Axpy, MulAddDst, FusedMulAdd
  div,      // Div, Reciprocal
  sqrt,     // Sqrt, Rsqrt
  exp,      // Exp
  ln,       // Ln
  cast,     // Cast
  compare,  // Compare and its scalar forms
  select,   // Select
  reduce,   // WholeReduce*, BlockReduce*, PairReduce*, RepeatReduceSum
  gather,   // Gather
};

struct CoreState;  // hazard maps, clocks, counters: src/core_state.h

class Core {
 public:
  uint8_t* ub() const { return ub_; }        // kUbBytes of host memory
  uint32_t index() const { return index_; }  // GetBlockIdx()
  uint32_t blocks() const { return blocks_; }
  bool checking() const { return checking_; }  // when false nothing looks at Accesses: they need not be filled

  // One vector instruction, to be called before its effect: hazards, initialisation, counting, timing.
  // `op` must be a string literal. Does not check tensor bounds (require_range in tensor.h does), only those of UB.
  void vector(const char* op, Place where, VectorClass kind, uint32_t repeats, uint32_t element_bytes,
              const Accesses& reads, const Accesses& writes);

  // The scalar unit reads or writes UB: GetValue, SetValue, and the scalar tail of ReduceMax and the like.
  void scalar(const char* op, Place where, const Accesses& reads, const Accesses& writes);

  // Orders everything `from` did so far before whatever `to` does next, as an API does that has synchronisation
  // inside (SetFlag and WaitFlag on an event of its own). Between the same pipe it is a PipeBarrier.
  void order(Pipe from, Pipe to);

  // Ends the launch of this core with an error. `kind` is one of the slugs of cann_sim.KernelError.
  [[noreturn]] void fail(const char* kind, Place where, const std::string& message);

  // The vector mask register and mode (SetVectorMask, SetMaskCount, SetMaskNorm). Norm: bits of a repeat;
  // counter: `count` elements in all.
  struct Mask {
    uint64_t low = ~uint64_t{0}, high = ~uint64_t{0};
    bool counter = false;
    uint32_t count = 0;
  } mask;

  // Below: for the runtime's own headers.
  CoreState& state() const { return *state_; }

 protected:
  uint8_t* ub_ = nullptr;
  uint32_t index_ = 0, blocks_ = 1;
  bool checking_ = true;
  CoreState* state_ = nullptr;
};

// The core this thread is running; only kernel code may ask.
extern __thread Core* current_core;
inline Core& core() {
  return *current_core;
}

// printf into a string, for messages.
std::string format(const char* text, ...) __attribute__((format(printf, 1, 2)));

}  // namespace cann_sim
