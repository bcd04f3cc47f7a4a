// The AscendCL names that generated launchers need.
#pragma once

#include <cstdint>

using aclrtStream = void*;
