// The control interface for tests: holding streams, making calls fail or slow, and the status as JSON.
#include <cstdio>
#include <cstdlib>

#include <unistd.h>

#include "calls.h"
#include "cann_sim/acl_control.h"
#include "memory.h"
#include "runtime.h"

using namespace cann_sim::acl;

namespace cann_sim::acl {

namespace {

void set_held(void* handle, bool held) {
  const Lock lock(runtime().mutex);
  if (handle == nullptr) {
    runtime().hold_all = held;
  }
  for (const StreamPtr& stream : all_streams()) {
    if (handle == nullptr || stream.get() == handle) {
      stream->held = held;
      stream->wake.notify_all();
    }
  }
  runtime().changed.notify_all();
}

std::string quoted(const std::string& words) {
  std::string out = "\"";
  for (const char c : words) {
    if (c == '"' || c == '\\') {
      out += '\\';
    }
    out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return out + '"';
}

unsigned long long wide(uint64_t value) {
  return value;
}

// "[item,item]"
template <typename List, typename Write>
std::string array(const List& list, Write write) {
  std::string out;
  for (const auto& item : list) {
    out += (out.empty() ? "" : ",") + write(item);
  }
  return "[" + out + "]";
}

std::string block_json(const std::shared_ptr<Block>& block) {
  return text("{\"number\":%llu,\"address\":%llu,\"bytes\":%zu}", wide(block->number), wide(block->start()),
              block->bytes);
}

std::string device_json(int32_t device) {
  const DeviceMemory memory = memory_of(device);
  const auto tensor = [](const DeviceMemory::Tensor& it) {
    return text("{\"address\":%llu,\"bytes\":%llu}", wide(it.start), wide(it.bytes));
  };
  return text("{\"device\":%d,\"memory_bytes\":%llu,\"peak_bytes\":%llu,\"capacity_bytes\":%llu,", device,
              wide(memory.used), wide(memory.peak), wide(memory.capacity)) +
         "\"blocks\":" + array(memory.blocks, block_json) + ",\"tensors\":" + array(memory.tensors, tensor) + "}";
}

// The handle of a default stream is null.
std::string stream_json(const StreamPtr& stream) {
  const void* handle = runtime().streams.count(stream.get()) != 0 ? stream.get() : nullptr;
  return text("{\"id\":%d,\"device\":%d,\"handle\":%llu,\"enqueued\":%llu,\"done\":%llu,\"held\":%s,\"fault\":%d}",
              stream->id, stream->device, wide(reinterpret_cast<uint64_t>(handle)), wide(stream->enqueued),
              wide(stream->done), stream->held ? "true" : "false",
              stream->fault == nullptr || stream->fault->told ? 0 : stream->fault->code);
}

std::string error_json(const Error& error) {
  return text("{\"kind\":%s,\"count\":%llu,\"message\":", quoted(error.kind).c_str(), wide(error.count)) +
         quoted(error.message) + "}";
}

std::string calls_json() {
  std::string out;
  for (const auto& [name, calls] : all_calls()) {
    out += text("%s%s:%llu", out.empty() ? "" : ",", quoted(name).c_str(), wide(calls));
  }
  return "{" + out + "}";
}

std::string status() {
  check_canaries();
  std::vector<int32_t> devices;
  for (int32_t device = 0; device < device_count(); ++device) {
    devices.push_back(device);
  }
  const Lock lock(runtime().mutex);
  return "{\"devices\":" + array(devices, device_json) + ",\"host_blocks\":" + array(host_blocks(), block_json) +
         ",\"streams\":" + array(all_streams(), stream_json) + text(",\"events\":%zu", runtime().events.size()) +
         ",\"errors\":" + array(errors(), error_json) + ",\"calls\":" + calls_json() + "}";
}

// CANN_SIM_LEAKS=1: prints leaks at exit.
void print_leaks() {
  check_canaries();
  for (int32_t device = 0; device < device_count(); ++device) {
    const DeviceMemory memory = memory_of(device);
    for (const auto& block : memory.blocks) {
      std::fprintf(stderr, "cann_sim: leak: device %d: block %llu of %zu bytes was never freed\n", device,
                   wide(block->number), block->bytes);
    }
    for (const auto& tensor : memory.tensors) {
      std::fprintf(stderr, "cann_sim: leak: device %d: a tensor of %llu bytes at %#llx is alive\n", device,
                   wide(tensor.bytes), wide(tensor.start));
    }
  }
  for (const auto& block : host_blocks()) {
    std::fprintf(stderr, "cann_sim: leak: host block %llu of %zu bytes was never freed\n", wide(block->number),
                 block->bytes);
  }
  const Lock lock(runtime().mutex);
  for (const auto& [handle, stream] : runtime().streams) {  // without the default streams, which need no destroying
    std::fprintf(stderr, "cann_sim: leak: %s was never destroyed\n", stream->name().c_str());
  }
  if (!runtime().events.empty()) {
    std::fprintf(stderr, "cann_sim: leak: %zu events were never destroyed\n", runtime().events.size());
  }
}

[[maybe_unused]] const bool leaks_wanted = [] {
  if (from_environment("CANN_SIM_LEAKS", 0) == 0) {
    return false;
  }
  static const pid_t owner = getpid();
  std::atexit([] {
    if (getpid() == owner) {  // not in a forked child
      print_leaks();
    }
  });
  return true;
}();

}  // namespace

}  // namespace cann_sim::acl

void cann_sim_acl_hold(void* stream) {
  set_held(stream, true);
}

void cann_sim_acl_release(void* stream) {
  set_held(stream, false);
}

void cann_sim_acl_fail(const char* name, int64_t skip, int64_t count, int32_t code) {
  api(name).fail(skip, count, code);
}

void cann_sim_acl_delay(const char* name, double milliseconds) {
  api(name).delay(milliseconds);
}

uint64_t cann_sim_acl_calls(const char* name) {
  return api(name).calls();
}

const char* cann_sim_acl_status() {
  thread_local std::string json;
  json = status();
  return json.c_str();
}

void cann_sim_acl_clear_errors() {
  clear_errors();
}
