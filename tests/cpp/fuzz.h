// What the fuzzer's two halves share: random numbers, memory between pages without access, and comparisons.
//
// A case is one call. It depends on the seed and its number alone, so `fuzz SEED CASE` repeats it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "check.h"

namespace fuzz {

using test::bf16;
using test::f16;
using test::Format;

// The case that runs, and what was counted.
struct State {
  uint64_t seed = 0, number = 0;
  bool verbose = false;                           // print the case's parameters
  int messages = 0;                               // of this case
  int64_t rows = 0, compared = 0, unbounded = 0;  // unbounded: results that overflow may have spoilt
};
inline State state;

// A parameter of the case, printed when it is repeated.
__attribute__((format(printf, 1, 2))) inline void note(const char* text, ...) {
  if (state.verbose) {
    std::va_list arguments;
    va_start(arguments, text);
    std::vfprintf(stderr, text, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
  }
}
__attribute__((format(printf, 1, 2))) inline void fail(const char* text, ...) {
  if (state.messages++ < (state.verbose ? 40 : 3)) {
    std::va_list arguments;
    va_start(arguments, text);
    std::fputs("  ", stderr);
    std::vfprintf(stderr, text, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
  }
}

// SplitMix64 (Steele, Lea, Flood): a case's numbers cost nothing to seed.
class Random {
 public:
  Random(uint64_t seed, uint64_t number)
      : state_(mix(seed + 0x9e3779b97f4a7c15) ^ mix(number * 0xd1342543de82ef95 + 1)) {}
  uint64_t bits() { return mix(state_ += 0x9e3779b97f4a7c15); }
  int64_t below(int64_t n) { return static_cast<int64_t>((static_cast<unsigned __int128>(bits()) * n) >> 64); }
  bool one_in(int64_t n) { return below(n) == 0; }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  // Bell-shaped, between -3 and 3.
  double normal() {
    const uint64_t r = bits();
    const auto part = [&](int shift) { return static_cast<double>(r >> shift & 0xffff); };
    return (part(0) + part(16) + part(32) + part(48) - 131070) / 43690;
  }
  template <typename T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }
  int64_t number_of(std::initializer_list<int64_t> values) { return one_of(values); }

 private:
  static uint64_t mix(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }
  uint64_t state_;
};

// Memory with pages without access directly before and behind it.
class Arena {
 public:
  static constexpr int64_t kBytes = int64_t{4} << 20;
  char *begin, *end;
  std::vector<char> copy;  // of an input, to see that it stays as it is

  Arena() {
    constexpr int64_t page = 1 << 16;  // a multiple of every system's
    void* memory = mmap(nullptr, kBytes + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + page, kBytes, PROT_READ | PROT_WRITE) != 0) {
      std::perror("fuzz: mmap");
      std::exit(2);
    }
    begin = static_cast<char*>(memory) + page;
    end = begin + kBytes;
  }
};

// The arenas of a case, in the order in which it takes them; and the byte that fills what it may not use.
class Memory {
 public:
  explicit Memory(Random& random) : random_(random), fill_(random.one_in(2) ? 0xff : 0x7b) { used_ = 0; }
  // n elements: at a page without access behind or before them, or anywhere; aligned to the element only.
  template <typename T>
  T* take(int64_t n, Arena*& arena) {
    if (used_ == arenas().size()) {
      arenas().push_back(std::make_unique<Arena>());
    }
    arena = arenas()[used_++].get();
    const auto bytes = n * static_cast<int64_t>(sizeof(T)), room = Arena::kBytes - bytes;
    if (room < 0) {
      std::fprintf(stderr, "fuzz: %lld bytes do not fit\n", static_cast<long long>(bytes));
      std::exit(2);
    }
    const int64_t place = random_.below(8);
    const int64_t skipped = place < 4   ? room
                            : place < 7 ? 0
                                        : std::min<int64_t>(room, (1 + random_.below(40)) * sizeof(T));
    return reinterpret_cast<T*>(arena->begin + skipped);
  }
  unsigned char fill() const { return fill_; }

 private:
  static std::vector<std::unique_ptr<Arena>>& arenas() {
    static std::vector<std::unique_ptr<Arena>> all;
    return all;
  }
  static inline size_t used_ = 0;
  Random& random_;
  unsigned char fill_;
};

// n elements of a tensor, or none and a null pointer. Between them and beside them lies the fill, which reads as NaN or
// as a large number.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Memory& memory, int64_t n, bool present = true) : n_(n), fill_(memory.fill()) {
    if (present) {
      data_ = memory.take<T>(n, arena_);
      constexpr int64_t margin = 128;
      begin_ = std::max(arena_->begin, reinterpret_cast<char*>(data_) - margin);
      end_ = std::min(arena_->end, reinterpret_cast<char*>(data_ + n) + margin);
      std::memset(begin_, fill_, end_ - begin_);
    }
  }
  T* data() const { return data_; }
  int64_t size() const { return n_; }
  T& operator[](int64_t i) const { return data_[i]; }

  // An input must stay as it is.
  void seal() {
    if (data_ != nullptr) {
      arena_->copy.assign(begin_, end_);
    }
  }
  void check_sealed(const char* name) const {
    if (data_ != nullptr && std::memcmp(arena_->copy.data(), begin_, end_ - begin_) != 0) {
      fail("%s, an input, was written", name);
    }
  }
  // An output's element, which becomes fill again. After all of them nothing else may be left.
  T take(int64_t i) const {
    const T value = data_[i];
    std::memset(&data_[i], fill_, sizeof(T));
    return value;
  }
  void check_rest(const char* name) const {
    if (data_ != nullptr &&
        (static_cast<unsigned char>(*begin_) != fill_ || std::memcmp(begin_, begin_ + 1, end_ - begin_ - 1) != 0)) {
      const char* p = std::find_if(begin_, end_, [&](char byte) { return static_cast<unsigned char>(byte) != fill_; });
      fail("%s: memory %lld bytes from its first element was written", name,
           static_cast<long long>(p - reinterpret_cast<char*>(data_)));
    }
  }

 private:
  int64_t n_ = 0;
  unsigned char fill_ = 0;
  Arena* arena_ = nullptr;
  T* data_ = nullptr;
  char *begin_ = nullptr, *end_ = nullptr;
};

