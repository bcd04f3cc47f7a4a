// The device's half of the fuzzer: the launches that an operation is made of, on cann_sim, which checks each launch.
#include <aclrtlaunch_npu_xent_reduce_rows.h>
#include <aclrtlaunch_npu_xent_row_grad.h>
#include <aclrtlaunch_npu_xent_row_stats.h>
#include <aclrtlaunch_npu_xent_row_stats_grad.h>
#include <aclrtlaunch_npu_xent_scale.h>

#include <cann_sim/launch.h>

#include "fuzz_rows.h"
#include "tiling/row_plan.h"

namespace fuzz {
namespace {

using npu_xent::div_up;
using npu_xent::kBlock;
using npu_xent::kNoTarget;
using npu_xent::kReduceRows;
using npu_xent::kReduceWeights;
using npu_xent::LogitsType;
using npu_xent::RowMode;
using npu_xent::Stage;

// Sums are trees; everything is fp32.
constexpr Rounding kDeviceRounding{
    /*exp=*/10, /*tanh=*/10, /*factors=*/8 * Format<float>::eps, /*joined=*/Format<float>::eps, 1024, 1024};

template <typename T>
constexpr LogitsType logits_type() {
  return std::is_same_v<T, float> ? LogitsType::fp32 : std::is_same_v<T, f16> ? LogitsType::fp16 : LogitsType::bf16;
}

using Floats = Buffer<float>;

// Device memory while a case runs.
class Registered {
 public:
  Registered() = default;
  Registered(const Registered&) = delete;
  Registered& operator=(const Registered&) = delete;
  ~Registered() {
    for (const uint64_t id : ids_) {
      cann_sim_unregister(id);
    }
  }
  // `written`: an input. Reading an output before it is written is an error.
  template <typename T>
  void add(const Buffer<T>& x, bool written) {
    if (x.data() != nullptr && x.size() != 0) {
      ids_.push_back(cann_sim_register(x.data(), x.size() * sizeof(T), written));
    }
  }

 private:
  std::vector<uint64_t> ids_;
};

// Null without elements, as a tensor that a launch does not have.
template <typename T>
void* address(const Buffer<T>& x) {
  return x.size() == 0 ? nullptr : x.data();
}

void launched(const char* kernel, uint32_t code) {
  if (code != 0) {
    fail("%s: %s", kernel, cann_sim_last_error());
  }
}

struct Shape {
  int64_t rows, cols;
};
Shape some_shape(Random& random) {
  const int64_t kind = random.below(40);
  if (kind < 36) {  // short rows
    const int64_t cols =
        kind < 24 ? 1 + random.below(70) : near(random, random.number_of({64, 128, 192, 256, 512, 1024}));
    const int64_t most = std::max<int64_t>(1, (random.one_in(8) ? 6000 : 800) / cols);
    return {1 + random.below(std::min<int64_t>(most, 300)), cols};
  }
  const int64_t cols = 1025 + (random.one_in(2) ? random.below(600) : random.below(6000));
  return {random.one_in(4) ? 25 + random.below(30) : 1 + random.below(4), std::min<int64_t>(cols, 9000)};
}

template <typename T>
struct Launches : Problem<T> {
  using P = Problem<T>;
  using P::eps, P::tiny, P::random, P::memory, P::rows, P::cols, P::options, P::place, P::logits, P::target, P::weight,
      P::temperature, P::totals, P::ignored, P::bad, P::z, P::max, P::lse, P::log_sum, P::tilt, P::map_row, P::sum_row;
  using typename P::Coefficients, typename P::Real;

  XentArgs args{};
  XentPlan plan{};
  int64_t core_count;
  Floats row_scale, gm_totals;
  Registered registered;

