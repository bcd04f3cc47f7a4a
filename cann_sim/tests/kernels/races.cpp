// Two accesses of the same bytes from two pipes (or twice from one that does not wait for itself): a race, unless
// `ordered` asks for the flag or barrier between them. Each kernel must fail without it and pass with it.
#include "scratch.h"

#define KERNEL(name) extern "C" __global__ __aicore__ void name(GM_ADDR x, GM_ADDR y, int32_t ordered)

// ---- UB: copies in, vector unit, copies out ----

KERNEL(mte2_v_raw) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE2_V>();
  }
  Adds(s.b, s.a, 1.0f, kCount);  // HERE
}

KERNEL(mte2_v_waw) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE2_V>();
  }
  Duplicate(s.a, 0.0f, kCount);  // HERE
}

KERNEL(v_mte2_war) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a, 1.0f, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::V_MTE2>();
  }
  DataCopy(s.a, s.x, kCount);  // HERE
}

KERNEL(v_mte2_waw) {
  Scratch s(x, y);
  Duplicate(s.a, 0.0f, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::V_MTE2>();
  }
  DataCopy(s.a, s.x, kCount);  // HERE
}

KERNEL(v_mte3_raw) {
  Scratch s(x, y);
  Duplicate(s.a, 0.0f, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::V_MTE3>();
  }
  DataCopy(s.y, s.a, kCount);  // HERE
}

KERNEL(mte3_v_war) {
  Scratch s(x, y);
  s.Fill();
  DataCopy(s.y, s.a, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE3_V>();
  }
  Duplicate(s.a, 0.0f, kCount);  // HERE
}

KERNEL(mte2_mte3_raw) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE2_MTE3>();
  }
  DataCopy(s.y, s.a, kCount);  // HERE
}

KERNEL(mte3_mte2_war) {
  Scratch s(x, y);
  s.Fill();
  DataCopy(s.y, s.a, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE3_MTE2>();
  }
  DataCopy(s.a, s.x, kCount);  // HERE
}

KERNEL(mte2_mte2_waw) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, kCount);  // FIRST
  if (ordered) {
    PipeBarrier<PIPE_MTE2>();
  }
  DataCopy(s.a, s.y, kCount);  // HERE
}

// ---- UB: the vector unit with itself ----

KERNEL(v_v_raw) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a, 1.0f, kCount);  // FIRST
  if (ordered) {
    PipeBarrier<PIPE_V>();
  }
  Adds(s.c, s.b, 1.0f, kCount);  // HERE
}

KERNEL(v_v_war) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a, 1.0f, kCount);  // FIRST
  if (ordered) {
    PipeBarrier<PIPE_V>();
  }
  Adds(s.a, s.c, 1.0f, kCount);  // HERE
}

KERNEL(v_v_waw) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a, 1.0f, kCount);  // FIRST
  if (ordered) {
    PipeBarrier<PIPE_V>();
  }
  Adds(s.b, s.c, 1.0f, kCount);  // HERE
}

// The second instruction reads the same bytes too; that must not hide the first one's read.
KERNEL(v_v_war_in_place) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a, 1.0f, kCount);  // FIRST
  if (ordered) {
    PipeBarrier<PIPE_V>();
  }
  Adds(s.a, s.a, 1.0f, kCount);  // HERE
}

// Only the last 32 bytes are shared.
KERNEL(v_v_one_block) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a, 1.0f, kCount);  // FIRST
  if (ordered) {
    PipeBarrier<PIPE_V>();
  }
  Adds(s.c, s.b[kCount - 8], 1.0f, kCount);  // HERE
}

// A barrier orders the pipe it names and no other.
KERNEL(barrier_of_another_pipe) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a, 1.0f, kCount);  // FIRST
  if (ordered) {
    PipeBarrier<PIPE_ALL>();
  } else {
    PipeBarrier<PIPE_MTE2>();
  }
  Adds(s.c, s.b, 1.0f, kCount);  // HERE
}

// ---- UB: the scalar unit ----

KERNEL(s_v_raw) {
  Scratch s(x, y);
  s.Fill();
  s.a.SetValue(3, 2.0f);  // FIRST
  if (ordered) {
    Order<HardEvent::S_V>();
  }
  Adds(s.b, s.a, 1.0f, kCount);  // HERE
}

KERNEL(s_v_waw) {
  Scratch s(x, y);
  s.a.SetValue(3, 2.0f);  // FIRST
  if (ordered) {
    Order<HardEvent::S_V>();
  }
  Duplicate(s.a, 0.0f, kCount);  // HERE
}

KERNEL(s_v_war) {
  Scratch s(x, y);
  s.Fill();
  s.b.SetValue(0, s.a.GetValue(0));  // FIRST
  if (ordered) {
    Order<HardEvent::S_V>();
  }
  Duplicate(s.a, 0.0f, kCount);  // HERE
}

