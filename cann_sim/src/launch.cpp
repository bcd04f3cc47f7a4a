// Launches: configuration, the threads that run the cores, and the C interface of launch.h.
#include "cann_sim/launch.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>

#include "core_state.h"
#include "registry.h"

namespace cann_sim {

namespace {

thread_local Config thread_config;
thread_local bool thread_quiet = false;
thread_local std::string last_report = "{}", last_error;
std::atomic<cann_sim_submit> executor{nullptr};

double scale_from_environment(const char* name) {
  const char* text = std::getenv(name);
  const double scale = text == nullptr ? 1 : std::atof(text);
  return scale > 0 ? scale : 1;
}

Config current_config() {
  Config config = thread_config;
  const char* check = std::getenv("CANN_SIM_CHECK");
  config.check = config.check && (check == nullptr || std::string(check) != "0");
  config.bandwidth_scale *= scale_from_environment("CANN_SIM_BANDWIDTH_SCALE");
  config.vector_scale *= scale_from_environment("CANN_SIM_VECTOR_SCALE");
  config.scalar_scale *= scale_from_environment("CANN_SIM_SCALAR_SCALE");
  const char* threads = std::getenv("CANN_SIM_THREADS");
  if (config.threads <= 0 && threads != nullptr) {
    config.threads = std::atoi(threads);
  }
  if (config.threads <= 0) {
    config.threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  }
  return config;
}

// Reuses cores across launches, since each has a few megabytes of maps.
class CorePool {
 public:
  std::unique_ptr<RunningCore> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) {
      return std::make_unique<RunningCore>();
    }
    auto core = std::move(idle_.back());
    idle_.pop_back();
    return core;
  }
  void give(std::unique_ptr<RunningCore> core) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(core));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<RunningCore>> idle_;
};

CorePool& core_pool() {
  static auto* pool = new CorePool;  // outlives static destructors
  return *pool;
}

// The order in which cores start: ascending, or with CANN_SIM_SEED a random one for each launch.
std::vector<uint32_t> order_of_cores(uint32_t cores) {
  std::vector<uint32_t> order(cores);
  std::iota(order.begin(), order.end(), 0);
  if (const char* seed = std::getenv("CANN_SIM_SEED"); seed != nullptr && *seed != '\0') {
    static std::atomic<uint64_t> launches{0};
    std::shuffle(order.begin(), order.end(), std::mt19937_64(std::strtoull(seed, nullptr, 10) + launches++));
  }
  return order;
}

}  // namespace

void run_cores(Launch& launch) {
  launch.results.resize(launch.blocks);
  const std::vector<uint32_t> order = order_of_cores(launch.blocks);
  std::atomic<uint32_t> next{0}, failed{launch.blocks};
  const auto work = [&] {
    std::unique_ptr<RunningCore> core = core_pool().take();
    for (uint32_t i; (i = next++) < launch.blocks;) {
      const uint32_t index = order[i];
      if (index > failed) {  // only the failing core with the lowest index is reported
        continue;
      }
      core->run(launch, index);
      if (launch.results[index].error) {
        uint32_t lowest = failed;
        while (index < lowest && !failed.compare_exchange_weak(lowest, index)) {
        }
      }
    }
    core_pool().give(std::move(core));
  };
  const uint32_t threads = std::min<uint32_t>(launch.blocks, static_cast<uint32_t>(launch.config.threads));
  std::vector<std::thread> helpers;
  for (uint32_t i = 1; i < threads; ++i) {
    helpers.emplace_back(work);
  }
  work();
  for (std::thread& helper : helpers) {
    helper.join();
  }
}

}  // namespace cann_sim

// A launch with its own copy of the arguments.
struct cann_sim_task {
  std::string kernel;
  std::vector<uint64_t> args;  // uint64_t for alignment
  cann_sim::Launch launch;
  bool quiet;
  std::string error;
  std::vector<cann_sim_range> ranges;  // the result of the last query
};

namespace {

using cann_sim::GmUse;

// Adds the device memory that any core read (or wrote), as disjoint ranges.
void add_used(const cann_sim::Launch& launch, bool written, std::vector<cann_sim_range>& ranges) {
  std::vector<cann_sim_range> uses;
  for (const cann_sim::CoreResult& core : launch.results) {
    for (const GmUse& use : core.uses) {
      if (use.kind == (written ? GmUse::Kind::write : GmUse::Kind::read)) {
        uses.push_back({use.start, use.end, written});
      }
    }
  }
  std::sort(uses.begin(), uses.end(), [](const auto& a, const auto& b) { return a.start < b.start; });
  const size_t first = ranges.size();
  for (const cann_sim_range& use : uses) {
    if (ranges.size() > first && use.start <= ranges.back().end) {
      ranges.back().end = std::max(ranges.back().end, use.end);
    } else {
      ranges.push_back(use);
    }
  }
}

}  // namespace

