// Kernels that keep every rule, in the styles that real ones are written in: none of them may be refused, and their
// results have to be right.
#include "scratch.h"

// By value, as kernels get their tiling.
struct Rows {
  uint32_t rows, columns, pitch;  // pitch: elements from one row to the next
};

// ---- z = x + y with two buffers a queue; tails of any length; elements dealt out to the cores ----

template <typename T>
class AddTiles {
 public:
  __aicore__ inline void Init(GM_ADDR x, GM_ADDR y, GM_ADDR z, uint32_t total, uint32_t tile) {
    const uint32_t share = (total + GetBlockNum() - 1) / GetBlockNum();
    begin_ = share * GetBlockIdx();
    begin_ = begin_ < total ? begin_ : total;
    end_ = begin_ + share < total ? begin_ + share : total;
    tile_ = tile;
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x), total);
    y_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(y), total);
    z_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(z), total);
    pipe_.InitBuffer(in_x_, 2, tile * sizeof(T));
    pipe_.InitBuffer(in_y_, 2, tile * sizeof(T));
    pipe_.InitBuffer(out_z_, 2, tile * sizeof(T));
  }

  __aicore__ inline void Process() {
    for (uint32_t offset = begin_; offset < end_; offset += tile_) {
      const uint32_t count = end_ - offset < tile_ ? end_ - offset : tile_;
      CopyIn(offset, count);
      Compute(count);
      CopyOut(offset, count);
    }
  }

 private:
  __aicore__ inline void CopyIn(uint32_t offset, uint32_t count) {
    const DataCopyExtParams copy{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0};
    const DataCopyPadExtParams<T> pad{false, 0, 0, static_cast<T>(0)};
    LocalTensor<T> x = in_x_.template AllocTensor<T>();
    LocalTensor<T> y = in_y_.template AllocTensor<T>();
    DataCopyPad(x, x_[offset], copy, pad);
    DataCopyPad(y, y_[offset], copy, pad);
    in_x_.EnQue(x);
    in_y_.EnQue(y);
  }

  __aicore__ inline void Compute(uint32_t count) {
    LocalTensor<T> x = in_x_.template DeQue<T>();
    LocalTensor<T> y = in_y_.template DeQue<T>();
    LocalTensor<T> z = out_z_.template AllocTensor<T>();
    Add(z, x, y, count);
    out_z_.EnQue(z);
    in_x_.FreeTensor(x);
    in_y_.FreeTensor(y);
  }

  __aicore__ inline void CopyOut(uint32_t offset, uint32_t count) {
    LocalTensor<T> z = out_z_.template DeQue<T>();
    DataCopyPad(z_[offset], z, DataCopyExtParams{1, static_cast<uint32_t>(count * sizeof(T)), 0, 0, 0});
    out_z_.FreeTensor(z);
  }

  TPipe pipe_;
  TQue<TPosition::VECIN, 1> in_x_, in_y_;
  TQue<TPosition::VECOUT, 1> out_z_;
  GlobalTensor<T> x_, y_, z_;
  uint32_t begin_, end_, tile_;
};

extern "C" __global__ __aicore__ void add_float(GM_ADDR x, GM_ADDR y, GM_ADDR z, uint32_t total, uint32_t tile) {
  AddTiles<float> op;
  op.Init(x, y, z, total, tile);
  op.Process();
}

extern "C" __global__ __aicore__ void add_half(GM_ADDR x, GM_ADDR y, GM_ADDR z, uint32_t total, uint32_t tile) {
  AddTiles<half> op;
  op.Init(x, y, z, total, tile);
  op.Process();
}

// ---- softmax of rows: the row's maximum and sum pass through the scalar unit ----