  explicit Launches(Random& random_, const Shape& shape)
      : P(random_, true, false, kDeviceRounding, shape.rows, shape.cols, shape.rows),
        core_count(random.number_of({1, 2, 20, 24, 40, 48})) {
    const RowOptions& o = options;
    args.dtype = static_cast<int64_t>(logits_type<T>());
    args.rows = rows;
    args.cols = args.output_stride = cols;
    args.logits_stride = place.layout.row;
    args.class_start = o.class_start;
    args.num_classes = o.num_classes;
    args.ignore_index = o.ignore_index;
    args.reduction = static_cast<int64_t>(o.reduction);
    args.target_share = static_cast<float>(1 - o.label_smoothing);
    args.class_share = static_cast<float>(o.label_smoothing / static_cast<double>(o.num_classes));
    args.lse_square_scale = static_cast<float>(o.lse_square_scale);
    args.logit_scale = static_cast<float>(o.logit_scale);
    args.softcap = static_cast<float>(o.softcap);
    args.grad_scale = static_cast<float>(o.grad_scale);
    gm_totals = Floats(memory, kTotals);
    for (int64_t i = 0; i < kTotals; ++i) {
      gm_totals[i] = static_cast<float>(totals[i]);
    }
    gm_totals.seal();
    registered.add(gm_totals, true);
    registered.add(logits, true);
    registered.add(target, true);
    registered.add(weight, true);
    // As they are by default, but on one thread and without messages.
    cann_sim_config config{};
    config.check = 1, config.trace_core = -1, config.threads = 1, config.quiet = 1;
    config.bandwidth_scale = config.vector_scale = config.scalar_scale = 1;
    cann_sim_configure(&config);
  }

  // After the operands by row are known.
  void make_plan(bool by_row) {
    if (temperature.data() != nullptr) {
      row_scale = Floats(memory, rows);
      for (int64_t n = 0; n < rows; ++n) {
        const float scale = 1 / temperature[n];
        row_scale[n] = scale > 0 && std::isfinite(scale) ? scale : NAN;
      }
      row_scale.seal();
      registered.add(row_scale, true);
      args.row_scaled = 1;
    }
    args.by_row = by_row || args.row_scaled;
    plan = npu_xent::plan_rows(rows, cols, args.dtype, args.softcap != 0, args.by_row != 0);
    if (cols > npu_xent::kShortCols && random.one_in(3)) {
      plan.mode = static_cast<int64_t>(RowMode::streaming);
      plan.parts = 1;
      plan.chunks_per_part = plan.chunks;
      plan.slots = npu_xent::kStreamSlots;
    }
    P::chunks = plan.chunks + 2;
    note("row mode %lld, %lld rows a tile, %lld chunks of %lld, %lld parts, %lld cores", ll(plan.mode),
         ll(plan.rows_per_tile), ll(plan.chunks), ll(plan.chunk_cols), ll(plan.parts), ll(core_count));
  }

  uint32_t cores(int64_t work) const { return static_cast<uint32_t>(std::clamp<int64_t>(work, 1, core_count)); }
  bool split() const { return plan.mode == static_cast<int64_t>(RowMode::split); }
  int64_t work_items() const { return npu_xent::work_items(plan, rows); }
  int64_t chunk_items() const { return npu_xent::chunk_items(plan, rows); }
  XentArgs at(Stage stage) const {
    XentArgs copy = args;
    copy.stage = static_cast<int64_t>(stage);
    return copy;
  }

  // Statistics of rows, or of their parts.
  struct Stats {
    Floats lse, lse_low, picked, wsum, weight, entropy, top1;
  };
  Stats new_stats(int64_t n, bool wsum, bool entropy, bool top1, bool parts) {
    Stats s{Floats(memory, n),
            Floats(memory, n),
            Floats(memory, n),
            Floats(memory, n, wsum),
            Floats(memory, n, wsum && parts),
            Floats(memory, n, entropy),
            Floats(memory, n, top1)};
    for (const Floats* x : {&s.lse, &s.lse_low, &s.picked, &s.wsum, &s.weight, &s.entropy, &s.top1}) {
      registered.add(*x, false);
    }
    return s;
  }

