// TPipe, TQue, TQueBind and TBuf: who owns which bytes of the unified buffer, and the flags that come with handing them
// on.
#pragma once

#include "cann_sim/pipe.h"
#include "cann_sim/tensor.h"

namespace cann_sim {

struct QueueState;  // buffers of one queue; owned by the core, so that leaks are seen when the kernel ends

// Which flags a queue sets: the producing and the consuming pipe.
struct QueuePipes {
  bool modelled, ordered;
  Pipe producer, consumer;
};

constexpr bool in_ub(AscendC::TPosition position) {
  return position == AscendC::TPosition::VECIN || position == AscendC::TPosition::VECOUT ||
         position == AscendC::TPosition::VECCALC;
}

// A queue from `src` to `dst`: data comes in by MTE2 or V and leaves by V or MTE3.
constexpr QueuePipes queue_pipes(AscendC::TPosition src, AscendC::TPosition dst) {
  using AscendC::TPosition;
  if (src == TPosition::GM && in_ub(dst)) {
    return {true, true, Pipe::MTE2, Pipe::V};
  }
  if (in_ub(src) && dst == TPosition::GM) {
    return {true, true, Pipe::V, Pipe::MTE3};
  }
  if (src == TPosition::VECIN && dst == TPosition::VECOUT) {
    return {true, true, Pipe::MTE2, Pipe::MTE3};
  }
  if (src == TPosition::VECCALC && dst == TPosition::VECCALC) {
    return {true, false, Pipe::V, Pipe::V};  // V to V: nothing is ordered, PipeBarrier<PIPE_V> is the kernel's task
  }
  return {false, false, Pipe::V, Pipe::V};
}

void init_queue(QueueState*& queue, AscendC::TPosition position, int32_t depth, uint32_t count, uint32_t bytes,
                Place where);
uint32_t init_buffer(AscendC::TPosition position, uint32_t bytes, Place where);  // its address
void reset_pipe(Place where);
void free_events(QueueState* queue, Place where);

void alloc_tensor(QueueState* queue, LocalTensorBase& tensor, Place where);
bool enqueue(QueueState* queue, const LocalTensorBase& tensor, QueuePipes pipes, Place where);
void dequeue(QueueState* queue, LocalTensorBase& tensor, QueuePipes pipes, Place where);
void free_tensor(QueueState* queue, LocalTensorBase& tensor, QueuePipes pipes, Place where);
uint32_t queued(const QueueState* queue, Place where);
uint32_t idle_buffers(const QueueState* queue, Place where);

}  // namespace cann_sim

namespace AscendC {

class TPipe;

template <TPosition src, TPosition dst, int32_t depth, auto mask = 0>
class TQueBind {
  static constexpr ::cann_sim::QueuePipes kPipes = ::cann_sim::queue_pipes(src, dst);
  static_assert(kPipes.modelled,
                "cann_sim does not model this queue position: VECIN, VECOUT, VECCALC, and VECIN bound to VECOUT are");

 public:
  static constexpr TPosition kPosition = src == TPosition::GM ? dst : src;

  template <typename T>
  LocalTensor<T> AllocTensor(CANN_SIM_HERE) {
    LocalTensor<T> tensor;
    ::cann_sim::alloc_tensor(state_, tensor, where);
    return tensor;
  }
  template <typename T>
  void AllocTensor(LocalTensor<T>& tensor, CANN_SIM_HERE) {
    ::cann_sim::alloc_tensor(state_, tensor, where);
  }

  template <typename T>
  bool EnQue(const LocalTensor<T>& tensor, CANN_SIM_HERE) {
    return ::cann_sim::enqueue(state_, tensor, kPipes, where);
  }
  // A bound queue used for both halves of GM -> UB -> compute -> UB -> GM names the half.
  template <TPosition from, TPosition to, typename T>
  bool EnQue(const LocalTensor<T>& tensor, CANN_SIM_HERE) {
    return ::cann_sim::enqueue(state_, tensor, half<from, to>(), where);
  }

  template <typename T>
  LocalTensor<T> DeQue(CANN_SIM_HERE) {
    LocalTensor<T> tensor;
    ::cann_sim::dequeue(state_, tensor, kPipes, where);
    return tensor;
  }
  template <typename T>
  void DeQue(LocalTensor<T>& tensor, CANN_SIM_HERE) {
    ::cann_sim::dequeue(state_, tensor, kPipes, where);
  }
  template <TPosition from, TPosition to, typename T>
  LocalTensor<T> DeQue(CANN_SIM_HERE) {
    LocalTensor<T> tensor;
    ::cann_sim::dequeue(state_, tensor, half<from, to>(), where);
    return tensor;
  }

  template <typename T>
  void FreeTensor(LocalTensor<T>& tensor, CANN_SIM_HERE) {
    ::cann_sim::free_tensor(state_, tensor, kPipes, where);
  }