extern "C" __global__ __aicore__ void softmax(GM_ADDR x, GM_ADDR y, Rows shape) {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  TBuf<TPosition::VECCALC> result, work;
  const uint32_t bytes = shape.columns * sizeof(float);
  pipe.InitBuffer(in, 2, bytes);
  pipe.InitBuffer(out, 2, bytes);
  pipe.InitBuffer(result, 32);
  pipe.InitBuffer(work, bytes);
  LocalTensor<float> value = result.Get<float>();
  LocalTensor<float> shared = work.Get<float>();
  GlobalTensor<float> from, to;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x));
  to.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y));
  const TEventID v_s = pipe.AllocEventID<HardEvent::V_S>();
  const TEventID s_v = pipe.AllocEventID<HardEvent::S_V>();
  for (uint32_t row = GetBlockIdx(); row < shape.rows; row += GetBlockNum()) {
    const uint64_t start = static_cast<uint64_t>(row) * shape.pitch;
    LocalTensor<float> a = in.AllocTensor<float>();
    DataCopyPad(a, from[start], DataCopyExtParams{1, bytes, 0, 0, 0}, NoPad());
    in.EnQue(a);
    a = in.DeQue<float>();
    LocalTensor<float> b = out.AllocTensor<float>();

    ReduceMax(value, a, shared, shape.columns);
    SetFlag<HardEvent::V_S>(v_s);
    WaitFlag<HardEvent::V_S>(v_s);
    const float maximum = value.GetValue(0);
    SetFlag<HardEvent::S_V>(s_v);
    WaitFlag<HardEvent::S_V>(s_v);
    Adds(b, a, -maximum, shape.columns);
    PipeBarrier<PIPE_V>();
    Exp(b, b, shape.columns);
    PipeBarrier<PIPE_V>();
    ReduceSum(value, b, shared, shape.columns);
    SetFlag<HardEvent::V_S>(v_s);
    WaitFlag<HardEvent::V_S>(v_s);
    const float sum = value.GetValue(0);
    SetFlag<HardEvent::S_V>(s_v);
    WaitFlag<HardEvent::S_V>(s_v);
    Muls(b, b, 1.0f / sum, shape.columns);

    in.FreeTensor(a);
    out.EnQue(b);
    b = out.DeQue<float>();
    DataCopyPad(to[start], b, DataCopyExtParams{1, bytes, 0, 0, 0});
    out.FreeTensor(b);
  }
  pipe.ReleaseEventID<HardEvent::V_S>(v_s);
  pipe.ReleaseEventID<HardEvent::S_V>(s_v);
}

// ---- rows of 64 divided by their sums, eight at a time: V writes the sums that the scalar unit reads ----

extern "C" __global__ __aicore__ void scale_rows(GM_ADDR x, GM_ADDR y, uint32_t tiles) {
  constexpr uint32_t kRows = 8, kColumns = 64, kTile = kRows * kColumns;
  TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  TBuf<TPosition::VECCALC> result;
  pipe.InitBuffer(in, 2, kTile * sizeof(float));
  pipe.InitBuffer(out, 2, kTile * sizeof(float));
  pipe.InitBuffer(result, kRows * sizeof(float));
  LocalTensor<float> sums = result.Get<float>();
  GlobalTensor<float> from, to;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x));
  to.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y));
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    LocalTensor<float> a = in.AllocTensor<float>();
    DataCopy(a, from[tile * kTile], kTile);
    in.EnQue(a);
    a = in.DeQue<float>();
    LocalTensor<float> b = out.AllocTensor<float>();
    WholeReduceSum(sums, a, kColumns, kRows, 1, 1, 8);
    Order<HardEvent::V_S>();
    for (uint32_t row = 0; row < kRows; ++row) {
      const float scale = 1.0f / sums.GetValue(row);
      Muls(b[row * kColumns], a[row * kColumns], scale, kColumns);
    }
    Order<HardEvent::S_V>();
    in.FreeTensor(a);
    out.EnQue(b);
    b = out.DeQue<float>();
    DataCopy(to[tile * kTile], b, kTile);
    out.FreeTensor(b);
  }
}

