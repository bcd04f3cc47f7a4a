// The element functions of vector arithmetic. Floating results are computed in float and rounded once to the type;
// integers wrap around. NaN spreads through Max, Min and Relu (the documentation does not say).
#pragma once

#include <cmath>
#include <type_traits>

#include "cann_sim/half.h"

namespace cann_sim::ops {

// half in float; integers as they are.
template <typename T>
auto widen(T value) {
  if constexpr (std::is_same_v<T, half>) {
    return float(value);
  } else {
    return value;
  }
}

// Integer arithmetic in unsigned: overflow wraps instead of being undefined.
template <typename T>
using Arithmetic = std::conditional_t<std::is_integral_v<T>, uint32_t, float>;

struct Add {
  template <typename T>
  T operator()(T a, T b) const {
    return T(Arithmetic<T>(a) + Arithmetic<T>(b));
  }
};
struct Sub {
  template <typename T>
  T operator()(T a, T b) const {
    return T(Arithmetic<T>(a) - Arithmetic<T>(b));
  }
};
struct Mul {
  template <typename T>
  T operator()(T a, T b) const {
    return T(Arithmetic<T>(a) * Arithmetic<T>(b));
  }
};
struct Div {
  template <typename T>
  T operator()(T a, T b) const {
    return T(widen(a) / widen(b));
  }
};
struct Max {
  template <typename T>
  T operator()(T a, T b) const {
    const auto x = widen(a), y = widen(b);
    return x > y || x != x ? a : b;
  }
};
struct Min {
  template <typename T>
  T operator()(T a, T b) const {
    const auto x = widen(a), y = widen(b);
    return x < y || x != x ? a : b;
  }
};
struct And {
  template <typename T>
  T operator()(T a, T b) const {
    return T(a & b);
  }
};
struct Or {
  template <typename T>
  T operator()(T a, T b) const {
    return T(a | b);
  }
};

struct Exp {
  template <typename T>
  T operator()(T a) const {
    return T(std::exp(float(a)));
  }
};
struct Ln {
  template <typename T>
  T operator()(T a) const {
    return T(std::log(float(a)));
  }
};
struct Abs {
  template <typename T>
  T operator()(T a) const {
    return T(std::fabs(float(a)));
  }
};
// The device's Reciprocal and Rsqrt are coarser than these (their error is not given): Div is exact on both.
struct Reciprocal {
  template <typename T>
  T operator()(T a) const {
    return T(1.0f / float(a));
  }
};
struct Rsqrt {
  template <typename T>
  T operator()(T a) const {
    return T(float(1.0 / std::sqrt(double(float(a)))));
  }
};
struct Sqrt {
  template <typename T>
  T operator()(T a) const {
    return T(std::sqrt(float(a)));
  }
};
struct Relu {
  template <typename T>
  T operator()(T a) const {
    const auto x = widen(a);
    return x > 0 || x != x ? a : T(0);
  }
};
struct Not {
  template <typename T>
  T operator()(T a) const {
    return T(~a);
  }
};

// A binary function with its second operand fixed.
template <typename Op, typename T>
struct WithScalar {
  T scalar;
  T operator()(T a) const { return Op{}(a, scalar); }
};

template <typename T>
struct LeakyRelu {
  T scalar;
  T operator()(T a) const { return widen(a) >= 0 ? a : Mul{}(a, scalar); }
};

template <typename T>
struct ShiftLeft {
  uint32_t distance;
  T operator()(T a) const { return distance >= 8 * sizeof(T) ? T(0) : T(uint32_t(a) << distance); }
};

// Arithmetic for signed types; with `round` the last bit shifted out is added.
template <typename T>
struct ShiftRight {
  uint32_t distance;
  bool round;
  T operator()(T a) const {
    const int64_t value = a;
    const uint32_t by = distance > 40 ? 40 : distance;
    const int64_t carry = round && by > 0 ? (value >> (by - 1)) & 1 : 0;
    return T((value >> by) + carry);
  }
};

// Product, then sum, each rounded to dst's type: with equal types the compound operations are documented to be no more
// accurate than Mul and Add. With half sources and a float dst the product is exact.
struct MulAdd {
  template <typename D, typename S>
  D operator()(S a, S b, D c) const {
    if constexpr (std::is_same_v<D, S>) {
      return Add{}(Mul{}(a, b), c);
    } else {
      return float(a) * float(b) + c;
    }
  }
};

}  // namespace cann_sim::ops
