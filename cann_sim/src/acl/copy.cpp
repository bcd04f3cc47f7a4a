// Copies and fills of memory, immediately by the host or as a task of a stream.
#include <cstring>

#include "calls.h"
#include "cann_sim/launch.h"
#include "memory.h"
#include "runtime.h"

using namespace cann_sim::acl;

namespace cann_sim::acl {

namespace {

enum class Where { host, device, any };

// One side of a copy.
struct Side {
  uint64_t start = 0;
  size_t bytes = 0;
  std::shared_ptr<Block> block;  // null: memory of the host that was not allocated here
  std::shared_ptr<cann_sim_place> place;

  bool on_device() const { return block != nullptr && block->on_device; }
  void* data() const { return reinterpret_cast<void*>(start); }
};

aclError resolve(const char* api, const char* name, const void* address, size_t bytes, Where where, Side& side) {
  if (address == nullptr) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, text("%s: %s is a null pointer", api, name));
  }
  side.start = reinterpret_cast<uint64_t>(address);
  side.bytes = bytes;
  side.block = find_block(address);
  if (where != Where::any && side.on_device() != (where == Where::device)) {
    return fail(ACL_ERROR_RT_PARAM_INVALID,
                text("%s: %s is %p, which is %s, but the kind of the copy says otherwise", api, name, address,
                     side.on_device() ? "device memory" : "no device memory, or was freed"));
  }
  if (side.block != nullptr && side.start + bytes > side.block->end()) {
    return fail(ACL_ERROR_RT_PARAM_INVALID,
                text("%s: %s goes beyond its block: bytes [%llu, %llu) of %zu", api, name,
                     static_cast<unsigned long long>(side.start - side.block->start()),
                     static_cast<unsigned long long>(side.start - side.block->start() + bytes), side.block->bytes));
  }
  if (side.on_device()) {
    side.place.reset(cann_sim_find(address), cann_sim_forget);
  }
  return ACL_SUCCESS;
}

// Checks a task's access to a side, before the copy.
void touch(const StepPtr& step, Stream& stream, const Side& side, bool writes) {
  if (!side.on_device()) {
    return;
  }
  if (was_freed(*side.block)) {
    report_error(stream, ACL_ERROR_RT_INTERNAL_ERROR, "use-after-free",
                 text("%s on %s %s device block %llu of %zu bytes, which was freed after that was enqueued",
                      step->name.c_str(), step->stream.c_str(), writes ? "writes" : "reads",
                      static_cast<unsigned long long>(side.block->number), side.block->bytes));
    return;
  }
  if (writes) {
    cann_sim_written(side.place.get(), side.data(), side.bytes);
  }
  check_access(step, stream, side.start, side.start + side.bytes, writes);
}

// The same for a copy by the host: the call itself fails.
aclError touch_by_host(const StepPtr& step, const Side& side, bool writes) {
  if (!side.on_device()) {
    return ACL_SUCCESS;
  }
  if (writes) {
    cann_sim_written(side.place.get(), side.data(), side.bytes);
  }
  const Race race = access(step, side.start, side.start + side.bytes, writes);
  if (!race) {
    return ACL_SUCCESS;
  }
  report_error("stream-race", race.message);
  return fail(ACL_ERROR_RT_INTERNAL_ERROR, "stream-race: " + race.message);
}

StepPtr host_step(const char* name) {
  const Lock lock(runtime().mutex);
  auto step = std::make_shared<Step>();
  step->number = ++runtime().host_steps;
  runtime().host.set(kHostSlot, step->number);
  step->name = name;
  step->stream = "the host";
  step->clock = runtime().host;
  return step;
}

const char* copy_name(const Side& to, const Side& from) {
  return to.on_device()     ? from.on_device() ? "a copy on the device" : "a copy to the device"
         : from.on_device() ? "a copy to the host"
                            : "a copy on the host";
}

