// Random calls of the loops of the CPU and of the device kernels on cann_sim, compared with a definition of their own:
//
//   fuzz [--seconds N] [--cases N] [--only cpu|device] SEED        cases 0, 1, 2, ...
//   fuzz SEED CASE ...                                             these cases again, with their parameters
//
// Exits with 1 after a case that failed, and prints the command that repeats it; so it does when one crashes.
#include "fuzz.h"

#include <unistd.h>
#include <chrono>
#include <csignal>

namespace {

using fuzz::state;

// One case in so many is a launch on cann_sim, which takes as long as hundreds of calls on the CPU.
constexpr uint64_t kDeviceEvery = 512;

// Only what a signal handler may do.
void on_crash(int signal) {
  const auto write_text = [](const char* text) { return write(2, text, std::strlen(text)); };
  const auto write_number = [](uint64_t n) {
    char digits[24], *p = digits + sizeof(digits);
    do {
      *--p = static_cast<char>('0' + n % 10);
    } while ((n /= 10) != 0);
    return write(2, p, digits + sizeof(digits) - p);
  };
  (void)(write_text("fuzz: signal "), write_number(static_cast<uint64_t>(signal)), write_text("; repeat with: fuzz "),
         write_number(state.seed), write_text(" "), write_number(state.number), write_text("\n"));
  _exit(1);
}

bool run(uint64_t number) {
  state.number = number;
  state.messages = 0;
  fuzz::Random random(state.seed, number);
  if (number % kDeviceEvery == kDeviceEvery - 1) {
    fuzz::device_case(random);
  } else {
    fuzz::cpu_case(random);
  }
  return state.messages == 0;
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 1e9;
  uint64_t cases = ~uint64_t{0};
  std::string only;
  std::vector<uint64_t> numbers;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) == 0 && i + 1 < argc) {
      const std::string value = argv[++i];
      word == "--seconds" ? void(seconds = std::stod(value))
      : word == "--cases" ? void(cases = std::stoull(value))
                          : void(only = value);
    } else {
      numbers.push_back(std::stoull(word));
    }
  }
  if (numbers.empty()) {
    std::fprintf(stderr, "usage: fuzz [--seconds N] [--cases N] [--only cpu|device] SEED [CASE ...]\n");
    return 2;
  }
  state.seed = numbers[0];
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) {
    std::signal(signal, on_crash);
  }
  if (numbers.size() > 1) {
    bool right = true;
    state.verbose = true;
    for (size_t i = 1; i < numbers.size(); ++i) {
      const bool passed = run(numbers[i]);
      std::fprintf(stderr, "case %llu of seed %llu %s\n", static_cast<unsigned long long>(numbers[i]),
                   static_cast<unsigned long long>(state.seed), passed ? "passed" : "FAILED");
      right = right && passed;
    }
    return right ? 0 : 1;
  }
  const auto start = std::chrono::steady_clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
  uint64_t done = 0, device = 0, failed = 0;
  for (uint64_t number = 0; done < cases && failed < 10; ++number) {
    const bool on_device = number % kDeviceEvery == kDeviceEvery - 1;
    if (number % 64 == 0 && elapsed() >= seconds) {
      break;
    }
    if (only == (on_device ? "cpu" : "device")) {
      continue;
    }
    if (!run(number)) {
      ++failed;
      std::fprintf(stderr, "fuzz: repeat with: fuzz %llu %llu\n", static_cast<unsigned long long>(state.seed),
                   static_cast<unsigned long long>(number));
    }
    ++done;
    device += on_device;
  }
  std::printf(
      "fuzz, seed %llu: %llu cases (%llu on cann_sim), %lld rows, %lld results compared (%lld without a bound), "
      "%llu cases failed, %.0f s\n",
      static_cast<unsigned long long>(state.seed), static_cast<unsigned long long>(done),
      static_cast<unsigned long long>(device), static_cast<long long>(state.rows),
      static_cast<long long>(state.compared), static_cast<long long>(state.unbounded),
      static_cast<unsigned long long>(failed), elapsed());
  return failed != 0 || done == 0;
}