  void launch_stats(Stats& out, void* log_prob) {
    if (!split()) {
      XentArgs copy = args;
      launched("row_stats", aclrtlaunch_npu_xent_row_stats(
                                cores(work_items()), nullptr, logits.data(), target.data(), address(weight),
                                address(row_scale), out.lse.data(), out.lse_low.data(), out.picked.data(),
                                out.wsum.data(), nullptr, out.entropy.data(), out.top1.data(), log_prob, &plan, &copy));
      return;
    }
    Stats parts = new_stats(rows * plan.parts, out.wsum.data() != nullptr, out.entropy.data() != nullptr,
                            out.top1.data() != nullptr, true);
    XentArgs copy = at(Stage::partial_stats);
    launched("row_stats",
             aclrtlaunch_npu_xent_row_stats(cores(work_items()), nullptr, logits.data(), target.data(), address(weight),
                                            address(row_scale), parts.lse.data(), parts.lse_low.data(),
                                            parts.picked.data(), parts.wsum.data(), parts.weight.data(),
                                            parts.entropy.data(), parts.top1.data(), nullptr, &plan, &copy));
    copy = at(Stage::join_parts);
    launched("reduce_rows",
             aclrtlaunch_npu_xent_reduce_rows(
                 cores(rows), nullptr, target.data(), address(weight), out.lse.data(), out.lse_low.data(),
                 out.picked.data(), out.wsum.data(), parts.lse.data(), parts.lse_low.data(), parts.picked.data(),
                 parts.wsum.data(), parts.weight.data(), nullptr, nullptr, nullptr, nullptr, out.entropy.data(),
                 out.top1.data(), parts.entropy.data(), parts.top1.data(), &plan, &copy));
  }

  void check_stats(bool with_log_prob) {
    const bool need_entropy = random.one_in(3), need_top1 = random.one_in(3);
    make_plan(need_entropy || need_top1);
    args.read_ignored = with_log_prob || random.one_in(2);
    Stats stats = new_stats(rows, random.one_in(2), need_entropy, need_top1, false);
    Buffer<T> log_prob(memory, rows * cols, with_log_prob);
    registered.add(log_prob, false);
    note("row_stats%s%s%s%s%s", with_log_prob ? ", log_prob" : "", stats.wsum.data() ? ", wsum" : "",
         need_entropy ? ", entropy" : "", need_top1 ? ", top1" : "", args.read_ignored ? ", read_ignored" : "");
    const bool apart = split() || need_entropy || need_top1;
    launch_stats(stats, apart ? nullptr : log_prob.data());
    if (with_log_prob && apart) {
      XentArgs copy = at(Stage::log_prob_only);
      launched("row_stats", aclrtlaunch_npu_xent_row_stats(cores(chunk_items()), nullptr, logits.data(), target.data(),
                                                           address(weight), address(row_scale), stats.lse.data(),
                                                           stats.lse_low.data(), nullptr, nullptr, nullptr, nullptr,
                                                           nullptr, log_prob.data(), &plan, &copy));
    }
    if (state.messages != 0) {
      return;  // the launch was refused
    }
    for (int64_t n = 0; n < rows; ++n) {
      map_row(n);
      sum_row();
      check_row(n, stats);
      for (int64_t c = 0; with_log_prob && c < cols; ++c) {
        const T value = log_prob.take(n * cols + c);
        if (this->undefined_scale(n) || P::overflows) {
          continue;
        }
        const Real y = z[c] - Real(last_high), expected = std::isfinite(last_high) ? y - Real(last_low) : NAN;
        expect("log_prob", n, c, value, expected,
               eps * (std::fabs(y) + 2 * std::fabs(Real(last_low))) + this->z_error(z[c]));
      }
    }
    check_rest(stats);
    log_prob.check_rest("log_prob");
    check_all_inputs();
  }
  float last_high = 0, last_low = 0;
  void check_row(int64_t n, Stats& s) {
    last_high = s.lse.take(n), last_low = s.lse_low.take(n);
    Floats none;
    this->check_row_stats(n, ignored(n) && args.read_ignored == 0, last_high, last_low, s.picked, s.wsum, s.entropy,
                          s.top1, none);
  }
  void check_rest(const Stats& s) const {
    s.lse.check_rest("lse"), s.lse_low.check_rest("lse_low"), s.picked.check_rest("picked");
    s.wsum.check_rest("wsum"), s.entropy.check_rest("entropy"), s.top1.check_rest("top1");
  }
  void check_all_inputs(bool in_place = false) const {
    in_place ? this->check_small_inputs() : this->check_inputs();
    gm_totals.check_sealed("totals"), row_scale.check_sealed("row_scale");
  }

