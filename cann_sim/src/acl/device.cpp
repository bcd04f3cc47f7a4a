// The process, its devices, their chip, and the contexts of threads.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <set>

#include "calls.h"
#include "memory.h"
#include "runtime.h"

using namespace cann_sim::acl;

namespace cann_sim::acl {

namespace {

struct Contexts {
  std::mutex mutex;
  std::map<int32_t, Context> primary;
  std::deque<Context> created;  // never removed, since other threads may use them
  std::set<const void*> alive;  // handles
};

Contexts& contexts() {
  static auto* all = new Contexts;  // outlives static destructors
  return *all;
}

thread_local Context* thread_context = nullptr;
std::atomic<bool> initialised{false};

const char* variable(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? otherwise : value;
}

const char* soc() {
  static const std::string name = variable("CANN_SIM_SOC", "Ascend910B3");
  return name.c_str();
}

// The number of vector cores of a chip, or 0 for an unmodelled chip. There are half as many cube cores.
int32_t vector_cores(const std::string& name) {
  if (name == "Ascend910B1" || name == "Ascend910B2" || name == "Ascend910B2C") {
    return 48;
  }
  if (name == "Ascend910B3" || name == "Ascend910B4" || name == "Ascend910B4-1") {
    return 40;
  }
  if (name.rfind("Ascend910_93", 0) == 0) {
    return name == "Ascend910_9362" || name == "Ascend910_9372" ? 40 : 48;
  }
  return 0;
}

// Programs parse this version, so the mention of the simulator is in aclCANNPackageVersion.reserved.
const char* version() {
  return variable("CANN_SIM_CANN_VERSION", "8.5.0");
}

aclError valid_device(const char* api, int32_t device) {
  if (device >= 0 && device < device_count()) {
    return ACL_SUCCESS;
  }
  return fail(ACL_ERROR_RT_INVALID_DEVICEID,
              text("%s: there is no device %d: CANN_SIM_DEVICES gives %d", api, device, device_count()));
}

Context* primary(int32_t device) {
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  // Written once: threads that have the context read it without the lock.
  Context& context = contexts().primary.try_emplace(device, Context{device}).first->second;
  contexts().alive.insert(&context);
  return &context;
}

aclError capability(const char* api, int32_t device, bool known, int64_t value, int64_t* out) {
  if (const aclError code = valid_device(api, device); code != ACL_SUCCESS) {
    return code;
  }
  if (!known) {
    return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, text("%s: this property of a device is not modelled", api));
  }
  *out = value;
  return ACL_SUCCESS;
}

}  // namespace

int32_t device_count() {
  static const auto count = static_cast<int32_t>(from_environment("CANN_SIM_DEVICES", 2));
  return count;
}

const Context* current_context() {
  return thread_context;
}

int32_t core_count(bool vector) {
  return vector ? vector_cores(soc()) : vector_cores(soc()) / 2;
}

}  // namespace cann_sim::acl

extern "C" {

// ---- the process ----

aclError aclInit(const char* /*config*/) {
  CANN_SIM_API();
  if (vector_cores(soc()) == 0) {
    return fail(ACL_ERROR_RT_SOC_VERSION,
                text("CANN_SIM_SOC=%s: cann_sim models Ascend910B1 to Ascend910B4 and Ascend910_93xx", soc()));
  }
  return initialised.exchange(true) ? fail(ACL_ERROR_REPEAT_INITIALIZE, "aclInit was called before") : ACL_SUCCESS;
}

aclError aclFinalize() {
  CANN_SIM_API();
  initialised = false;
  return ACL_SUCCESS;
}

const char* aclGetRecentErrMsg() {
  thread_local std::string told;
  told = last_message();
  forget_message();
  return told.empty() ? nullptr : told.c_str();
}

void aclAppLog(aclLogLevel level, const char* /*function*/, const char* file, uint32_t line, const char* format, ...) {
  static const long long threshold = from_environment("CANN_SIM_LOG_LEVEL", ACL_ERROR + 1);
  if (static_cast<long long>(level) < threshold) {
    return;
  }
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "cann_sim: log %d: %s:%u: ", static_cast<int>(level), file, line);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
}

aclError aclsysGetCANNVersion(aclCANNPackageName /*package*/, aclCANNPackageVersion* out) {
  CANN_SIM_API();
  std::memset(out, 0, sizeof(*out));
  std::snprintf(out->version, sizeof(out->version), "%s", version());
  std::sscanf(version(), "%15[^.].%15[^.].%15s", out->majorVersion, out->minorVersion, out->releaseVersion);
  std::snprintf(out->reserved, sizeof(out->reserved), "simulated by cann_sim: no device is involved");
  return ACL_SUCCESS;
}

aclError aclsysGetVersionStr(char* /*package*/, char* out) {
  CANN_SIM_API();
  std::strcpy(out, version());
  return ACL_SUCCESS;
}

const char* aclrtGetSocName() {
  api(__func__).enter(__func__);
  return soc();
}

aclError aclGetCannAttributeList(const aclCannAttr** list, size_t* count) {
  CANN_SIM_API();
  static const aclCannAttr attributes[] = {ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16, ACL_CANN_ATTR_JIT_COMPILE};
  *list = attributes;
  *count = sizeof(attributes) / sizeof(attributes[0]);
  return ACL_SUCCESS;
}

