// Ascend C as cann_sim runs it on the host: what a kernel source includes.
#pragma once

#include <cmath>
#include <cstdint>

// number types
#include "cann_sim/half.h"

// the core, its memory, synchronisation
#include "cann_sim/copy.h"
#include "cann_sim/core.h"
#include "cann_sim/global.h"
#include "cann_sim/pipe.h"
#include "cann_sim/position.h"
#include "cann_sim/queue.h"
#include "cann_sim/system.h"
#include "cann_sim/tensor.h"

// the vector unit
#include "cann_sim/vector.h"

// the rest, by name
#include "cann_sim/unsupported.h"