  // The output of a gradient: over the logits, or fresh memory.
  struct Output {
    bool in_place;
    Buffer<T> memory;
    std::vector<T> logits;
  };
  Output new_output() {
    const bool in_place = place.layout.row == cols && random.one_in(3);
    Output out{in_place, in_place ? logits : Buffer<T>(memory, rows * cols), {}};
    if (in_place) {
      out.logits.assign(logits.data(), logits.data() + rows * cols);
    } else {
      registered.add(out.memory, false);
    }
    return out;
  }
  // The gradient, in memory of its own; the logits are back in their place.
  std::vector<T> results(Output& out) {
    std::vector<T> values;
    for (int64_t i = 0; i < rows * cols; ++i) {
      values.push_back(out.memory.take(i));
    }
    out.memory.check_rest("grad");
    if (out.in_place) {
      std::copy(out.logits.begin(), out.logits.end(), logits.data());
    }
    return values;
  }

  void check_stats_grad() {
    temperature = Floats();
    if (options.reduction == Reduction::none) {
      options.reduction = Reduction::mean;
      args.reduction = static_cast<int64_t>(options.reduction);
    }
    make_plan(false);
    args.read_ignored = random.one_in(2);
    args.unit_upstream = 1;
    Stats stats = new_stats(rows, options.label_smoothing != 0, false, false, false);
    Output out = new_output();
    note("row_stats_grad%s%s", args.read_ignored ? ", read_ignored" : "", out.in_place ? ", in place" : "");
    if (split()) {
      launch_stats(stats, nullptr);
      launch_grad(stats.lse, stats.lse_low, {}, {}, {}, {}, target, args, out);
    } else {
      XentArgs copy = args;
      launched("row_stats_grad", aclrtlaunch_npu_xent_row_stats_grad(
                                     cores(work_items()), nullptr, logits.data(), target.data(), address(weight),
                                     gm_totals.data(), stats.lse.data(), stats.lse_low.data(), stats.picked.data(),
                                     stats.wsum.data(), out.memory.data(), &plan, &copy));
    }
    if (state.messages != 0) {
      return;
    }
    const std::vector<T> grad = results(out);
    const bool mean = options.reduction == Reduction::mean;
    for (int64_t n = 0; n < rows; ++n) {
      map_row(n);
      sum_row();
      check_row(n, stats);
      const Real from_loss = mean ? 1 / totals[kKeptWeight] : 1, from_z = mean ? 1 / totals[kKeptRows] : 1;
      this->check_row_grad(n, coefficients(n, from_loss, from_z, 0, last_high), ignored(n), last_high, last_low,
                           [&](int64_t c) { return grad[n * cols + c]; });
    }
    check_rest(stats);
    check_all_inputs(out.in_place);
  }
  // `added` to a: with a gradient of lse.
  Coefficients coefficients(int64_t n, Real from_loss, Real from_z, Real added, float high) const {
    Coefficients k;
    if (bad(n)) {
      k.a = NAN;
    } else if (!ignored(n)) {
      k = P::coefficients(n, from_loss, from_z, high);
    }
    k.a += added, k.size += std::fabs(added);
    return k;
  }

