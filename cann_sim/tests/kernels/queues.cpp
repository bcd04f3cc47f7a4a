// Queues and event flags used against their rules. With `right` each kernel keeps them and has to pass.
#include "scratch.h"

#define KERNEL(name) extern "C" __global__ __aicore__ void name(GM_ADDR x, GM_ADDR y, int32_t right)

using InQueue = TQue<TPosition::VECIN, 1>;
constexpr uint32_t kBytes = kCount * sizeof(float);

// ---- queues ----

KERNEL(foreign_tensor) {
  Scratch s(x, y);
  InQueue first, second;
  s.pipe.InitBuffer(first, 1, kBytes);
  s.pipe.InitBuffer(second, 1, kBytes);
  LocalTensor<float> mine = first.AllocTensor<float>();
  LocalTensor<float> other = second.AllocTensor<float>();
  first.EnQue(right ? mine : other);  // HERE
  second.EnQue(other);
  mine = first.DeQue<float>();
  other = second.DeQue<float>();
  first.FreeTensor(mine);
  second.FreeTensor(other);
}

KERNEL(scratch_tensor) {
  Scratch s(x, y);
  InQueue queue;
  s.pipe.InitBuffer(queue, 1, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  queue.EnQue(right ? mine : s.a);  // HERE
  mine = queue.DeQue<float>();
  queue.FreeTensor(mine);
}

KERNEL(dequeue_of_nothing) {
  Scratch s(x, y);
  InQueue queue;
  s.pipe.InitBuffer(queue, 2, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  if (right) {
    queue.EnQue(mine);
  }
  mine = queue.DeQue<float>();  // HERE
  queue.FreeTensor(mine);
}

KERNEL(free_twice) {
  Scratch s(x, y);
  InQueue queue;
  s.pipe.InitBuffer(queue, 2, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  LocalTensor<float> other = queue.AllocTensor<float>();
  queue.FreeTensor(mine);
  queue.FreeTensor(right ? other : mine);  // HERE
  if (!right) {
    queue.FreeTensor(other);
  }
}

KERNEL(free_while_queued) {
  Scratch s(x, y);
  InQueue queue;
  s.pipe.InitBuffer(queue, 1, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  queue.EnQue(mine);
  if (right) {
    mine = queue.DeQue<float>();
  }
  queue.FreeTensor(mine);  // HERE
}

KERNEL(enqueue_twice) {
  Scratch s(x, y);
  TQue<TPosition::VECIN, 2> queue;
  s.pipe.InitBuffer(queue, 2, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  LocalTensor<float> other = queue.AllocTensor<float>();
  queue.EnQue(mine);
  queue.EnQue(right ? other : mine);  // HERE
  mine = queue.DeQue<float>();
  other = queue.DeQue<float>();
  queue.FreeTensor(mine);
  queue.FreeTensor(other);
}

// Two consecutive EnQue need a depth of two.
template <int32_t depth>
__aicore__ inline void EnqueTwo(Scratch& s) {
  TQue<TPosition::VECIN, depth> queue;
  s.pipe.InitBuffer(queue, 2, kBytes);
  LocalTensor<float> first = queue.template AllocTensor<float>();
  LocalTensor<float> second = queue.template AllocTensor<float>();
  queue.EnQue(first);
  queue.EnQue(second);  // DEPTH
  first = queue.template DeQue<float>();
  second = queue.template DeQue<float>();
  queue.FreeTensor(first);
  queue.FreeTensor(second);
}

KERNEL(too_shallow) {
  Scratch s(x, y);
  if (right) {
    EnqueTwo<2>(s);
  } else {
    EnqueTwo<1>(s);
  }
}

KERNEL(use_after_free_vector) {
  Scratch s(x, y);
  s.Fill();
  InQueue queue;
  s.pipe.InitBuffer(queue, 1, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  DataCopy(mine, s.x, kCount);
  queue.EnQue(mine);
  mine = queue.DeQue<float>();
  if (!right) {
    queue.FreeTensor(mine);
  }
  Adds(s.b, mine, 1.0f, kCount);  // HERE
  if (right) {
    queue.FreeTensor(mine);
  }
}

// A copy into the tensor that was given back: the next AllocTensor may have handed it to somebody else.
KERNEL(write_after_free) {
  Scratch s(x, y);
  InQueue queue;
  s.pipe.InitBuffer(queue, 1, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  if (!right) {
    queue.FreeTensor(mine);
  }
  DataCopy(mine, s.x, kCount);  // HERE
  if (right) {
    queue.FreeTensor(mine);
  }
}

KERNEL(use_after_free_copy) {
  Scratch s(x, y);
  TQue<TPosition::VECOUT, 1> queue;
  s.pipe.InitBuffer(queue, 1, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  Duplicate(mine, 1.0f, kCount);
  queue.EnQue(mine);
  mine = queue.DeQue<float>();
  if (!right) {
    queue.FreeTensor(mine);
  }
  DataCopy(s.y, mine, kCount);  // HERE
  if (right) {
    queue.FreeTensor(mine);
  }
}

KERNEL(use_after_free_scalar) {
  Scratch s(x, y);
  InQueue queue;
  s.pipe.InitBuffer(queue, 1, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  mine.SetValue(0, 1.0f);
  if (!right) {
    queue.FreeTensor(mine);
  }
  s.b.SetValue(0, mine.GetValue(0));  // HERE
  if (right) {
    queue.FreeTensor(mine);
  }
}

KERNEL(alloc_beyond) {
  Scratch s(x, y);
  InQueue queue;
  s.pipe.InitBuffer(queue, 2, kBytes);
  LocalTensor<float> first = queue.AllocTensor<float>();
  LocalTensor<float> second = queue.AllocTensor<float>();
  if (right) {
    queue.FreeTensor(first);
  }
  LocalTensor<float> third = queue.AllocTensor<float>();  // HERE
  queue.FreeTensor(third);
  queue.FreeTensor(second);
}

KERNEL(alloc_before_init) {
  Scratch s(x, y);
  InQueue queue;
  if (right) {
    s.pipe.InitBuffer(queue, 1, kBytes);
  }
  LocalTensor<float> mine = queue.AllocTensor<float>();  // HERE
  queue.FreeTensor(mine);
}

KERNEL(never_freed) {
  Scratch s(x, y);
  InQueue queue;
  s.pipe.InitBuffer(queue, 2, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  DataCopy(mine, s.x, kCount);
  queue.EnQue(mine);
  mine = queue.DeQue<float>();  // HERE
  Adds(s.b, mine, 1.0f, kCount);
  if (right) {
    queue.FreeTensor(mine);
  }
}

KERNEL(never_dequeued) {
  Scratch s(x, y);
  InQueue queue;
  s.pipe.InitBuffer(queue, 2, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  queue.EnQue(mine);  // HERE
  if (right) {
    mine = queue.DeQue<float>();
    queue.FreeTensor(mine);
  }
}

// ---- flags ----

KERNEL(set_twice) {
  Scratch s(x, y);
  SetFlag<HardEvent::MTE2_V>(EVENT_ID0);  // FIRST
  if (right) {
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
    Order<HardEvent::V_MTE2>();
  }
  SetFlag<HardEvent::MTE2_V>(EVENT_ID0);  // HERE
  WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
  if (!right) {
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
  }
}

// V may not have come to its wait when MTE2, which does not wait for V, sets the flag again.
KERNEL(set_before_taken) {
  Scratch s(x, y);
  for (uint32_t tile = 0; tile < 2; ++tile) {
    if (tile > 0 && right) {
      WaitFlag<HardEvent::V_MTE2>(EVENT_ID0);
    }
    DataCopy(s.a[tile * kCount], s.x[tile * kCount], kCount);
    SetFlag<HardEvent::MTE2_V>(EVENT_ID0);   // HERE
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);  // FIRST
    Adds(s.b[tile * kCount], s.a[tile * kCount], 1.0f, kCount);
    if (tile == 0 && right) {
      SetFlag<HardEvent::V_MTE2>(EVENT_ID0);
    }
  }
}

// A barrier of the waiting pipe tells the setting one nothing.
KERNEL(set_after_barrier) {
  Scratch s(x, y);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID4);
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID4);  // FIRST
  if (right) {
    PipeBarrier<PIPE_ALL>();
  } else {
    PipeBarrier<PIPE_MTE3>();
    PipeBarrier<PIPE_V>();
  }
  SetFlag<HardEvent::V_MTE3>(EVENT_ID4);  // HERE
  WaitFlag<HardEvent::V_MTE3>(EVENT_ID4);
}

// The scalar unit issues what follows its own wait only then; how far V is it does not know.
KERNEL(set_by_issue) {
  Scratch s(x, y);
  for (uint32_t i = 0; i < 2; ++i) {
    if (right) {
      SetFlag<HardEvent::V_S>(EVENT_ID0);
      WaitFlag<HardEvent::V_S>(EVENT_ID0);
    } else {
      SetFlag<HardEvent::S_V>(EVENT_ID0);   // HERE
      WaitFlag<HardEvent::S_V>(EVENT_ID0);  // FIRST
    }
  }
}

// With an id for each tile nothing has to come back.
KERNEL(set_two_ids) {
  Scratch s(x, y);
  for (int32_t tile = 0; tile < 2; ++tile) {
    const int32_t id = right ? tile : 0;
    SetFlag<HardEvent::MTE2_MTE3>(id);   // HERE
    WaitFlag<HardEvent::MTE2_MTE3>(id);  // FIRST
  }
}

KERNEL(never_waited) {
  Scratch s(x, y);
  SetFlag<HardEvent::V_MTE3>(EVENT_ID3);  // HERE
  if (right) {
    WaitFlag<HardEvent::V_MTE3>(EVENT_ID3);
  }
}

KERNEL(wait_of_nothing) {
  Scratch s(x, y);
  if (right) {
    SetFlag<HardEvent::MTE2_V>(EVENT_ID2);
  }
  WaitFlag<HardEvent::MTE2_V>(EVENT_ID2);  // HERE
}

KERNEL(wait_twice) {
  Scratch s(x, y);
  SetFlag<HardEvent::MTE2_V>(EVENT_ID2);
  WaitFlag<HardEvent::MTE2_V>(EVENT_ID2);
  if (!right) {
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID2);  // HERE
  }
}

KERNEL(another_id) {
  Scratch s(x, y);
  SetFlag<HardEvent::MTE2_V>(EVENT_ID1);
  WaitFlag<HardEvent::MTE2_V>(right ? EVENT_ID1 : EVENT_ID2);  // HERE
}

KERNEL(another_event) {
  Scratch s(x, y);
  SetFlag<HardEvent::MTE2_V>(EVENT_ID1);
  if (right) {
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID1);
  } else {
    WaitFlag<HardEvent::V_MTE2>(EVENT_ID1);  // HERE
  }
}

KERNEL(wait_before_set) {
  Scratch s(x, y);
  if (!right) {
    WaitFlag<HardEvent::V_MTE2>(EVENT_ID1);  // HERE
  }
  SetFlag<HardEvent::V_MTE2>(EVENT_ID1);
  if (right) {
    WaitFlag<HardEvent::V_MTE2>(EVENT_ID1);
  }
}

// The queue's own flag has this id: between EnQue and DeQue it is set.
KERNEL(id_of_a_queue) {
  Scratch s(x, y);
  InQueue queue;
  s.pipe.InitBuffer(queue, 1, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  DataCopy(mine, s.x, kCount);
  queue.EnQue(mine);
  TEventID id = EVENT_ID0;
  if (right) {
    id = s.pipe.AllocEventID<HardEvent::MTE2_V>();
  }
  SetFlag<HardEvent::MTE2_V>(id);  // HERE
  WaitFlag<HardEvent::MTE2_V>(id);
  if (right) {
    s.pipe.ReleaseEventID<HardEvent::MTE2_V>(id);
  }
  mine = queue.DeQue<float>();
  queue.FreeTensor(mine);
}

// The other way round: a flag of one's own is set when the queue wants that id.
KERNEL(id_wanted_by_a_queue) {
  Scratch s(x, y);
  InQueue queue;
  s.pipe.InitBuffer(queue, 1, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  TEventID id = EVENT_ID0;
  if (right) {
    id = s.pipe.AllocEventID<HardEvent::MTE2_V>();
  }
  SetFlag<HardEvent::MTE2_V>(id);  // FIRST
  queue.EnQue(mine);               // HERE
  WaitFlag<HardEvent::MTE2_V>(id);
  if (right) {
    s.pipe.ReleaseEventID<HardEvent::MTE2_V>(id);
  }
  mine = queue.DeQue<float>();
  queue.FreeTensor(mine);
}

// A wait that would take away the flag of a queue.
KERNEL(flag_of_a_queue) {
  Scratch s(x, y);
  InQueue queue;
  s.pipe.InitBuffer(queue, 1, kBytes);
  LocalTensor<float> mine = queue.AllocTensor<float>();
  queue.EnQue(mine);
  if (!right) {
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);  // HERE
  }
  mine = queue.DeQue<float>();
  queue.FreeTensor(mine);
}

// Here the argument is the id itself.
KERNEL(set_id) {
  Scratch s(x, y);
  SetFlag<HardEvent::MTE2_V>(right);  // HERE
  WaitFlag<HardEvent::MTE2_V>(right);
}

KERNEL(wait_id) {
  Scratch s(x, y);
  SetFlag<HardEvent::MTE2_V>(EVENT_ID7);
  WaitFlag<HardEvent::MTE2_V>(right);  // HERE
}

// And here how many ids are taken at once.
KERNEL(ids_run_out) {
  Scratch s(x, y);
  TEventID ids[16];
  for (int32_t i = 0; i < right; ++i) {
    ids[i] = s.pipe.AllocEventID<HardEvent::V_S>();  // HERE
  }
  for (int32_t i = 0; i < right; ++i) {
    s.pipe.ReleaseEventID<HardEvent::V_S>(ids[i]);
  }
}

KERNEL(id_released_twice) {
  Scratch s(x, y);
  TEventID id = s.pipe.AllocEventID<HardEvent::V_S>();
  s.pipe.ReleaseEventID<HardEvent::V_S>(id);
  if (!right) {
    s.pipe.ReleaseEventID<HardEvent::V_S>(id);  // HERE
  }
}

KERNEL(id_never_released) {
  Scratch s(x, y);
  TEventID id = s.pipe.AllocEventID<HardEvent::V_S>();  // HERE
  SetFlag<HardEvent::V_S>(id);
  WaitFlag<HardEvent::V_S>(id);
  if (right) {
    s.pipe.ReleaseEventID<HardEvent::V_S>(id);
  }
}
