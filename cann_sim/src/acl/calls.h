// Every API call is counted, and can be delayed or made to fail; also the error text of a thread.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "acl/acl.h"

namespace cann_sim::acl {

// One function of AscendCL, or "launch:<kernel>".
class Api {
 public:
  // Counts a call. Returns zero, or the error code that the call must return because a test made it fail.
  aclError enter(const char* name);

  uint64_t calls() const;
  void fail(int64_t skip, int64_t count, int32_t code);
  void delay(double milliseconds);

 private:
  mutable std::mutex mutex_;
  uint64_t calls_ = 0, fail_from_ = 0, fail_to_ = 0;
  int32_t code_ = 0;
  double delay_ms_ = 0;
};

Api& api(const std::string& name);
std::map<std::string, uint64_t> all_calls();

// Begins every API function.
#define CANN_SIM_API()                                                          \
  static ::cann_sim::acl::Api& this_api_ = api(__func__);                       \
  if (const aclError code_ = this_api_.enter(__func__); code_ != ACL_SUCCESS) { \
    return code_;                                                               \
  }                                                                             \
  static_assert(true, "takes the semicolon")

// Sets the text of aclGetRecentErrMsg for this thread; returns the code.
aclError fail(aclError code, const std::string& message);
const std::string& last_message();
void forget_message();

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
long long from_environment(const char* name, long long otherwise);

}  // namespace cann_sim::acl