  void launch_grad(const Floats& lse_, const Floats& low, const Floats& entropy, const Floats& from_loss,
                   const Floats& from_z, const Floats& from_entropy, const Buffer<int64_t>& targets, XentArgs copy,
                   Output& out) {
    launched("row_grad", aclrtlaunch_npu_xent_row_grad(
                             cores(chunk_items()), nullptr, logits.data(), targets.data(), address(weight),
                             address(row_scale), lse_.data(), low.data(), entropy.data(), gm_totals.data(),
                             from_loss.data(), from_z.data(), from_entropy.data(), out.memory.data(), &plan, &copy));
  }

  Floats some_upstream(bool by_row, bool present) {
    Floats values(memory, by_row ? rows : 1, present);
    const double scale = random.one_of({1.0, 1.0, 1.0, 1e-5, 65536.0});
    for (int64_t i = 0; present && i < values.size(); ++i) {
      values[i] = static_cast<float>(random.one_in(8) ? 0 : scale * random.normal());
    }
    values.seal();
    return values;
  }

  void check_grad() {
    const bool none = options.reduction == Reduction::none, mean = options.reduction == Reduction::mean;
    Floats from_loss = some_upstream(none, !random.one_in(4)), from_z = some_upstream(none, random.one_in(2));
    const Floats from_lse = some_upstream(true, random.one_in(4));
    Floats from_entropy = some_upstream(true, random.one_in(3));
    make_plan(from_entropy.data() != nullptr);
    Floats high(memory, rows), low(memory, rows, !random.one_in(4)),
        entropy(memory, rows, from_entropy.data() != nullptr);
    const Real more = random.one_in(4) ? 3 * random.uniform() : 0;  // of the other shards
    for (int64_t n = 0; n < rows; ++n) {
      map_row(n);
      sum_row();
      high[n] = static_cast<float>(lse + more);
      if (low.data() != nullptr) {
        low[n] = std::isfinite(high[n]) ? static_cast<float>(lse + more - Real(high[n])) : 0;
      }
      if (entropy.data() != nullptr) {
        entropy[n] = static_cast<float>(std::isfinite(lse) ? log_sum - tilt + more : lse);
      }
    }
    high.seal(), low.seal(), entropy.seal();
    registered.add(high, true), registered.add(low, true), registered.add(entropy, true);
    XentArgs copy = args;
    Buffer<int64_t> targets = target;
    std::vector<Real> loss_of(rows), z_of(rows), added(rows);
    const auto value = [&](const Floats& x, int64_t n, bool by_row) {
      return x.data() != nullptr ? Real(x[by_row ? n : 0]) : Real(0);
    };
    for (int64_t n = 0; n < rows; ++n) {
      const Real g = value(from_loss, n, none), gz = value(from_z, n, none);
      loss_of[n] = from_loss.data() == nullptr ? 0 : mean ? g / totals[kKeptWeight] : g;
      z_of[n] = mean ? (g + gz) / totals[kKeptRows] : g + gz;
    }
    if (from_lse.data() != nullptr) {  // as the operator prepares them
      targets = Buffer<int64_t>(memory, rows);
      Floats of_loss(memory, rows, from_loss.data() != nullptr), of_a(memory, rows),
          of_entropy(memory, rows, from_entropy.data() != nullptr);
      for (int64_t n = 0; n < rows; ++n) {
        const Real zs = args.lse_square_scale;
        const Real of_z = ignored(n) || zs == 0 || (from_loss.data() == nullptr && from_z.data() == nullptr)
                              ? 0
                              : z_of[n] * 2 * zs * Real(high[n]);
        of_a[n] = static_cast<float>(Real(from_lse[n]) + of_z);
        added[n] = of_a[n], z_of[n] = 0;
        if (of_loss.data() != nullptr) {
          of_loss[n] = ignored(n) ? 0 : static_cast<float>(loss_of[n]);
          loss_of[n] = of_loss[n];
        }
        if (of_entropy.data() != nullptr) {
          of_entropy[n] = ignored(n) ? 0 : from_entropy[n];
        }
        targets[n] = bad(n) ? -2 : !ignored(n) ? target[n] : from_lse[n] == 0 ? -1 : kNoTarget;
      }
      targets.seal(), of_loss.seal(), of_a.seal(), of_entropy.seal();
      registered.add(targets, true);
      from_loss = of_loss, from_z = of_a, from_entropy = of_entropy;
      copy.ignore_index = -1;
      copy.reduction = static_cast<int64_t>(Reduction::none);
      copy.adds_to_a = 1;
    }
    registered.add(from_loss, true), registered.add(from_z, true), registered.add(from_entropy, true);
    Output out = new_output();
    note("row_grad%s%s%s%s%s", from_loss.data() ? ", of the loss" : "", from_z.data() ? ", of the z-loss" : "",
         from_lse.data() ? ", of lse" : "", from_entropy.data() ? ", of the entropy" : "",
         out.in_place ? ", in place" : "");
    launch_grad(high, low, entropy, from_loss, from_z, from_entropy, targets, copy, out);
    if (state.messages != 0) {
      return;
    }
    const std::vector<T> grad = results(out);
    for (int64_t n = 0; n < rows; ++n) {
      map_row(n);
      Coefficients k = coefficients(n, loss_of[n], z_of[n], added[n], high[n]);
      if (from_entropy.data() != nullptr && !ignored(n)) {
        k.h = from_entropy[n], k.entropy = entropy[n];
      }
      const bool zero = ignored(n) && (from_lse.data() == nullptr || from_lse[n] == 0);
      this->check_row_grad(n, k, zero, high[n], low.data() != nullptr ? low[n] : 0,
                           [&](int64_t c) { return grad[n * cols + c]; });
    }
    high.check_sealed("lse"), low.check_sealed("lse_low"), entropy.check_sealed("entropy");
    from_loss.check_sealed("grad_loss"), from_z.check_sealed("grad_z_loss"), targets.check_sealed("target");
    from_entropy.check_sealed("grad_entropy");
    check_all_inputs(out.in_place);
  }

