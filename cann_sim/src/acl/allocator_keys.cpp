// Lets torch_npu load beside a CUDA build of torch. From 2.10 on, both register settings of their allocators under the
// same names in a set of libc10.so, and torch_npu, made for CPU builds, throws at the second. On x86-64, PyPI has CUDA
// builds only. The CUDA build's names are removed here, before torch_npu registers its own; the simulator has no CUDA
// devices. cann_sim calls this between the two imports; in a child process the constructor does, when this library is
// loaded for torch_npu.
#include <dlfcn.h>

#include <set>
#include <string>
#include <unordered_set>

namespace cann_sim::acl {
namespace {

// The settings of all devices, which libc10.so registers.
const std::set<std::string>& common() {
  static const std::set<std::string> names = {
      "max_split_size_mb",        "max_non_split_rounding_mb", "garbage_collection_threshold",
      "roundup_power2_divisions", "expandable_segments",       "pinned_use_background_threads"};
  return names;
}

}  // namespace
}  // namespace cann_sim::acl

extern "C" __attribute__((constructor, visibility("default"))) void cann_sim_acl_remove_keys_of_cuda() {
  void* c10 = dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);
  if (c10 == nullptr) {
    return;
  }
  // AcceleratorAllocatorConfig::getMutableKeys()::keys and its guard; other releases have no such variable.
  const std::string name = "N3c1016CachingAllocator26AcceleratorAllocatorConfig14getMutableKeysB5cxx11EvE4keys";
  auto* keys = static_cast<std::unordered_set<std::string>*>(dlsym(c10, ("_ZZ" + name).c_str()));
  const auto* is_made = static_cast<const char*>(dlsym(c10, ("_ZGVZ" + name).c_str()));
  if (keys != nullptr && is_made != nullptr && *is_made != 0) {
    for (auto key = keys->begin(); key != keys->end();) {
      key = cann_sim::acl::common().count(*key) != 0 ? std::next(key) : keys->erase(key);
    }
  }
  dlclose(c10);
}
