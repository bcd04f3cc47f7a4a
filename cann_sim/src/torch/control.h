// The interface of the operators on the host to the simulated runtime: a task in a stream instead of a kernel. Uses the
// functions of cann_sim/acl_control.h, looked up in the libascendcl.so that torch_npu uses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include <ATen/core/TensorBase.h>
#include <c10/core/Device.h>

namespace cann_sim_torch {

// One operator on the current stream of a device. It begins when everything enqueued there before has run, and orders
// nothing else. Call touch() for the memory it reads and writes before end().
class Task {
 public:
  Task(c10::Device device, const std::string& name);
  ~Task();  // ends the task if an exception left it
  Task(const Task&) = delete;
  Task& operator=(const Task&) = delete;

  void touch(const at::TensorBase& tensor, bool write);
  void end();  // raises if the runtime found that the operator broke a rule

 private:
  std::string name_;
  uint64_t task_;
  bool open_ = true;
};

void tensor_allocated(const void* start, size_t bytes);
void tensor_freed(const void* start);
void find_control();  // raises when the loaded libascendcl.so is not the simulator's

}  // namespace cann_sim_torch