  void launch_reduce(Stage stage, int64_t tasks, const Stats* stats, const Floats& of_totals, const Floats& loss,
                     const Floats& z_loss, const Floats& sums) {
    const auto of = [&](const Floats Stats::* x) { return stats != nullptr ? (stats->*x).data() : nullptr; };
    XentPlan no_plan{};
    XentArgs copy = at(stage);
    launched("reduce_rows",
             aclrtlaunch_npu_xent_reduce_rows(
                 cores(tasks), nullptr, target.data(), address(weight), of(&Stats::lse), of(&Stats::lse_low),
                 of(&Stats::picked), of(&Stats::wsum), nullptr, nullptr, nullptr, nullptr, nullptr, of_totals.data(),
                 loss.data(), z_loss.data(), sums.data(), nullptr, nullptr, nullptr, nullptr, &no_plan, &copy));
  }

  void check_totals() {
    note("totals");
    const int64_t tasks =
        div_up(rows, kReduceRows) + (weight.data() != nullptr ? div_up(options.num_classes, kReduceWeights) : 0);
    Floats sums(memory, kBlock * tasks), out(memory, kTotals);
    registered.add(sums, false), registered.add(out, false);
    launch_reduce(Stage::block_totals, tasks, nullptr, {}, {}, {}, sums);
    launch_reduce(Stage::join_totals, 1, nullptr, out, {}, {}, sums);
    Real kept = 0, size = 0, count = 0, all = 0, all_size = 0;
    for (int64_t n = 0; n < rows; ++n) {
      if (!ignored(n) && !bad(n)) {
        const Real w = this->target_weight(n);
        kept += w, size += std::fabs(w), count += 1;
      }
    }
    for (int64_t c = 0; weight.data() != nullptr && c < options.num_classes; ++c) {
      all += weight[c], all_size += std::fabs(weight[c]);
    }
    all = weight.data() != nullptr ? all : static_cast<Real>(options.num_classes);
    expect("kept weight", 0, 0, out.take(kKeptWeight), kept, 12 * eps * size);
    expect("kept rows", 0, 0, out.take(kKeptRows), count, Real(0));
    expect("class weight", 0, 0, out.take(kClassWeight), all, 12 * eps * all_size);
    out.check_rest("totals");
    check_all_inputs();
  }