  bool HasTensorInQue(CANN_SIM_HERE) const { return ::cann_sim::queued(state_, where) != 0; }
  int32_t GetTensorCountInQue(CANN_SIM_HERE) const { return static_cast<int32_t>(::cann_sim::queued(state_, where)); }
  bool VacantInQue(CANN_SIM_HERE) const {
    return ::cann_sim::queued(state_, where) < static_cast<uint32_t>(depth == 0 ? 1 : depth);
  }
  bool HasIdleBuffer(CANN_SIM_HERE) const { return ::cann_sim::idle_buffers(state_, where) != 0; }
  void FreeAllEvent(CANN_SIM_HERE) { ::cann_sim::free_events(state_, where); }

 private:
  friend class TPipe;

  template <TPosition from, TPosition to>
  static constexpr ::cann_sim::QueuePipes half() {
    constexpr ::cann_sim::QueuePipes pipes = ::cann_sim::queue_pipes(from, to);
    static_assert(pipes.modelled, "cann_sim does not model EnQue or DeQue between these positions");
    return pipes;
  }

  ::cann_sim::QueueState* state_ = nullptr;
};

template <TPosition position>
struct QueueEnds {
  static constexpr TPosition src = position == TPosition::VECIN ? TPosition::GM : position;
  static constexpr TPosition dst = position == TPosition::VECOUT ? TPosition::GM : position;
};

template <TPosition pos, int32_t depth, auto mask = 0>
class TQue : public TQueBind<QueueEnds<pos>::src, QueueEnds<pos>::dst, depth, mask> {};

template <TPosition pos = TPosition::VECCALC>
class TBuf {
  static_assert(::cann_sim::in_ub(pos), "cann_sim does not model this TBuf position: VECIN, VECOUT and VECCALC are");

 public:
  static constexpr TPosition kPosition = pos;

  template <typename T>
  LocalTensor<T> Get(CANN_SIM_HERE) {
    return part<T>("TBuf::Get", 0, bytes_, where);
  }
  template <typename T>
  LocalTensor<T> Get(uint32_t len, CANN_SIM_HERE) {
    return part<T>("TBuf::Get", 0, uint64_t{len} * sizeof(T), where);
  }
  template <typename T>
  LocalTensor<T> GetWithOffset(uint32_t size, uint32_t bufOffset, CANN_SIM_HERE) {
    return part<T>("TBuf::GetWithOffset", bufOffset, uint64_t{size} * sizeof(T), where);
  }

 private:
  friend class TPipe;

  template <typename T>
  LocalTensor<T> part(const char* op, uint32_t offset, uint64_t bytes, ::cann_sim::Place where) {
    if (bytes_ == 0) {
      ::cann_sim::core().fail("bounds", where,
                              ::cann_sim::format("%s on a TBuf that InitBuffer was not called for", op));
    }
    if (bytes == 0 || offset + bytes > bytes_) {
      ::cann_sim::core().fail("bounds", where,
                              ::cann_sim::format("%s asks for %llu bytes at offset %u of a TBuf of %u bytes", op,
                                                 static_cast<unsigned long long>(bytes), offset, bytes_));
    }
    if (offset % 32 != 0) {
      ::cann_sim::core().fail("alignment", where,
                              ::cann_sim::format("%s: byte offset %u is not a multiple of 32", op, offset));
    }
    LocalTensor<T> tensor;
    ::cann_sim::TensorAccess::set(tensor, address_ + offset, static_cast<uint32_t>(bytes), pos, nullptr);
    return tensor;
  }

  uint32_t address_ = 0, bytes_ = 0;
};

class TPipe {
 public:
  TPipe();
  ~TPipe();
  TPipe(const TPipe&) = delete;
  TPipe& operator=(const TPipe&) = delete;

  void Init() {}
  void Destroy(CANN_SIM_HERE) { ::cann_sim::reset_pipe(where); }
  void Reset(CANN_SIM_HERE) { ::cann_sim::reset_pipe(where); }

  template <TPosition src, TPosition dst, int32_t depth, auto mask>
  bool InitBuffer(TQueBind<src, dst, depth, mask>& que, uint8_t num, uint32_t len, CANN_SIM_HERE) {
    ::cann_sim::init_queue(que.state_, que.kPosition, depth, num, len, where);
    return true;
  }
  template <TPosition pos>
  bool InitBuffer(TBuf<pos>& buf, uint32_t len, CANN_SIM_HERE) {
    buf.address_ = ::cann_sim::init_buffer(pos, len, where);
    buf.bytes_ = (len + 31) / 32 * 32;
    return true;
  }

  template <HardEvent event>
  TEventID AllocEventID(CANN_SIM_HERE) {
    static_assert(::cann_sim::event_pipes(event).modelled, "cann_sim does not model this event");
    return ::cann_sim::alloc_event(event, where);
  }
  template <HardEvent event>
  void ReleaseEventID(TEventID id, CANN_SIM_HERE) {
    static_assert(::cann_sim::event_pipes(event).modelled, "cann_sim does not model this event");
    ::cann_sim::release_event(event, id, where);
  }
  template <HardEvent event>
  TEventID FetchEventID(CANN_SIM_HERE) {
    static_assert(::cann_sim::event_pipes(event).modelled, "cann_sim does not model this event");
    return ::cann_sim::fetch_event(event, where);
  }
  TEventID FetchEventID(HardEvent event, CANN_SIM_HERE) { return ::cann_sim::fetch_event(event, where); }
};

TPipe* GetTPipePtr();

}  // namespace AscendC