// ---- a block of a matrix, doubled: strides in bytes on GM, in 32-byte units in UB, where the rows lie apart ----

extern "C" __global__ __aicore__ void strided_block(GM_ADDR x, GM_ADDR y, Rows shape) {
  TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  const uint32_t width = (shape.columns + 7) / 8 * 8 + 8;  // a row in UB: whole blocks, and one block of gap
  pipe.InitBuffer(in, 1, shape.rows * width * sizeof(float));
  pipe.InitBuffer(out, 1, shape.rows * width * sizeof(float));
  GlobalTensor<float> from, to;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x));
  to.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y));
  const uint16_t rows = static_cast<uint16_t>(shape.rows);
  const uint32_t bytes = shape.columns * sizeof(float);
  const uint32_t skip = (shape.pitch - shape.columns) * sizeof(float);
  const uint8_t tail = static_cast<uint8_t>((8 - shape.columns % 8) % 8);
  LocalTensor<float> a = in.AllocTensor<float>();
  DataCopyPad(a, from, DataCopyExtParams{rows, bytes, skip, 1, 0}, DataCopyPadExtParams<float>{true, 0, tail, 5.0f});
  in.EnQue(a);
  a = in.DeQue<float>();
  LocalTensor<float> b = out.AllocTensor<float>();
  for (uint32_t row = 0; row < shape.rows; ++row) {
    Adds(b[row * width], a[row * width], 0.5f, width - 8);  // the padding as well
  }
  in.FreeTensor(a);
  out.EnQue(b);
  b = out.DeQue<float>();
  DataCopyPad(to, b, DataCopyExtParams{rows, bytes, 1, skip, 0});
  out.FreeTensor(b);
}

// ---- one TBuf in parts and in two types, without queues: y = half(x) + 1, as float ----

extern "C" __global__ __aicore__ void parts_of_a_buffer(GM_ADDR x, GM_ADDR y, uint32_t total) {
  TPipe pipe;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(buffer, 12 * 128);
  LocalTensor<float> wide = buffer.Get<float>(128);
  LocalTensor<half> narrow = buffer.GetWithOffset<half>(128, 4 * 128);
  LocalTensor<float> result = buffer.GetWithOffset<float>(128, 8 * 128);
  GlobalTensor<float> from, to;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x), total);
  to.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y), total);
  for (uint32_t offset = 0; offset < total; offset += 128) {
    if (offset > 0) {
      WaitFlag<HardEvent::V_MTE2>(EVENT_ID0);
      WaitFlag<HardEvent::MTE3_V>(EVENT_ID0);
    }
    DataCopy(wide, from[offset], 128);
    Order<HardEvent::MTE2_V>();
    Cast(narrow, wide, RoundMode::CAST_RINT, 128);
    PipeBarrier<PIPE_V>();
    Adds(narrow, narrow, static_cast<half>(1.0f), 128);
    PipeBarrier<PIPE_V>();
    Cast(result, narrow, RoundMode::CAST_NONE, 128);
    Order<HardEvent::V_MTE3>();
    DataCopy(to[offset], result, 128);
    if (offset + 128 < total) {
      SetFlag<HardEvent::V_MTE2>(EVENT_ID0);
      SetFlag<HardEvent::MTE3_V>(EVENT_ID0);
    }
  }
}

// ---- x += 1 in GM, a tile at a time: the read of a tile is ordered before its write by the two queues ----

extern "C" __global__ __aicore__ void in_place(GM_ADDR x, uint32_t total) {
  constexpr uint32_t kTile = 64;
  TPipe pipe;
  TQue<TPosition::VECIN, 1> in;
  TQue<TPosition::VECOUT, 1> out;
  pipe.InitBuffer(in, 2, kTile * sizeof(float));
  pipe.InitBuffer(out, 2, kTile * sizeof(float));
  GlobalTensor<float> data;
  data.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x), total);
  for (uint32_t offset = GetBlockIdx() * kTile; offset < total; offset += GetBlockNum() * kTile) {
    LocalTensor<float> a = in.AllocTensor<float>();
    DataCopy(a, data[offset], kTile);
    in.EnQue(a);
    a = in.DeQue<float>();
    LocalTensor<float> b = out.AllocTensor<float>();
    Adds(b, a, 1.0f, kTile);
    out.EnQue(b);
    in.FreeTensor(a);
    b = out.DeQue<float>();
    DataCopy(data[offset], b, kTile);
    out.FreeTensor(b);
  }
}