  void check_loss() {
    note("loss");
    const bool none = options.reduction == Reduction::none, mean = options.reduction == Reduction::mean;
    const bool with_z = options.lse_square_scale != 0;
    Stats s{Floats(memory, rows),
            Floats(memory, rows, !random.one_in(4)),
            Floats(memory, rows),
            Floats(memory, rows, options.label_smoothing != 0),
            {},
            {},
            {}};
    Values values(random);
    const bool hostile = random.one_in(4);
    for (Floats* x : {&s.lse, &s.picked, &s.wsum}) {
      for (int64_t n = 0; x->data() != nullptr && n < rows; ++n) {
        (*x)[n] = hostile && random.one_in(16) ? values.template special<float>() : values.template next<float>();
      }
      x->seal();
    }
    for (int64_t n = 0; s.lse_low.data() != nullptr && n < rows; ++n) {
      s.lse_low[n] = std::isfinite(s.lse[n]) ? static_cast<float>(s.lse[n] * eps * random.uniform()) : 0;
    }
    s.lse_low.seal();
    for (const Floats* x : {&s.lse, &s.lse_low, &s.picked, &s.wsum}) {
      registered.add(*x, true);
    }
    const int64_t blocks = div_up(rows, kReduceRows);
    Floats loss(memory, none ? rows : 1), z_loss(memory, none ? rows : 1, with_z), sums(memory, kBlock * blocks, !none);
    registered.add(loss, false), registered.add(z_loss, false), registered.add(sums, false);
    if (none) {
      launch_reduce(Stage::block_loss, blocks, &s, gm_totals, loss, z_loss, {});
    } else {
      launch_reduce(Stage::block_loss, blocks, &s, gm_totals, {}, {}, sums);
      launch_reduce(Stage::join_loss, 1, &s, gm_totals, loss, z_loss, sums);
    }
    Real sum = 0, z_sum = 0, size = 0, z_size = 0;
    const Real share_of_target = args.target_share, zs = args.lse_square_scale;
    for (int64_t n = 0; n < rows; ++n) {
      Real l = 0, z_l = 0, terms = 0, z_terms = 0;
      if (bad(n)) {
        l = z_l = NAN;
      } else if (!ignored(n)) {
        const Real w = this->target_weight(n), share = share_of_target * w;
        const Real high = s.lse[n], picked = s.picked[n], rest = s.lse_low.data() != nullptr ? s.lse_low[n] : 0;
        l = share_of_target == 0 || w == 0 ? 0 : share * (high - picked + rest);
        terms = share == 0 ? 0
                           : (1 + std::fabs(share)) * (1 + std::fabs(w)) *
                                 (std::fabs(high) + std::fabs(picked) + std::fabs(rest));
        if (options.label_smoothing != 0) {
          const Real part = Real(args.class_share) * Real(s.wsum[n]);
          l -= part, terms += std::fabs(part);
        }
        z_l = zs * high * high, z_terms = high * high;
        if (!std::isfinite(high)) {
          l = z_l = NAN;
        }
      }
      terms = std::isnan(l) || std::isinf(l) ? 0 : terms, z_terms = std::isnan(z_l) ? 0 : z_terms;
      if (none) {
        expect_loss("loss", n, loss.take(n), with_z ? l + z_l : l, terms + z_terms, 8 * (terms + std::fabs(z_l)));
        if (with_z) {
          expect_loss("z_loss", n, z_loss.take(n), z_l, z_terms, 8 * std::fabs(z_l));
        }
      }
      sum += l, z_sum += z_l, size += terms, z_size += z_terms;
    }
    if (!none) {
      const Real by_weight = mean ? totals[kKeptWeight] : 1, by_rows = mean ? totals[kKeptRows] : 1;
      Real expected = by_weight == 0 ? NAN : sum / by_weight;
      const Real z_expected = by_rows == 0 ? NAN : z_sum / by_rows;
      const Real scale = 1 + (by_weight == 0 ? 0 : 1 / by_weight), z_scale = 1 + (by_rows == 0 ? 0 : 1 / by_rows);
      if (with_z) {
        expected += z_expected;
      }
      expect_loss("loss", 0, loss.take(0), expected, scale * size + z_scale * z_size,
                  20 * (scale * size + z_scale * z_size * std::min(zs, Real(1))));
      if (with_z) {
        expect_loss("z_loss", 0, z_loss.take(0), z_expected, z_scale * z_size, 20 * z_scale * z_size * zs);
      }
    }
    loss.check_rest("loss"), z_loss.check_rest("z_loss");
    s.lse.check_sealed("lse"), s.lse_low.check_sealed("lse_low"), s.picked.check_sealed("picked");
    s.wsum.check_sealed("wsum");
    check_all_inputs();
  }
  void expect_loss(const char* name, int64_t n, float value, Real expected, Real terms, Real roundings) {
    if (!(terms < P::largest)) {
      ++state.unbounded;
      return;
    }
    expect(name, n, 0, value, expected, eps * roundings + 1e6 * tiny);
  }

