// See python_entry.cpp.
#pragma once

#include <Python.h>

namespace npu_xent {

// A new Python function, or null with a Python error set.
PyObject* new_python_entry();

}  // namespace npu_xent
