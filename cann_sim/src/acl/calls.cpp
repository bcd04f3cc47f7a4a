// Counting, delaying and failing API calls (calls.h).
#include "calls.h"

#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>

namespace cann_sim::acl {

namespace {

struct Apis {
  std::mutex mutex;
  std::map<std::string, std::unique_ptr<Api>> by_name;
};

Apis& apis() {
  static auto* all = new Apis;  // outlives static destructors
  return *all;
}

thread_local std::string message;

}  // namespace

aclError Api::enter(const char* name) {
  double delay_ms = 0;
  aclError code = ACL_SUCCESS;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t number = calls_++;
    delay_ms = delay_ms_;
    code = number >= fail_from_ && number < fail_to_ ? code_ : ACL_SUCCESS;
  }
  if (delay_ms > 0) {
    std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(delay_ms));
  }
  return code == ACL_SUCCESS ? code : acl::fail(code, text("%s was told to fail with %d", name, code));
}

uint64_t Api::calls() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return calls_;
}

void Api::fail(int64_t skip, int64_t count, int32_t code) {
  const std::lock_guard<std::mutex> lock(mutex_);
  fail_from_ = calls_ + static_cast<uint64_t>(skip);
  fail_to_ = fail_from_ + static_cast<uint64_t>(count);
  code_ = code;
}

void Api::delay(double milliseconds) {
  const std::lock_guard<std::mutex> lock(mutex_);
  delay_ms_ = milliseconds;
}

Api& api(const std::string& name) {
  const std::lock_guard<std::mutex> lock(apis().mutex);
  std::unique_ptr<Api>& entry = apis().by_name[name];
  if (entry == nullptr) {
    entry = std::make_unique<Api>();
  }
  return *entry;
}

std::map<std::string, uint64_t> all_calls() {
  const std::lock_guard<std::mutex> lock(apis().mutex);
  std::map<std::string, uint64_t> counts;
  for (const auto& [name, entry] : apis().by_name) {
    if (const uint64_t calls = entry->calls(); calls != 0) {
      counts[name] = calls;
    }
  }
  return counts;
}

aclError fail(aclError code, const std::string& why) {
  message = why;
  return code;
}

const std::string& last_message() {
  return message;
}

void forget_message() {
  message.clear();
}

std::string text(const char* format, ...) {
  va_list arguments, again;
  va_start(arguments, format);
  va_copy(again, arguments);
  const int length = std::vsnprintf(nullptr, 0, format, arguments);
  va_end(arguments);
  std::string result(static_cast<size_t>(length) + 1, '\0');
  std::vsnprintf(result.data(), result.size(), format, again);
  va_end(again);
  result.pop_back();
  return result;
}

long long from_environment(const char* name, long long otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? otherwise : std::atoll(value);
}

}  // namespace cann_sim::acl
