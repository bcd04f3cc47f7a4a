// Ascend C as cann_sim runs it on the host: what a kernel source includes.
#pragma once

#define CANN_SIM 1

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cann_sim/position.h"
// number types
#if __has_include("cann_sim/half.h")
#include "cann_sim/half.h"
#endif
#if __has_include("cann_sim/bfloat16.h")
#include "cann_sim/bfloat16.h"
#endif
// the core, memory, synchronisation
#include "cann_sim/core.h"
#include "cann_sim/tensor.h"
#include "cann_sim/global.h"
#include "cann_sim/pipe.h"
#include "cann_sim/queue.h"
#include "cann_sim/copy.h"
#include "cann_sim/system.h"
// the vector unit
#if __has_include("cann_sim/vector.h")
#include "cann_sim/vector.h"
#endif
#include "cann_sim/unsupported.h"