// ---- the same tile of GM again and again: each round needs what the round before wrote ----

extern "C" __global__ __aicore__ void rounds_in_gm(GM_ADDR workspace, GM_ADDR y, uint32_t rounds) {
  Scratch s(workspace, y);
  Duplicate(s.a, 0.0f, kCount);
  Order<HardEvent::V_MTE3>();
  DataCopy(s.x, s.a, kCount);
  for (uint32_t i = 0; i < rounds; ++i) {
    Order<HardEvent::MTE3_MTE2>();
    DataCopy(s.a, s.x, kCount);
    Order<HardEvent::MTE2_V>();
    Adds(s.a, s.a, 1.0f, kCount);  // in place: source and destination are the same bytes
    Order<HardEvent::V_MTE3>();
    DataCopy(s.x, s.a, kCount);
  }
  DataCopy(s.y, s.a, kCount);  // both copies out only read it
}

// ---- a copy without any computation: one buffer that is input and output ----

extern "C" __global__ __aicore__ void pass_through(GM_ADDR x, GM_ADDR y, uint32_t total) {
  TPipe pipe;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 1> bound;
  pipe.InitBuffer(bound, 2, 1024);
  GlobalTensor<float> from, to;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x), total);
  to.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y), total);
  for (uint32_t offset = 0; offset < total; offset += 256) {
    LocalTensor<float> a = bound.AllocTensor<float>();
    DataCopy(a, from[offset], 256);
    bound.EnQue(a);
    a = bound.DeQue<float>();
    DataCopy(to[offset], a, 256);
    bound.FreeTensor(a);
  }
}

// ---- two tiles on their way in before the first is used ----

extern "C" __global__ __aicore__ void preload(GM_ADDR x, GM_ADDR y, uint32_t tiles) {
  constexpr uint32_t kTile = 64;
  TPipe pipe;
  TQue<TPosition::VECIN, 2> in;
  TQue<TPosition::VECOUT, 1> out;
  pipe.InitBuffer(in, 2, kTile * sizeof(float));
  pipe.InitBuffer(out, 1, kTile * sizeof(float));
  GlobalTensor<float> from, to;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x));
  to.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y));
  for (uint32_t tile = 0; tile <= tiles; ++tile) {
    if (tile < tiles) {
      LocalTensor<float> a = in.AllocTensor<float>();
      DataCopy(a, from[tile * kTile], kTile);
      in.EnQue(a);
    }
    if (tile > 0) {
      LocalTensor<float> a = in.DeQue<float>();
      LocalTensor<float> b = out.AllocTensor<float>();
      Muls(b, a, 2.0f, kTile);
      in.FreeTensor(a);
      out.EnQue(b);
      b = out.DeQue<float>();
      DataCopy(to[(tile - 1) * kTile], b, kTile);
      out.FreeTensor(b);
    }
  }
}

// ---- one number a core, written by the scalar unit: each core has a line of 64 bytes ----

extern "C" __global__ __aicore__ void line_per_core(GM_ADDR y) {
  GlobalTensor<float> to;
  to.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y));
  to.SetValue(GetBlockIdx() * 16, static_cast<float>(GetBlockIdx() + 1));
  DataCacheCleanAndInvalid<float, CacheLine::SINGLE_CACHE_LINE, DcciDst::CACHELINE_OUT>(to[GetBlockIdx() * 16]);
}

// ---- one number a core, copied out: neighbours may share a line then ----

