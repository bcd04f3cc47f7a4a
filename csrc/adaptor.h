// Between functions f(const Options&, arguments...) and the flat signatures that the dispatcher requires, in which the
// options come last, one by one, and structs of arguments (ops.h) are spread out too.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/Exception.h>

#include <array>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "options.h"

namespace npu_xent {

// A member as the dispatcher passes it: unchanged, except that the reduction is a string.
template <typename T>
T to_flat(const T& member) {
  return member;
}
inline std::string_view to_flat(Reduction reduction) {
  return reduction == Reduction::mean ? "mean" : reduction == Reduction::sum ? "sum" : "none";
}
template <typename T>
void from_flat(const T& flat, T& member) {
  member = flat;
}
inline void from_flat(std::string_view name, Reduction& reduction) {
  reduction = name == "mean" ? Reduction::mean : name == "sum" ? Reduction::sum : Reduction::none;
  TORCH_CHECK_VALUE(name == to_flat(reduction), "npu_xent: reduction must be \"mean\", \"sum\" or \"none\", but is \"",
                    name, "\".");
}

// How an argument appears in a flat signature: as it is, or, if it is a struct that has `tie` as Options has, as its
// members. `take` makes it from the flat arguments from number `begin` on, `give` is the reverse.
template <typename T, typename = void>
struct Argument {
  using Flat = std::tuple<T>;
  template <size_t begin, typename All>
  static T take(All& all) {
    return static_cast<T>(std::get<begin>(all));
  }
  template <typename U>
  static auto give(U& argument) {
    return std::tuple<T>(static_cast<T>(argument));
  }
};
template <typename T>
struct Argument<const T&, std::void_t<decltype(T::tie(std::declval<const T&>()))>> {
  template <typename Tie>
  struct Members;
  template <typename... Member>
  struct Members<std::tuple<const Member&...>> {
    using Flat = std::tuple<std::conditional_t<std::is_arithmetic_v<Member>, Member, const Member&>...>;
  };
  using Flat = typename Members<decltype(T::tie(std::declval<const T&>()))>::Flat;

  template <size_t begin, typename All>
  static T take(All& all) {
    T operands;
    assign(
        T::tie(operands), [&](auto i) -> auto& { return std::get<begin + i>(all); },
        std::make_index_sequence<std::tuple_size_v<Flat>>());
    return operands;
  }
  static Flat give(const T& operands) { return T::tie(operands); }

 private:
  template <typename Members, typename Get, size_t... i>
  static void assign(Members members, const Get& get, std::index_sequence<i...>) {
    ((std::get<i>(members) = get(std::integral_constant<size_t, i>())), ...);
  }
};

template <typename T>
struct FlatTypes;
template <typename... T>
struct FlatTypes<std::tuple<T&...>> {
  using type = std::tuple<std::decay_t<decltype(to_flat(std::declval<T&>()))>...>;
};
using FlatOptions = FlatTypes<decltype(Options::tie(std::declval<Options&>()))>::type;

// f(options, arguments...), and f(arguments..., option, option, ...) with structs of operands flattened.
template <auto f, typename F, typename Arguments, typename Flat>
struct Adaptor;
template <auto f, typename R, typename... Arguments, typename... FlatArgument, typename... FlatOption>
struct Adaptor<f, R (*)(const Options&, Arguments...), std::tuple<FlatArgument...>, std::tuple<FlatOption...>> {
  static R flat(FlatArgument... arguments, FlatOption... options) {
    Options o;
    std::apply([&](auto&... member) { (from_flat(options, member), ...); }, Options::tie(o));
    auto all = std::forward_as_tuple(std::forward<FlatArgument>(arguments)...);
    return run(o, all, std::index_sequence_for<Arguments...>());
  }
  // The handle is found once for each f, so f goes with one name.
  static R call(const char* name, const Options& o, Arguments... arguments) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<R(FlatArgument..., FlatOption...)>();
    return std::apply(
        [&](FlatArgument... flat_arguments) -> R {
          return std::apply(
              [&](const auto&... member) -> R {
                return op.call(std::forward<FlatArgument>(flat_arguments)..., to_flat(member)...);
              },
              Options::tie(o));
        },
        std::tuple_cat(Argument<Arguments>::give(arguments)...));
  }

 private:
  // The place of the first flat argument of argument i.
  template <size_t i>
  static constexpr size_t begin() {
    constexpr std::array sizes{std::tuple_size_v<typename Argument<Arguments>::Flat>...};
    size_t sum = 0;
    for (size_t j = 0; j < i; ++j) {
      sum += sizes[j];
    }
    return sum;
  }
  template <typename All, size_t... i>
  static R run(const Options& o, All& all, std::index_sequence<i...>) {
    return f(o, Argument<Arguments>::template take<begin<i>()>(all)...);
  }
};
template <auto f, typename F = decltype(f)>
struct AdaptorOf;
template <auto f, typename R, typename... Arguments>
struct AdaptorOf<f, R (*)(const Options&, Arguments...)>
    : Adaptor<f, R (*)(const Options&, Arguments...),
              decltype(std::tuple_cat(std::declval<typename Argument<Arguments>::Flat>()...)), FlatOptions> {};

// f with the flat signature that the dispatcher requires.
template <auto f>
constexpr auto* flat = &AdaptorOf<f>::flat;

// Calls the operator `name`, whose signature is that of f.
template <auto f, typename... Arguments>
auto call(const char* name, const Options& o, Arguments&&... arguments) {
  return AdaptorOf<f>::call(name, o, std::forward<Arguments>(arguments)...);
}

}  // namespace npu_xent
