// Synchronisation inside a core: flags, barriers, event ids, TQueSync.
#pragma once

#include "cann_sim/core.h"
#include "cann_sim/position.h"

namespace cann_sim {

// The two pipes of an event, by name (X_Y: Y waits for X); `modelled` is false for those of the cube unit.
struct EventPipes {
  bool modelled;
  Pipe from, to;
};
constexpr EventPipes event_pipes(AscendC::HardEvent event) {
  using AscendC::HardEvent;
  switch (event) {
    case HardEvent::MTE2_V:
      return {true, Pipe::MTE2, Pipe::V};
    case HardEvent::V_MTE2:
      return {true, Pipe::V, Pipe::MTE2};
    case HardEvent::MTE3_V:
      return {true, Pipe::MTE3, Pipe::V};
    case HardEvent::V_MTE3:
      return {true, Pipe::V, Pipe::MTE3};
    case HardEvent::MTE2_MTE3:
      return {true, Pipe::MTE2, Pipe::MTE3};
    case HardEvent::MTE3_MTE2:
      return {true, Pipe::MTE3, Pipe::MTE2};
    case HardEvent::S_V:
      return {true, Pipe::S, Pipe::V};
    case HardEvent::V_S:
      return {true, Pipe::V, Pipe::S};
    case HardEvent::S_MTE2:
      return {true, Pipe::S, Pipe::MTE2};
    case HardEvent::MTE2_S:
      return {true, Pipe::MTE2, Pipe::S};
    case HardEvent::S_MTE3:
      return {true, Pipe::S, Pipe::MTE3};
    case HardEvent::MTE3_S:
      return {true, Pipe::MTE3, Pipe::S};
    default:
      return {false, Pipe::S, Pipe::S};
  }
}

constexpr AscendC::HardEvent event_between(Pipe from, Pipe to) {
  for (int event = 0; event < static_cast<int>(AscendC::HardEvent::MAX); ++event) {
    const EventPipes pipes = event_pipes(static_cast<AscendC::HardEvent>(event));
    if (pipes.modelled && pipes.from == from && pipes.to == to) {
      return static_cast<AscendC::HardEvent>(event);
    }
  }
  return AscendC::HardEvent::MAX;
}

struct PipeOf {
  bool modelled;
  Pipe pipe;
};
constexpr PipeOf modelled_pipe(pipe_t pipe) {
  switch (pipe) {
    case PIPE_S:
      return {true, Pipe::S};
    case PIPE_V:
      return {true, Pipe::V};
    case PIPE_MTE2:
      return {true, Pipe::MTE2};
    case PIPE_MTE3:
      return {true, Pipe::MTE3};
    default:
      return {false, Pipe::S};
  }
}

void set_flag(AscendC::HardEvent event, int32_t id, Place where);
void wait_flag(AscendC::HardEvent event, int32_t id, Place where);
void barrier(Pipe pipe, Place where);
void barrier_all(Place where);
int8_t alloc_event(AscendC::HardEvent event, Place where);
void release_event(AscendC::HardEvent event, int32_t id, Place where);
int8_t fetch_event(AscendC::HardEvent event, Place where);

}  // namespace cann_sim

namespace AscendC {

template <HardEvent event>
void SetFlag(int32_t eventID, CANN_SIM_HERE) {
  static_assert(::cann_sim::event_pipes(event).modelled,
                "cann_sim does not model this SetFlag event: only events between S, V, MTE2 and MTE3 are");
  ::cann_sim::set_flag(event, eventID, where);
}

template <HardEvent event>
void WaitFlag(int32_t eventID, CANN_SIM_HERE) {
  static_assert(::cann_sim::event_pipes(event).modelled,
                "cann_sim does not model this WaitFlag event: only events between S, V, MTE2 and MTE3 are");
  ::cann_sim::wait_flag(event, eventID, where);
}

template <pipe_t pipe>
void PipeBarrier(CANN_SIM_HERE) {
  static_assert(pipe != PIPE_S, "PipeBarrier<PIPE_S> is not allowed: the scalar unit is in order with itself");
  if constexpr (pipe == PIPE_ALL) {
    ::cann_sim::barrier_all(where);
  } else {
    static_assert(::cann_sim::modelled_pipe(pipe).modelled,
                  "cann_sim does not model this PipeBarrier: only PIPE_V, PIPE_MTE2, PIPE_MTE3 and PIPE_ALL");
    ::cann_sim::barrier(::cann_sim::modelled_pipe(pipe).pipe, where);
  }
}

// The flag pair of two pipes by their names; the same flags as SetFlag<HardEvent::src_dst>.
template <pipe_t src, pipe_t dst>
class TQueSync {
 public:
  void SetFlag(TEventID id, CANN_SIM_HERE) { ::cann_sim::set_flag(event(), id, where); }
  void WaitFlag(TEventID id, CANN_SIM_HERE) { ::cann_sim::wait_flag(event(), id, where); }

 private:
  static constexpr HardEvent event() {
    static_assert(::cann_sim::modelled_pipe(src).modelled && ::cann_sim::modelled_pipe(dst).modelled && src != dst,
                  "cann_sim does not model this TQueSync: only pairs of S, V, MTE2 and MTE3");
    return ::cann_sim::event_between(::cann_sim::modelled_pipe(src).pipe, ::cann_sim::modelled_pipe(dst).pipe);
  }
};

}  // namespace AscendC
