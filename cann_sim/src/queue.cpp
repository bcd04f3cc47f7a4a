// Queues and buffers of the unified buffer (queue.h): allocation, tensor states, and flags.
#include "cann_sim/queue.h"

#include "core_state.h"

namespace cann_sim {

using AscendC::HardEvent;
using AscendC::TPosition;

namespace {

constexpr uint32_t kMaxBuffersOfPosition = 8, kMaxBuffers = 64;

const char* position_name(TPosition position) {
  switch (position) {
    case TPosition::VECIN:
      return "VECIN";
    case TPosition::VECOUT:
      return "VECOUT";
    default:
      return "VECCALC";
  }
}

const char* state_text(QueueBuffer::State state) {
  switch (state) {
    case QueueBuffer::State::idle:
      return "free (FreeTensor was called)";
    case QueueBuffer::State::allocated:
      return "allocated and not yet enqueued";
    case QueueBuffer::State::queued:
      return "enqueued and not yet dequeued";
    default:
      return "dequeued";
  }
}

struct SiteNames {
  const char* enqueue;
  const char* free;
};

// The site kinds of a queue's two flags, by producing and consuming pipe.
SiteNames sites(QueuePipes pipes) {
  if (pipes.producer == Pipe::MTE2 && pipes.consumer == Pipe::V) {
    return {"EnQue/DeQue<MTE2_V>", "FreeTensor/AllocTensor<V_MTE2>"};
  }
  if (pipes.producer == Pipe::V && pipes.consumer == Pipe::MTE3) {
    return {"EnQue/DeQue<V_MTE3>", "FreeTensor/AllocTensor<MTE3_V>"};
  }
  return {"EnQue/DeQue<MTE2_MTE3>", "FreeTensor/AllocTensor<MTE3_MTE2>"};
}

const char* free_site(HardEvent event) {
  switch (event) {
    case HardEvent::V_MTE2:
      return "FreeTensor/AllocTensor<V_MTE2>";
    case HardEvent::MTE3_V:
      return "FreeTensor/AllocTensor<MTE3_V>";
    default:
      return "FreeTensor/AllocTensor<MTE3_MTE2>";
  }
}

uint32_t take_ub(CoreState& state, TPosition position, uint64_t each, uint32_t count, Place where) {
  const uint64_t bytes = each * count;
  state.buffer_count += count;
  if (state.buffer_count > kMaxBuffers) {
    core().fail(
        "queue", where,
        format("InitBuffer: %u buffers in this kernel, at most %u are possible", state.buffer_count, kMaxBuffers));
  }
  if (state.ub_used + bytes > kUbUsable) {
    std::string text = format(
        "InitBuffer of %u x %llu bytes for %s: %u bytes of UB are taken already and %u bytes are usable (%u less %u "
        "reserved)",
        count, static_cast<unsigned long long>(each), position_name(position), state.ub_used, kUbUsable, kUbBytes,
        kUbReserved);
    const char* separator = "; taken are ";
    for (const TakenUb& taken : state.ub_taken) {
      text += format("%s%u x %u for %s at %s:%d", separator, taken.count, taken.bytes, position_name(taken.position),
                     taken.where.file, taken.where.line);
      separator = ", ";
    }
    core().fail("ub-overflow", where, text);
  }
  const uint32_t address = state.ub_used;
  state.ub_used += static_cast<uint32_t>(bytes);
  state.ub_taken.push_back({position, count, static_cast<uint32_t>(each), where});
  return address;
}

QueueState& initialised(QueueState* queue, const char* op, Place where) {
  if (queue == nullptr || queue->buffers.empty()) {
    core().fail("queue", where, format("%s on a queue that InitBuffer was not called for", op));
  }
  return *queue;
}

QueueBuffer& buffer_of(QueueState& queue, const LocalTensorBase& tensor, const char* op, Place where) {
  for (QueueBuffer& buffer : queue.buffers) {
    if (&buffer == tensor.buffer()) {
      return buffer;
    }
  }
  core().fail("queue", where, format("%s of a tensor that does not come from this queue's AllocTensor", op));
}

void set_queue_flag(CoreState& state, QueueBuffer& buffer, HardEvent event, Pipe from, const char* op, Place where) {
  buffer.event = event;
  buffer.id = take_event(event, where);
  Flag& flag = state.flags[static_cast<int>(event)][buffer.id];
  if (flag.set) {
    core().fail("flag", where,
                format("%s sets flag %s(%d), which SetFlag at %s has set already; get ids from AllocEventID", op,
                       event_name(event), buffer.id, place_text(state.places[flag.place]).c_str()));
  }
  const int f = static_cast<int>(from);
  flag.set = flag.by_queue = true;
  flag.clock = state.clocks[f];
  flag.clock.seen[f] = state.issued[f];
  flag.time = state.timing.set_flag(from);
  flag.place = state.places.intern(op, where);
}

void wait_queue_flag(CoreState& state, QueueBuffer& buffer, const char* site_kind, Place where) {
  Flag& flag = state.flags[static_cast<int>(buffer.event)][buffer.id];
  PlaceEntry& site = state.places[state.places.intern(site_kind, where)];
  ++site.executions;
  const Pipe to = event_pipes(buffer.event).to;
  if (!site.ignored) {
    state.clocks[static_cast<int>(to)].join(flag.clock);
  }
  state.timing.wait_flag(to, flag.time);
  flag.set = false;
  state.taken_ids[static_cast<int>(buffer.event)] &= ~(1 << buffer.id);
  buffer.id = -1;
}

void mark(CoreState& state, const QueueBuffer& buffer, ByteState bytes) {
  if (state.check) {
    state.ub.update(buffer.address, buffer.address + buffer.bytes,
                    [&](uint32_t, uint32_t, Record& record) { record.state = bytes; });
  }
}

void drop_flag(CoreState& state, QueueBuffer& buffer) {
  if (buffer.id >= 0) {
    state.flags[static_cast<int>(buffer.event)][buffer.id].set = false;
    state.taken_ids[static_cast<int>(buffer.event)] &= ~(1 << buffer.id);
    buffer.id = -1;
  }
}

}  // namespace

void init_queue(QueueState*& queue, TPosition position, int32_t depth, uint32_t count, uint32_t bytes, Place where) {
  CoreState& state = core().state();
  if (queue != nullptr && !queue->buffers.empty()) {
    core().fail("queue", where, "InitBuffer on a queue that has its buffers already");
  }
  if (count == 0 || bytes == 0) {
    core().fail("params", where, format("InitBuffer of %u buffers of %u bytes: both must be above 0", count, bytes));
  }
  uint32_t of_position = count;
  for (const QueueState& other : state.queues) {
    of_position += other.position == position ? static_cast<uint32_t>(other.buffers.size()) : 0;
  }
  if (of_position > kMaxBuffersOfPosition) {
    core().fail("queue", where,
                format("InitBuffer: %u queue buffers in %s, at most %u are possible (each holds an event id)",
                       of_position, position_name(position), kMaxBuffersOfPosition));
  }
  const uint32_t rounded = (bytes + 31) / 32 * 32;
  const uint32_t address = take_ub(state, position, (uint64_t{bytes} + 31) / 32 * 32, count, where);
  if (queue == nullptr) {
    state.queues.emplace_back();
    queue = &state.queues.back();
  }
  queue->position = position;
  queue->depth = depth <= 0 ? 1 : static_cast<uint32_t>(depth);
  queue->where = where;
  queue->fifo.clear();
  queue->buffers.resize(count);
  for (uint32_t i = 0; i < count; ++i) {
    queue->buffers[i].address = address + i * rounded;
    queue->buffers[i].bytes = rounded;
    queue->buffers[i].turn = queue->turn++;
  }
}

uint32_t init_buffer(TPosition position, uint32_t bytes, Place where) {
  if (bytes == 0) {
    core().fail("params", where, "InitBuffer of a TBuf of 0 bytes");
  }
  return take_ub(core().state(), position, (uint64_t{bytes} + 31) / 32 * 32, 1, where);
}

void alloc_tensor(QueueState* handle, LocalTensorBase& tensor, Place where) {
  QueueState& queue = initialised(handle, "AllocTensor", where);
  CoreState& state = core().state();
  QueueBuffer* chosen = nullptr;
  for (QueueBuffer& buffer : queue.buffers) {
    if (buffer.state == QueueBuffer::State::idle && (chosen == nullptr || buffer.turn < chosen->turn)) {
      chosen = &buffer;
    }
  }
  if (chosen == nullptr) {
    std::string text = format("AllocTensor: no buffer of this %s queue is free", position_name(queue.position));
    const char* separator = ": ";
    bool all_queued = true;
    for (const QueueBuffer& buffer : queue.buffers) {
      text += format("%sone is %s (%s at %s)", separator, state_text(buffer.state), state.places[buffer.place].op,
                     place_text(state.places[buffer.place]).c_str());
      separator = ", ";
      all_queued = all_queued && buffer.state == QueueBuffer::State::queued;
    }
    core().fail("queue", where, text + (all_queued ? "; DeQue and FreeTensor missing?" : "; FreeTensor missing?"));
  }
  if (chosen->id >= 0) {
    wait_queue_flag(state, *chosen, free_site(chosen->event), where);
  }
  chosen->state = QueueBuffer::State::allocated;
  chosen->place = state.places.intern("AllocTensor", where);
  mark(state, *chosen, ByteState::unwritten);
  TensorAccess::set(tensor, chosen->address, chosen->bytes, queue.position, chosen);
}

bool enqueue(QueueState* handle, const LocalTensorBase& tensor, QueuePipes pipes, Place where) {
  QueueState& queue = initialised(handle, "EnQue", where);
  CoreState& state = core().state();
  QueueBuffer& buffer = buffer_of(queue, tensor, "EnQue", where);
  if (buffer.state != QueueBuffer::State::allocated && buffer.state != QueueBuffer::State::dequeued) {
    core().fail("queue", where,
                format("EnQue of a tensor that is %s, since %s at %s", state_text(buffer.state),
                       state.places[buffer.place].op, place_text(state.places[buffer.place]).c_str()));
  }
  if (queue.fifo.size() >= queue.depth) {
    core().fail(
        "queue", where,
        format("EnQue: %zu tensors are in the queue already and its depth is %u", queue.fifo.size(), queue.depth));
  }
  if (pipes.ordered) {
    set_queue_flag(state, buffer, queue_event(pipes.producer, pipes.consumer), pipes.producer, "EnQue", where);
  }
  buffer.state = QueueBuffer::State::queued;
  buffer.place = state.places.intern("EnQue", where);
  queue.fifo.push_back(&buffer);
  return true;
}

void dequeue(QueueState* handle, LocalTensorBase& tensor, QueuePipes pipes, Place where) {
  QueueState& queue = initialised(handle, "DeQue", where);
  CoreState& state = core().state();
  if (queue.fifo.empty()) {
    core().fail("queue", where,
                format("DeQue from a %s queue that is empty; EnQue missing?", position_name(queue.position)));
  }
  QueueBuffer& buffer = *queue.fifo.front();
  queue.fifo.pop_front();
  if (buffer.id >= 0) {
    wait_queue_flag(state, buffer, sites(pipes).enqueue, where);
  }
  buffer.state = QueueBuffer::State::dequeued;
  buffer.place = state.places.intern("DeQue", where);
  TensorAccess::set(tensor, buffer.address, buffer.bytes, queue.position, &buffer);
}

void free_tensor(QueueState* handle, LocalTensorBase& tensor, QueuePipes pipes, Place where) {
  QueueState& queue = initialised(handle, "FreeTensor", where);
  CoreState& state = core().state();
  QueueBuffer& buffer = buffer_of(queue, tensor, "FreeTensor", where);
  if (buffer.state == QueueBuffer::State::idle || buffer.state == QueueBuffer::State::queued) {
    core().fail("queue", where,
                format("FreeTensor of a tensor that is %s, since %s at %s", state_text(buffer.state),
                       state.places[buffer.place].op, place_text(state.places[buffer.place]).c_str()));
  }
  if (pipes.ordered) {
    set_queue_flag(state, buffer, queue_event(pipes.consumer, pipes.producer), pipes.consumer, "FreeTensor", where);
  }
  buffer.state = QueueBuffer::State::idle;
  buffer.place = state.places.intern("FreeTensor", where);
  buffer.turn = queue.turn++;
  mark(state, buffer, ByteState::freed);
}

uint32_t queued(const QueueState* queue, Place where) {
  return static_cast<uint32_t>(initialised(const_cast<QueueState*>(queue), "a query", where).fifo.size());
}

uint32_t idle_buffers(const QueueState* queue, Place where) {
  uint32_t idle = 0;
  for (const QueueBuffer& buffer : initialised(const_cast<QueueState*>(queue), "HasIdleBuffer", where).buffers) {
    idle += buffer.state == QueueBuffer::State::idle;
  }
  return idle;
}

void free_events(QueueState* handle, Place where) {
  QueueState& queue = initialised(handle, "FreeAllEvent", where);
  CoreState& state = core().state();
  for (QueueBuffer& buffer : queue.buffers) {
    if (buffer.id >= 0) {
      wait_queue_flag(state, buffer, free_site(buffer.event), where);
    }
  }
}

void check_leaks(Core& core, Place where, const char* when) {
  CoreState& state = core.state();
  for (QueueState& queue : state.queues) {
    for (QueueBuffer& buffer : queue.buffers) {
      if (buffer.state != QueueBuffer::State::idle) {
        const PlaceEntry& place = state.places[buffer.place];
        core.fail(
            "leak", where.line == 0 ? place.where : where,
            format("a tensor of a %s queue was never freed: %s it was %s (%s at %s); FreeTensor missing?",
                   position_name(queue.position), when, state_text(buffer.state), place.op, place_text(place).c_str()));
      }
    }
  }
}

void reset_pipe(Place where) {
  Core& self = core();
  CoreState& state = self.state();
  check_leaks(self, where, "when the pipe was reset");
  barrier_all(where);
  for (QueueState& queue : state.queues) {
    for (QueueBuffer& buffer : queue.buffers) {
      drop_flag(state, buffer);
      mark(state, buffer, ByteState::unwritten);
    }
    queue.buffers.clear();
  }
  state.empty_ub();
}

}  // namespace cann_sim

namespace AscendC {

TPipe::TPipe() {
  ::cann_sim::CoreState& state = ::cann_sim::core().state();
  if (!state.queues.empty()) {  // a second TPipe starts with an empty unified buffer
    ::cann_sim::reset_pipe(state.queues.back().where);
  }
  state.empty_ub();
  state.pipe = this;
}

TPipe::~TPipe() {
  ::cann_sim::core().state().pipe = nullptr;
}

TPipe* GetTPipePtr() {
  return ::cann_sim::core().state().pipe;
}

}  // namespace AscendC
