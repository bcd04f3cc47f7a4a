// What two cores of a launch must not do to each other: nothing orders them. `right` gives each core its own place.
#include "scratch.h"

#define KERNEL(name) extern "C" __global__ __aicore__ void name(GM_ADDR x, GM_ADDR y, int32_t right)

KERNEL(two_copies_out) {
  Scratch s(x, y);
  s.Fill();
  const uint32_t distance = right ? kCount : kCount - 1;  // one float of each core's part is its neighbour's too
  DataCopy(s.y[GetBlockIdx() * distance], s.a, kCount);   // HERE
}

// Two lines of source, so that the message can name both.
KERNEL(copies_from_two_lines) {
  Scratch s(x, y);
  s.Fill();
  if (GetBlockIdx() == 0) {
    DataCopy(s.y, s.a, kCount);  // FIRST
  } else {
    DataCopy(s.y[right ? kCount : kCount - 8], s.b, 8);  // HERE
  }
}

KERNEL(scalars_in_one_line) {
  Scratch s(x, y);
  s.y.SetValue(GetBlockIdx() * (right ? 16 : 1), 2.0f);  // HERE
}

// The line that the scalar write takes along holds what another core copied out.
KERNEL(scalar_beside_copy) {
  Scratch s(x, y);
  s.Fill();
  if (GetBlockIdx() == 0) {
    s.y.SetValue(0, 2.0f);  // FIRST
  } else {
    DataCopy(s.y[right ? 16 : 8], s.a, 8);  // HERE
  }
}

KERNEL(copy_in_of_another_cores) {
  Scratch s(x, y);
  s.Fill();
  if (GetBlockIdx() == 0) {
    DataCopy(s.y, s.a, kCount);  // FIRST
  } else {
    DataCopy(s.b, s.y[right ? kCount : kCount - 8], kCount);  // HERE
  }
}

KERNEL(scalar_read_of_another_cores) {
  Scratch s(x, y);
  s.Fill();
  if (GetBlockIdx() == 0) {
    DataCopy(s.y, s.a, kCount);  // FIRST
  } else {
    s.b.SetValue(0, s.y.GetValue(right ? kCount : kCount - 1));  // HERE
  }
}

// In place, with a neighbour's element: core 1 reads what core 0 writes.
KERNEL(in_place_with_halo) {
  Scratch s(x, y);
  const uint32_t begin = GetBlockIdx() * kCount;
  const uint32_t halo = right ? 0 : 1;
  DataCopyPad(s.a, s.y[begin], DataCopyExtParams{1, (kCount + halo) * 4, 0, 0, 0}, NoPad());  // FIRST
  Order<HardEvent::MTE2_V>();
  Adds(s.b, s.a, 1.0f, kCount);
  Order<HardEvent::V_MTE3>();
  DataCopy(s.y[begin], s.b, kCount);  // HERE
}

// One core of many fails: the message has to say which.
KERNEL(third_core_only) {
  Scratch s(x, y);
  if (GetBlockIdx() == 2 && !right) {
    Adds(s.b, s.a, 1.0f, kCount);  // HERE
  }
}