KERNEL(v_s_raw) {
  Scratch s(x, y);
  Duplicate(s.a, 0.0f, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::V_S>();
  }
  float value = s.a.GetValue(kCount - 1);  // HERE
  s.b.SetValue(0, value);
}

KERNEL(v_s_war) {
  Scratch s(x, y);
  s.Fill();
  Adds(s.b, s.a, 1.0f, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::V_S>();
  }
  s.a.SetValue(0, 2.0f);  // HERE
}

KERNEL(v_s_waw) {
  Scratch s(x, y);
  Duplicate(s.a, 0.0f, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::V_S>();
  }
  s.a.SetValue(0, 2.0f);  // HERE
}

KERNEL(mte2_s_raw) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE2_S>();
  }
  s.b.SetValue(0, s.a.GetValue(0));  // HERE
}

KERNEL(mte2_s_waw) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE2_S>();
  }
  s.a.SetValue(0, 2.0f);  // HERE
}

KERNEL(s_mte2_waw) {
  Scratch s(x, y);
  s.a.SetValue(0, 2.0f);  // FIRST
  if (ordered) {
    Order<HardEvent::S_MTE2>();
  }
  DataCopy(s.a, s.x, kCount);  // HERE
}

KERNEL(s_mte2_war) {
  Scratch s(x, y);
  s.Fill();
  s.b.SetValue(0, s.a.GetValue(0));  // FIRST
  if (ordered) {
    Order<HardEvent::S_MTE2>();
  }
  DataCopy(s.a, s.x, kCount);  // HERE
}

KERNEL(s_mte3_raw) {
  Scratch s(x, y);
  s.Fill();
  s.a.SetValue(0, 2.0f);  // FIRST
  if (ordered) {
    Order<HardEvent::S_MTE3>();
  }
  DataCopy(s.y, s.a, kCount);  // HERE
}

KERNEL(mte3_s_war) {
  Scratch s(x, y);
  s.Fill();
  DataCopy(s.y, s.a, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE3_S>();
  }
  s.a.SetValue(0, 2.0f);  // HERE
}

// The scalar unit has waited for V, but what MTE3 is told later waits for nobody.
KERNEL(v_s_does_not_order_mte3) {
  Scratch s(x, y);
  Duplicate(s.a, 0.0f, kCount);  // FIRST
  Order<HardEvent::V_S>();
  if (ordered) {
    Order<HardEvent::S_MTE3>();
  }
  DataCopy(s.y, s.a, kCount);  // HERE
}

// ---- GM within one core ----

KERNEL(gm_mte3_mte2_raw) {
  Scratch s(x, y);
  s.Fill();
  DataCopy(s.y, s.a, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE3_MTE2>();
  }
  DataCopy(s.b, s.y, kCount);  // HERE
}

KERNEL(gm_mte2_mte3_war) {
  Scratch s(x, y);
  s.Fill();
  DataCopy(s.b, s.x, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE2_MTE3>();
  }
  DataCopy(s.x, s.a, kCount);  // HERE
}

KERNEL(gm_mte3_mte3_waw) {
  Scratch s(x, y);
  s.Fill();
  DataCopy(s.y, s.a, kCount);  // FIRST
  if (ordered) {
    PipeBarrier<PIPE_MTE3>();
  }
  DataCopy(s.y[kCount - 8], s.b, kCount);  // HERE
}

KERNEL(gm_s_mte2_raw) {
  Scratch s(x, y);
  s.x.SetValue(0, 2.0f);  // FIRST
  if (ordered) {
    DataCacheCleanAndInvalid<float, CacheLine::ENTIRE_DATA_CACHE, DcciDst::CACHELINE_OUT>(s.x);
    Order<HardEvent::S_MTE2>();
  }
  DataCopy(s.b, s.x, kCount);  // HERE
}

KERNEL(gm_s_mte3_waw) {
  Scratch s(x, y);
  s.Fill();
  s.y.SetValue(0, 2.0f);  // FIRST
  if (ordered) {
    DataCacheCleanAndInvalid<float, CacheLine::ENTIRE_DATA_CACHE, DcciDst::CACHELINE_OUT>(s.y);
    Order<HardEvent::S_MTE3>();
  }
  DataCopy(s.y, s.a, kCount);  // HERE
}

KERNEL(gm_s_mte3_war) {
  Scratch s(x, y);
  s.Fill();
  s.b.SetValue(0, s.x.GetValue(0));  // FIRST
  if (ordered) {
    Order<HardEvent::S_MTE3>();
  }
  DataCopy(s.x, s.a, kCount);  // HERE
}