  template <typename F>
  void check_scale_by(F factor) {
    const int64_t n = random.one_in(8) ? near(random, random.number_of({8192, 16384})) : 1 + random.below(300);
    Values values(random);
    Buffer<T> x(memory, n);
    Buffer<F> factors(memory, 1);
    std::vector<T> before;
    for (int64_t i = 0; i < n; ++i) {
      before.push_back(random.one_in(32) ? values.template special<T>() : values.template next<T>());
      x[i] = before[i];
    }
    factors[0] = factor;
    factors.seal();
    registered.add(x, true), registered.add(factors, true);
    note("scale of %lld by %g", ll(n), load(factor));
    XentArgs scale{};
    scale.dtype = args.dtype;
    scale.cols = n;
    scale.factor_dtype = static_cast<int64_t>(logits_type<F>());
    launched("scale", aclrtlaunch_npu_xent_scale(cores(div_up(n, npu_xent::kScaleChunk)), nullptr, x.data(),
                                                 factors.data(), &scale));
    for (int64_t i = 0; i < n; ++i) {
      const Real expected = static_cast<float>(load(before[i])) * static_cast<float>(load(factor));
      expect("x", 0, i, x.take(i), expected, Real(0));
    }
    x.check_rest("x"), factors.check_sealed("factor");
  }
  void check_scale() {
    const double factor =
        random.one_of({0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, 3 * random.uniform(), double{NAN}, double{INFINITY}});
    switch (random.below(3)) {
      case 0:
        return check_scale_by(static_cast<float>(factor));
      case 1:
        return check_scale_by(Format<f16>::store(factor));
      default:
        return check_scale_by(Format<bf16>::store(factor));
    }
  }
};

template <typename T>
void one_operation(Random& random) {
  const int64_t kind = random.below(100);
  Launches<T> launches(random, some_shape(random));
  if (kind < 35) {
    launches.check_stats(false);
  } else if (kind < 47) {
    launches.check_stats(true);
  } else if (kind < 72) {
    launches.check_grad();
  } else if (kind < 87) {
    launches.check_stats_grad();
  } else if (kind < 92) {
    launches.check_totals();
  } else if (kind < 97) {
    launches.check_loss();
  } else {
    launches.check_scale();
  }
}

}  // namespace

void device_case(Random& random) {
  switch (random.below(3)) {
    case 0:
      return one_operation<float>(random);
    case 1:
      return one_operation<f16>(random);
    default:
      return one_operation<bf16>(random);
  }
}

}  // namespace fuzz