extern "C" __global__ __aicore__ void number_per_core(GM_ADDR y) {
  Scratch s(y, y);
  Duplicate(s.a, static_cast<float>(GetBlockIdx() + 1), 8);
  Order<HardEvent::V_MTE3>();
  DataCopyPad(s.y[GetBlockIdx()], s.a, DataCopyExtParams{1, sizeof(float), 0, 0, 0});
}

// ---- cores that have nothing to do, and outputs that only some of them read as inputs ----

extern "C" __global__ __aicore__ void all_read_one_writes(GM_ADDR x, GM_ADDR y) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, kCount);
  if (GetBlockIdx() != 0) {
    return;
  }
  Order<HardEvent::MTE2_V>();
  Adds(s.b, s.a, 1.0f, kCount);
  Order<HardEvent::V_MTE3>();
  DataCopy(s.y, s.b, kCount);
}

// ---- orderings that pass through other pipes ----

// MTE2 waits for MTE3, which waited for V: so MTE2 may overwrite what V read.
extern "C" __global__ __aicore__ void ordered_by_others(GM_ADDR x, GM_ADDR y) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, kCount);
  Order<HardEvent::MTE2_V>();
  Adds(s.b, s.a, 1.0f, kCount);
  Order<HardEvent::V_MTE3>();
  DataCopy(s.y, s.b, kCount);
  Order<HardEvent::MTE3_MTE2>();
  DataCopy(s.a, s.x[kCount], kCount);
  Order<HardEvent::MTE2_V>();
  Adds(s.b, s.a, 1.0f, kCount);  // V waits for MTE2, which waited for MTE3, so b is free again
  Order<HardEvent::V_MTE3>();
  DataCopy(s.y[kCount], s.b, kCount);
}

// Only reads: nothing to order.
extern "C" __global__ __aicore__ void reads_of_one_tensor(GM_ADDR x, GM_ADDR y) {
  Scratch s(x, y);
  DataCopy(s.a, s.x, kCount);
  Order<HardEvent::MTE2_V>();
  Adds(s.b, s.a, 1.0f, kCount);
  Muls(s.c, s.a, 2.0f, kCount);
  PipeBarrier<PIPE_ALL>();
  DataCopy(s.y, s.b, kCount);
  DataCopy(s.y[kCount], s.c, kCount);
  DataCopy(s.y[2 * kCount], s.b, kCount);
}

// ---- the same tensor object all the way (a depth of 0), and the other spellings of a flag ----

extern "C" __global__ __aicore__ void other_spellings(GM_ADDR x, GM_ADDR y, uint32_t tiles) {
  constexpr uint32_t kTile = 64;
  TPipe pipe;
  TQue<TPosition::VECIN, 0> in;
  TBuf<TPosition::VECCALC> buffer;
  pipe.InitBuffer(in, 2, kTile * sizeof(float));
  pipe.InitBuffer(buffer, kTile * sizeof(float));
  LocalTensor<float> a, b = buffer.Get<float>();
  GlobalTensor<float> from, to;
  from.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(x));
  to.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(y));
  TQueSync<PIPE_V, PIPE_MTE3> sync;
  for (uint32_t tile = 0; tile < tiles; ++tile) {
    in.AllocTensor<float>(a);
    DataCopy(a, from[tile * kTile], kTile);
    in.EnQue(a);
    in.DeQue<float>(a);
    Adds(b, a, 1.0f, kTile);
    in.FreeTensor(a);
    const TEventID done = GetTPipePtr()->FetchEventID(HardEvent::V_MTE3);
    sync.SetFlag(done);
    sync.WaitFlag(done);
    DataCopy(to[tile * kTile], b, kTile);
    const TEventID free = GetTPipePtr()->FetchEventID<HardEvent::MTE3_V>();
    SetFlag<HardEvent::MTE3_V>(free);
    WaitFlag<HardEvent::MTE3_V>(free);
  }
}