// The values of the 16-bit types.
template <typename T>
double load(T x) {
  if constexpr (sizeof(T) == 2) {
    static const std::vector<double> values = [] {
      std::vector<double> all;
      for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        all.push_back(Format<T>::load({static_cast<uint16_t>(bits)}));
      }
      return all;
    }();
    return values[x.bits];
  } else {
    return x;
  }
}
template <typename T>
constexpr double kLargest = std::is_same_v<T, f16>     ? 65504.0
                            : std::is_same_v<T, bf16>  ? 0x1.FEp127
                            : std::is_same_v<T, float> ? 0x1.FFFFFEp127
                                                       : 0x1.FFFFFFFFFFFFFp1023;

// That a result is the same NaN or infinity as `expected`, or differs from it by no more than `bound` and one rounding
// to T. Where even the bound overflows nothing is said. `wild`: an infinity will do for NaN.
template <typename T, typename Real>
void expect(const char* name, int64_t row, int64_t column, T actual, Real expected, Real bound, bool wild = false) {
  const Real value = load(actual);
  const auto wrong = [&](Real allowed) {
    fail("%s[%lld, %lld] is %.17g, expected %.17g; allowed %.3g", name, static_cast<long long>(row),
         static_cast<long long>(column), static_cast<double>(value), static_cast<double>(expected),
         static_cast<double>(allowed));
  };
  ++state.compared;
  if (std::isnan(expected)) {
    if (!std::isnan(value) && !(wild && std::isinf(value))) {
      wrong(0);
    }
    return;
  }
  if (std::isinf(expected)) {
    if (value != expected) {
      wrong(0);
    }
    return;
  }
  const Real size = std::fabs(expected);
  const Real allowed = bound + size * static_cast<Real>(Format<T>::eps / 2) +
                       static_cast<Real>(Format<T>::tiny) * static_cast<Real>(Format<T>::eps);
  if (!(bound < static_cast<Real>(kLargest<T>))) {
    ++state.unbounded;
    return;
  }
  const bool may_overflow = size + allowed >= static_cast<Real>(kLargest<T>);
  if (may_overflow && value == std::copysign(std::numeric_limits<Real>::infinity(), expected)) {
    return;
  }
  if (!(std::fabs(value - expected) <= allowed)) {
    wrong(allowed);
  }
}

// Random numbers of a kind that is chosen once: of one size, far from 0, few different ones, any bits.
class Values {
 public:
  explicit Values(Random& random) : random_(random), kind_(random.below(8)) {
    scale_ = random.one_of({1.0, 3.0, 3.0, 10.0, 30.0, 100.0, 1e-3, 1e-30, 1e-41, 1e4, 6e4, 1e30, 1e38});
    offset_ = kind_ == 1 ? random.one_of({10.0, -10.0, 1000.0, -1e4, 1e6, -1e30}) : 0;
  }
  template <typename T>
  T next() {
    if (kind_ == 0 && random_.one_in(2)) {
      const uint64_t bits = random_.bits();
      T value;
      std::memcpy(&value, &bits, sizeof(T));
      return value;
    }
    return Format<T>::store(kind_ == 2 ? static_cast<double>(random_.below(4)) - 2
                                       : offset_ + scale_ * random_.normal());
  }
  // Now and then one of these.
  template <typename T>
  T special() {
    const double infinity = std::numeric_limits<double>::infinity();
    if (random_.one_in(3)) {  // a NaN with a payload, and any sign
      T value = Format<T>::store(NAN);
      auto* bytes = reinterpret_cast<unsigned char*>(&value);
      bytes[0] = static_cast<unsigned char>(random_.bits());
      bytes[sizeof(T) - 1] ^= random_.one_in(2) ? 0x80 : 0;
      return value;
    }
    return Format<T>::store(random_.one_of({infinity, -infinity, -infinity, 0.0, -0.0, Format<T>::tiny / 2,
                                            -Format<T>::tiny * Format<T>::eps, kLargest<T>, -kLargest<T>}));
  }

 private:
  Random& random_;
  int64_t kind_;
  double scale_, offset_;
};

// A size near `edge`.
inline int64_t near(Random& random, int64_t edge) {
  return std::max<int64_t>(1, edge - 2 + random.below(5));
}

// The two halves: one call each.
void cpu_case(Random& random);
void device_case(Random& random);

}  // namespace fuzz
