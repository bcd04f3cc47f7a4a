// Every vector API that cann_sim models.
#pragma once

#include "cann_sim/cast.h"
#include "cann_sim/compare.h"
#include "cann_sim/gather.h"
#include "cann_sim/reduce.h"
#include "cann_sim/reduce_all.h"
#include "cann_sim/select.h"
#include "cann_sim/vector_binary.h"
#include "cann_sim/vector_fill.h"
#include "cann_sim/vector_scalar.h"
#include "cann_sim/vector_unary.h"