uint32_t cann_sim_launch(const char* kernel, uint32_t blocks, void* stream, void (*run)(void* args), const void* args,
                         size_t args_bytes, void* const* pointers, size_t pointer_count) {
  using namespace cann_sim;
  auto task = std::make_unique<cann_sim_task>();
  task->kernel = kernel;
  task->args.resize((args_bytes + 7) / 8);
  if (args_bytes != 0) {
    std::memcpy(task->args.data(), args, args_bytes);
  }
  task->quiet = thread_quiet || std::getenv("CANN_SIM_QUIET") != nullptr;
  Launch& launch = task->launch;
  launch.kernel = task->kernel.c_str();
  launch.blocks = blocks;
  launch.run = run;
  launch.args = task->args.data();
  launch.config = current_config();
  launch.buffers = snapshot_buffers(pointers, pointer_count);
  if (blocks == 0 || blocks > 65535) {
    last_error = format("kernel %s: a launch needs 1 to 65535 blocks, not %u", kernel, blocks);
    last_report = "{}";
    return 1;
  }
  if (const auto submit = executor.load(); submit != nullptr && stream != nullptr) {
    const uint32_t refused = submit(stream, task.get());
    if (refused == 0) {
      static_cast<void>(task.release());  // the executor owns it now
    }
    return refused;
  }
  return cann_sim_task_run(task.get());
}

uint32_t cann_sim_task_run(struct cann_sim_task* task) {
  using namespace cann_sim;
  Launch& launch = task->launch;
  load_written(launch);
  run_cores(launch);
  check_across_cores(launch);
  record_writes(launch);
  last_report = report_json(launch);
  if (launch.error) {
    const std::string at =
        launch.error.file.empty() ? "" : format(", %s:%d", launch.error.file.c_str(), launch.error.line);
    task->error = format("kernel %s, core %d%s: %s: %s", launch.kernel, launch.error_core, at.c_str(),
                         launch.error.kind.c_str(), launch.error.message.c_str());
    if (!task->quiet) {
      std::fprintf(stderr, "cann_sim: %s\n", task->error.c_str());
    }
  }
  last_error = task->error;
  return launch.error ? 1 : 0;
}

const char* cann_sim_task_kernel(const struct cann_sim_task* task) {
  return task->kernel.c_str();
}

const char* cann_sim_task_error(const struct cann_sim_task* task) {
  return task->error.c_str();
}

size_t cann_sim_task_buffers(struct cann_sim_task* task, const struct cann_sim_range** ranges) {
  task->ranges.clear();
  for (const cann_sim::Buffer& buffer : task->launch.buffers) {
    task->ranges.push_back({buffer.start, buffer.end, 0});
  }
  *ranges = task->ranges.data();
  return task->ranges.size();
}

size_t cann_sim_task_uses(struct cann_sim_task* task, const struct cann_sim_range** ranges) {
  task->ranges.clear();
  add_used(task->launch, false, task->ranges);
  add_used(task->launch, true, task->ranges);
  *ranges = task->ranges.data();
  return task->ranges.size();
}

void cann_sim_task_free(struct cann_sim_task* task) {
  delete task;
}

void cann_sim_configure(const cann_sim_config* config) {
  using namespace cann_sim;
  thread_config = Config{};
  thread_quiet = false;
  if (config == nullptr) {
    return;
  }
  thread_config.check = config->check != 0;
  thread_config.trace_core = config->trace_core;
  thread_config.threads = config->threads;
  thread_config.bandwidth_scale = config->bandwidth_scale;
  thread_config.vector_scale = config->vector_scale;
  thread_config.scalar_scale = config->scalar_scale;
  for (uint32_t i = 0; i < config->removed_count; ++i) {
    thread_config.removed.push_back({config->removed[i].kind, config->removed[i].file, config->removed[i].line});
  }
  thread_quiet = config->quiet != 0;
}

cann_sim_submit cann_sim_set_executor(cann_sim_submit submit) {
  return cann_sim::executor.exchange(submit);
}

const char* cann_sim_last_report() {
  return cann_sim::last_report.c_str();
}
const char* cann_sim_last_error() {
  return cann_sim::last_error.c_str();
}