aclError sides(const char* api, void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind,
               Side& target, Side& source) {
  if (bytes > room) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, text("%s: %zu bytes into room for %zu", api, bytes, room));
  }
  Where to_where = Where::any, from_where = Where::any;
  switch (kind) {
    case ACL_MEMCPY_HOST_TO_HOST:
      to_where = from_where = Where::host;
      break;
    case ACL_MEMCPY_HOST_TO_DEVICE:
    case ACL_MEMCPY_HOST_TO_BUF_TO_DEVICE:
      to_where = Where::device, from_where = Where::host;
      break;
    case ACL_MEMCPY_DEVICE_TO_HOST:
      to_where = Where::host, from_where = Where::device;
      break;
    case ACL_MEMCPY_DEVICE_TO_DEVICE:
    case ACL_MEMCPY_INNER_DEVICE_TO_DEVICE:
    case ACL_MEMCPY_INTER_DEVICE_TO_DEVICE:
      to_where = from_where = Where::device;
      break;
    case ACL_MEMCPY_DEFAULT:
      break;
  }
  const aclError code = resolve(api, "dst", to, bytes, to_where, target);
  return code == ACL_SUCCESS ? resolve(api, "src", from, bytes, from_where, source) : code;
}

aclError copy(const char* api, void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind) {
  if (bytes == 0) {
    return ACL_SUCCESS;
  }
  Side target, source;
  if (const aclError code = sides(api, to, room, from, bytes, kind, target, source); code != ACL_SUCCESS) {
    return code;
  }
  const StepPtr step = host_step(copy_name(target, source));
  const aclError read = touch_by_host(step, source, false), written = touch_by_host(step, target, true);
  std::memmove(to, from, bytes);
  return read == ACL_SUCCESS ? written : read;
}

// Pageable host memory cannot be accessed asynchronously: a copy from it reads it at once, and a copy to it returns
// when it is done (which does not count as a synchronisation).
aclError copy_async(const char* api, void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind,
                    aclrtStream stream) {
  if (bytes == 0) {
    return ACL_SUCCESS;
  }
  Side target, source;
  if (const aclError code = sides(api, to, room, from, bytes, kind, target, source); code != ACL_SUCCESS) {
    return code;
  }
  std::shared_ptr<std::string> staged;
  if (source.block == nullptr) {
    staged = std::make_shared<std::string>(static_cast<const char*>(from), bytes);
  }
  const auto run = [=](const StepPtr& step, Stream& on) {
    touch(step, on, source, false);
    touch(step, on, target, true);
    std::memmove(to, staged == nullptr ? from : staged->data(), bytes);
  };
  return enqueue_work(stream, copy_name(target, source), run, target.block == nullptr);
}

aclError fill(const char* api, void* to, size_t room, size_t bytes, Side& target) {
  if (bytes > room) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, text("%s: %zu bytes into room for %zu", api, bytes, room));
  }
  return resolve(api, "devPtr", to, bytes, Where::any, target);
}

}  // namespace

}  // namespace cann_sim::acl

extern "C" {

aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind) {
  CANN_SIM_API();
  return copy(__func__, to, room, from, bytes, kind);
}

aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind,
                          aclrtStream stream) {
  CANN_SIM_API();
  return copy_async(__func__, to, room, from, bytes, kind, stream);
}

aclError aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind,
                                       aclrtStream stream) {
  CANN_SIM_API();
  return copy_async(__func__, to, room, from, bytes, kind, stream);
}

aclError aclrtMemset(void* to, size_t room, int32_t value, size_t bytes) {
  CANN_SIM_API();
  Side target;
  if (const aclError code = fill(__func__, to, room, bytes, target); code != ACL_SUCCESS) {
    return code;
  }
  const aclError code = touch_by_host(host_step("a fill"), target, true);
  std::memset(to, value, bytes);
  return code;
}

aclError aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t bytes, aclrtStream stream) {
  CANN_SIM_API();
  Side target;
  if (const aclError code = fill(__func__, to, room, bytes, target); code != ACL_SUCCESS) {
    return code;
  }
  return enqueue_work(stream, "a fill", [=](const StepPtr& step, Stream& on) {
    touch(step, on, target, true);
    std::memset(to, value, bytes);
  });
}

}  // extern "C"