aclError aclGetCannAttribute(aclCannAttr attribute, int32_t* value) {
  CANN_SIM_API();
  *value = attribute == ACL_CANN_ATTR_INF_NAN || attribute == ACL_CANN_ATTR_BF16 ? 1 : 0;
  return ACL_SUCCESS;
}

// ---- devices ----

aclError aclrtGetDeviceCount(uint32_t* count) {
  CANN_SIM_API();
  *count = static_cast<uint32_t>(device_count());
  return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
  CANN_SIM_API();
  if (const aclError code = valid_device(__func__, device); code != ACL_SUCCESS) {
    return code;
  }
  thread_context = primary(device);
  return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t* device) {
  CANN_SIM_API();
  if (thread_context == nullptr) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetDevice: this thread has set no device");
  }
  *device = thread_context->device;
  return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t device) {
  CANN_SIM_API();
  if (const aclError code = valid_device(__func__, device); code != ACL_SUCCESS) {
    return code;
  }
  const aclError code = synchronize_device(device, -1);
  if (thread_context != nullptr && thread_context->device == device) {
    thread_context = nullptr;
  }
  return code;
}

aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo what, int64_t* value) {
  CANN_SIM_API();
  const bool vector = what == ACL_DEVICE_INFO_VECTOR_CORE_NUM;
  const bool known = vector || what == ACL_DEVICE_INFO_AI_CORE_NUM || what == ACL_DEVICE_INFO_L2_SIZE;
  return capability(__func__, static_cast<int32_t>(device), known,
                    what == ACL_DEVICE_INFO_L2_SIZE ? int64_t{192} << 20 : core_count(vector), value);
}

aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr what, int64_t* value) {
  CANN_SIM_API();
  const int32_t id = static_cast<int32_t>(device);
  switch (what) {
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM:
      return capability(__func__, id, true, core_count(false), value);
    case ACL_DEV_ATTR_VECTOR_CORE_NUM:
      return capability(__func__, id, true, core_count(true), value);
    case ACL_DEV_ATTR_UBUF_PER_VECTOR_CORE:
      return capability(__func__, id, true, 192 * 1024, value);
    case ACL_DEV_ATTR_L2_CACHE_SIZE:
      return capability(__func__, id, true, int64_t{192} << 20, value);
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE:
      return capability(__func__, id, true, static_cast<int64_t>(memory_of(id).capacity), value);
    default:
      return capability(__func__, id, false, 0, value);
  }
}

aclError aclrtGetDeviceResLimit(int32_t device, aclrtDevResLimitType type, uint32_t* value) {
  CANN_SIM_API();
  if (const aclError code = valid_device(__func__, device); code != ACL_SUCCESS) {
    return code;
  }
  *value = static_cast<uint32_t>(core_count(type == ACL_RT_DEV_RES_VECTOR_CORE));
  return ACL_SUCCESS;
}

aclError aclrtGetStreamResLimit(aclrtStream /*stream*/, aclrtDevResLimitType type, uint32_t* value) {
  CANN_SIM_API();
  *value = static_cast<uint32_t>(core_count(type == ACL_RT_DEV_RES_VECTOR_CORE));
  return ACL_SUCCESS;
}

aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t* value) {
  CANN_SIM_API();
  *value = static_cast<uint32_t>(core_count(type == ACL_RT_DEV_RES_VECTOR_CORE));
  return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t device, int32_t peer) {
  CANN_SIM_API();
  *can = device != peer;
  const aclError code = valid_device(__func__, device);
  return code == ACL_SUCCESS ? valid_device(__func__, peer) : code;
}

aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t /*flags*/) {
  CANN_SIM_API();
  return valid_device(__func__, peer);
}

// ---- contexts ----

aclError aclrtCreateContext(aclrtContext* out, int32_t device) {
  CANN_SIM_API();
  if (const aclError code = valid_device(__func__, device); code != ACL_SUCCESS) {
    return code;
  }
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  thread_context = &contexts().created.emplace_back(Context{device});
  contexts().alive.insert(thread_context);
  *out = thread_context;
  return ACL_SUCCESS;
}

aclError aclrtDestroyContext(aclrtContext context) {
  CANN_SIM_API();
  if (thread_context == context) {
    thread_context = nullptr;
  }
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  return contexts().alive.erase(context) != 0
             ? ACL_SUCCESS
             : fail(ACL_ERROR_RT_CONTEXT_NULL, text("%p is no context, or one that was destroyed", context));
}

aclError aclrtGetCurrentContext(aclrtContext* context) {
  CANN_SIM_API();
  if (thread_context == nullptr) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, "aclrtGetCurrentContext: this thread has none");
  }
  *context = thread_context;
  return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  CANN_SIM_API();
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  if (contexts().alive.count(context) == 0) {
    return fail(ACL_ERROR_RT_CONTEXT_NULL, text("%p is no context, or one that was destroyed", context));
  }
  thread_context = static_cast<Context*>(context);
  return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  CANN_SIM_API();
  if (const aclError code = valid_device(__func__, device); code != ACL_SUCCESS) {
    return code;
  }
  if (flags != nullptr) {
    *flags = 0;
  }
  const std::lock_guard<std::mutex> lock(contexts().mutex);
  *active = static_cast<int32_t>(contexts().primary.count(device));
  return ACL_SUCCESS;
}

}  // extern "C"
