// Flags, barriers and event ids (pipe.h).
#include "core_state.h"

namespace cann_sim {

using AscendC::HardEvent;

namespace {

struct EventNames {
  const char* name;
  const char* site;
};

EventNames names_of(HardEvent event) {
  switch (event) {
#define CANN_SIM_EVENT(NAME) \
  case HardEvent::NAME:      \
    return {#NAME, "SetFlag/WaitFlag<" #NAME ">"};
    CANN_SIM_EVENT(MTE2_V)
    CANN_SIM_EVENT(V_MTE2)
    CANN_SIM_EVENT(MTE3_V)
    CANN_SIM_EVENT(V_MTE3)
    CANN_SIM_EVENT(MTE2_MTE3)
    CANN_SIM_EVENT(MTE3_MTE2)
    CANN_SIM_EVENT(S_V)
    CANN_SIM_EVENT(V_S)
    CANN_SIM_EVENT(S_MTE2)
    CANN_SIM_EVENT(MTE2_S)
    CANN_SIM_EVENT(S_MTE3)
    CANN_SIM_EVENT(MTE3_S)
#undef CANN_SIM_EVENT
    default:
      return {"?", "SetFlag/WaitFlag<?>"};
  }
}

void check_id(HardEvent event, int32_t id, const char* op, Place where) {
  if (id < 0 || id >= kEventIds) {
    core().fail("flag", where, format("%s<%s>: event id %d is not in 0 to 7", op, event_name(event), id));
  }
}

// Whether the last WaitFlag of a flag is certain to have taken it when pipe `from` sets it again. The scalar unit
// issues SetFlag, so everything it has waited for has also completed.
bool taken_before(const CoreState& state, const Flag& flag, HardEvent event) {
  const int f = static_cast<int>(event_pipes(event).from), t = static_cast<int>(event_pipes(event).to);
  return flag.wait_seq <= state.clocks[f].seen[t] || flag.wait_seq <= state.clocks[static_cast<int>(Pipe::S)].seen[t];
}

[[noreturn]] void fail_overtaking(const CoreState& state, const Flag& flag, HardEvent event, int32_t id) {
  const EventPipes pipes = event_pipes(event);
  core().fail(
      "flag", state.places[flag.place].where,
      format(
          "SetFlag<%s>(%d): the flag may be set a second time before WaitFlag at %s has taken it: nothing orders pipe "
          "%s, which sets it, after that wait on pipe %s; a flag %s_%s between them is missing, or another id",
          event_name(event), id, place_text(state.places[flag.overtakes]).c_str(), pipe_name(pipes.from),
          pipe_name(pipes.to), pipe_name(pipes.to), pipe_name(pipes.from)));
}

const char* kBarrierSites[kPipes] = {"PipeBarrier<PIPE_S>", "PipeBarrier<PIPE_V>", "PipeBarrier<PIPE_MTE2>",
                                     "PipeBarrier<PIPE_MTE3>"};

}  // namespace

const char* event_name(HardEvent event) {
  return names_of(event).name;
}
const char* flag_site(HardEvent event) {
  return names_of(event).site;
}
HardEvent queue_event(Pipe from, Pipe to) {
  return event_between(from, to);
}

void set_flag(HardEvent event, int32_t id, Place where) {
  check_id(event, id, "SetFlag", where);
  CoreState& state = core().state();
  Flag& flag = state.flags[static_cast<int>(event)][id];
  if (flag.set) {
    core().fail(
        "flag", where,
        format("SetFlag<%s>(%d): the flag is already set, by %s at %s, and no WaitFlag has taken it", event_name(event),
               id, state.places[flag.place].op, place_text(state.places[flag.place]).c_str()));
  }
  const Pipe from = event_pipes(event).from;
  const int f = static_cast<int>(from);
  flag.overtakes = taken_before(state, flag, event) ? 0 : flag.wait_place;
  flag.set = true;
  flag.by_queue = false;
  flag.clock = state.clocks[f];
  flag.clock.seen[f] = state.issued[f];
  flag.time = state.timing.set_flag(from);
  flag.place = state.places.intern("SetFlag", where);
}

void wait_flag(HardEvent event, int32_t id, Place where) {
  check_id(event, id, "WaitFlag", where);
  CoreState& state = core().state();
  Flag& flag = state.flags[static_cast<int>(event)][id];
  if (!flag.set) {
    core().fail("deadlock", where,
                format("WaitFlag<%s>(%d) would hang: no SetFlag<%s>(%d) comes before it", event_name(event), id,
                       event_name(event), id));
  }
  if (flag.by_queue) {
    core().fail(
        "flag", where,
        format("WaitFlag<%s>(%d) takes the flag that %s of a queue set at %s; get ids from AllocEventID",
               event_name(event), id, state.places[flag.place].op, place_text(state.places[flag.place]).c_str()));
  }
  flag.set = false;
  const uint16_t place = state.places.intern(flag_site(event), where);
  PlaceEntry& site = state.places[place];
  ++site.executions;
  const Pipe to = event_pipes(event).to;
  const int t = static_cast<int>(to);
  if (!site.ignored) {
    // Only here is it known that the flag does not belong to a removed site.
    if (flag.overtakes != 0 && state.check) {
      fail_overtaking(state, flag, event, id);
    }
    state.clocks[t].join(flag.clock);
    flag.wait_seq = ++state.issued[t];
    flag.wait_place = place;
    if (to == Pipe::S) {
      state.clocks[t].seen[t] = flag.wait_seq;
    }
  }
  state.timing.wait_flag(to, flag.time);
}

void barrier(Pipe pipe, Place where) {
  CoreState& state = core().state();
  const int p = static_cast<int>(pipe);
  PlaceEntry& site = state.places[state.places.intern(kBarrierSites[p], where)];
  ++site.executions;
  if (!site.ignored) {
    state.clocks[p].seen[p] = state.issued[p];
  }
  state.timing.barrier(pipe);
}

void barrier_all(Place where) {
  CoreState& state = core().state();
  PlaceEntry& site = state.places[state.places.intern("PipeBarrier<PIPE_ALL>", where)];
  ++site.executions;
  if (!site.ignored) {
    for (Clock& clock : state.clocks) {
      for (int pipe = 0; pipe < kPipes; ++pipe) {
        clock.seen[pipe] = state.issued[pipe];
      }
    }
  }
  state.timing.barrier_all();
}

int8_t take_event(HardEvent event, Place where) {
  uint8_t& taken = core().state().taken_ids[static_cast<int>(event)];
  for (int8_t id = 0; id < kEventIds; ++id) {
    if ((taken >> id & 1) == 0) {
      taken |= 1 << id;
      return id;
    }
  }
  core().fail(
      "flag", where,
      format("no event id of %s is left: all 8 are held by AllocEventID and by queues (each tensor enqueued and "
             "each buffer freed holds one)",
             event_name(event)));
}

int8_t alloc_event(HardEvent event, Place where) {
  CoreState& state = core().state();
  const int8_t id = take_event(event, where);
  state.id_places[static_cast<int>(event)][id] = state.places.intern("AllocEventID", where);
  return id;
}

void release_event(HardEvent event, int32_t id, Place where) {
  check_id(event, id, "ReleaseEventID", where);
  uint8_t& taken = core().state().taken_ids[static_cast<int>(event)];
  if (core().state().id_places[static_cast<int>(event)][id] == 0) {
    core().fail("flag", where,
                format("ReleaseEventID<%s>(%d): AllocEventID has not given that id out", event_name(event), id));
  }
  taken &= ~(1 << id);
  core().state().id_places[static_cast<int>(event)][id] = 0;
}

int8_t fetch_event(HardEvent event, Place where) {
  uint8_t& taken = core().state().taken_ids[static_cast<int>(event)];
  const uint8_t before = taken;
  const int8_t id = take_event(event, where);
  taken = before;
  return id;
}

void check_flags(Core& core) {
  CoreState& state = core.state();
  for (int event = 0; event < kEvents; ++event) {
    for (int id = 0; id < kEventIds; ++id) {
      const Flag& flag = state.flags[event][id];
      if (flag.set && !flag.by_queue) {
        const PlaceEntry& place = state.places[flag.place];
        core.fail("flag", place.where,
                  format("SetFlag<%s>(%d) was never waited for: the kernel ended with the flag set",
                         event_name(static_cast<HardEvent>(event)), id));
      }
      if (state.id_places[event][id] != 0) {
        core.fail("leak", state.places[state.id_places[event][id]].where,
                  format("AllocEventID<%s> gave out id %d, which ReleaseEventID never got back",
                         event_name(static_cast<HardEvent>(event)), id));
      }
    }
  }
}

}  // namespace cann_sim