KERNEL(gm_mte2_s_war) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE2_S>();
  }
  s.x.SetValue(0, 2.0f);  // HERE
}

KERNEL(gm_mte3_s_raw) {
  Scratch s(x, y);
  s.Fill();
  DataCopy(s.y, s.a, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE3_S>();
    DataCacheCleanAndInvalid<float, CacheLine::ENTIRE_DATA_CACHE, DcciDst::CACHELINE_OUT>(s.y);
  }
  float value = s.y.GetValue(0);  // HERE
  s.c.SetValue(0, value);
}

KERNEL(gm_mte3_s_waw) {
  Scratch s(x, y);
  s.Fill();
  DataCopy(s.y, s.a, kCount);  // FIRST
  if (ordered) {
    Order<HardEvent::MTE3_S>();
  }
  s.y.SetValue(0, 2.0f);  // HERE
}

// ---- flags that are there and do not help ----

// The flag stands before the copy that matters.
KERNEL(flag_too_early) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, kCount);
  if (!ordered) {
    SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  }
  DataCopy(s.b, s.x, kCount);  // FIRST
  if (ordered) {
    SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  }
  WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
  Add(s.c, s.a, s.b, kCount);  // HERE
}

// The wait stands behind the instruction that needs it.
KERNEL(wait_too_late) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, kCount);  // FIRST
  SetFlag<HardEvent::MTE2_V>(EVENT_ID0);
  if (ordered) {
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
  }
  Adds(s.b, s.a, 1.0f, kCount);  // HERE
  if (!ordered) {
    WaitFlag<HardEvent::MTE2_V>(EVENT_ID0);
  }
}

// Right for the first tile, and the second reuses the buffer too soon.
KERNEL(second_tile) {
  Scratch s(x, y);
  for (uint32_t tile = 0; tile < 2; ++tile) {
    if (ordered && tile > 0) {
      WaitFlag<HardEvent::V_MTE2>(EVENT_ID0);
    }
    DataCopy(s.a, s.x[tile * kCount], kCount);  // HERE
    Order<HardEvent::MTE2_V>();
    Adds(s.b[tile * kCount], s.a, 1.0f, kCount);  // FIRST
    if (ordered && tile == 0) {
      SetFlag<HardEvent::V_MTE2>(EVENT_ID0);
    }
  }
}

// Rows of 4 floats at a distance of 64 bytes: only one row is touched too early.
KERNEL(strided_row) {
  Scratch s(x, y);
  s.Fill();
  DataCopyPad(s.a, s.x, DataCopyExtParams{8, 16, 0, 1, 0}, NoPad());  // FIRST
  if (ordered) {
    Order<HardEvent::MTE2_V>();
  }
  Adds(s.b, s.a[3 * 16], 1.0f, 8);  // HERE
}

// The tensor goes to the vector unit without passing through its queue.
KERNEL(queue_passed_by) {
  Scratch s(x, y);
  TQue<TPosition::VECIN, 1> queue;
  s.pipe.InitBuffer(queue, 2, kCount * sizeof(float));
  LocalTensor<float> in = queue.AllocTensor<float>();
  DataCopy(in, s.x, kCount);  // FIRST
  if (ordered) {
    queue.EnQue(in);
    in = queue.DeQue<float>();
  }
  Adds(s.b, in, 1.0f, kCount);  // HERE
  queue.FreeTensor(in);
}

// A queue of the copies in orders MTE2 and V, not the scalar unit.
KERNEL(queue_does_not_order_s) {
  Scratch s(x, y);
  TQue<TPosition::VECIN, 1> queue;
  s.pipe.InitBuffer(queue, 2, kCount * sizeof(float));
  LocalTensor<float> in = queue.AllocTensor<float>();
  DataCopy(in, s.x, kCount);  // FIRST
  queue.EnQue(in);
  in = queue.DeQue<float>();
  if (ordered) {
    Order<HardEvent::MTE2_S>();
  }
  s.b.SetValue(0, in.GetValue(0));  // HERE
  queue.FreeTensor(in);
}

// A queue of the copies out orders V and MTE3, not two vector instructions.
KERNEL(queue_does_not_order_v) {
  Scratch s(x, y);
  s.Fill();
  TQue<TPosition::VECOUT, 1> queue;
  s.pipe.InitBuffer(queue, 2, kCount * sizeof(float));
  LocalTensor<float> out = queue.AllocTensor<float>();
  Adds(out, s.a, 1.0f, kCount);  // FIRST
  queue.EnQue(out);
  out = queue.DeQue<float>();
  if (ordered) {
    PipeBarrier<PIPE_V>();
  }
  Adds(s.b, out, 1.0f, kCount);  // HERE
  queue.FreeTensor(out);
}
