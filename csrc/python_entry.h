// See python_entry.cpp.
#pragma once

#include <Python.h>

#include <cstdint>

namespace npu_xent {

// The loss of class probabilities is fused from this many classes on: with fewer, a row fills too little of a vector.
inline constexpr int64_t kFewClasses = 16;

// A new Python function, or null with a Python error set.
PyObject* new_python_entry();

}  // namespace npu_xent
