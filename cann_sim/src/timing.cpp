// Simulated time. The scalar unit issues instructions in order into the pipes' queues; each pipe executes its queue
// independently; flags and barriers make one pipe wait for another; transfers share the core's part of the memory
// bandwidth.
#include <algorithm>

#include "core_state.h"

namespace cann_sim {

void Timing::reset(const Launch* launch, CoreResult* result, bool trace) {
  cost_ = launch->cost;
  result_ = result;
  trace_ = trace;
  const Config& config = launch->config;
  cycle_ns_ = 1 / cost_.clock_ghz;
  vector_ns_ = cycle_ns_ / config.vector_scale;
  scalar_ns_ = cycle_ns_ / config.scalar_scale;
  issue_ns_ = cost_.issue_cycles * scalar_ns_;
  read_ns_ = 1 / (cost_.core_read_gbps * config.bandwidth_scale);
  write_ns_ = 1 / (cost_.core_write_gbps * config.bandwidth_scale);
  share_ns_ = std::min(launch->blocks, kMaxCores) / (cost_.total_gbps * config.bandwidth_scale);
  now_ = 0;
  memory_.clear();
  for (int pipe = 0; pipe < kPipes; ++pipe) {
    free_[pipe] = done_[pipe] = 0;
    given_[pipe] = 0;
    queue_[pipe].assign(cost_.queue_depth, 0);
  }
}

double Timing::issue(Pipe pipe) {
  const int p = static_cast<int>(pipe);
  double& slot = queue_[p][given_[p]++ % queue_[p].size()];
  now_ = std::max(now_, slot) + issue_ns_;  // full: the instruction `depth` before this one must have started
  result_->busy[static_cast<int>(Pipe::S)] += issue_ns_;
  slot = std::max(now_, free_[p]);
  return slot;
}

void Timing::run(Pipe pipe, double start, double end, double latency, uint16_t place) {
  const int p = static_cast<int>(pipe);
  free_[p] = end;
  done_[p] = std::max(done_[p], end + latency);
  result_->busy[p] += end - start;
  ++result_->instructions[p];
  if (trace_) {
    result_->trace.push_back({pipe, place, start, end});
  }
}

void Timing::vector(VectorClass kind, const char* op, uint32_t repeats, uint32_t element_bytes, uint16_t place) {
  const double start = issue(Pipe::V);
  const double cycles = cost_.vector_start_cycles + repeats * cost_.repeat_cycles(kind, element_bytes, op);
  run(Pipe::V, start, start + cycles * vector_ns_, cost_.vector_latency_cycles * vector_ns_, place);
}

void Timing::local_copy(uint64_t bytes, uint32_t blocks, uint16_t place) {
  const double start = issue(Pipe::V);
  const double cycles = cost_.vector_start_cycles + std::max<double>(bytes / cost_.ub_copy_bytes_per_cycle, blocks);
  run(Pipe::V, start, start + cycles * vector_ns_, cost_.vector_latency_cycles * vector_ns_, place);
}

// Reserves `need` ns of the core's memory bandwidth from `start` on, in the gaps between earlier reservations (pipes
// run independently: a write that is issued early may start late). Returns the end of the last gap used.
double Timing::take_memory(double start, double need) {
  const auto past = std::find_if(memory_.begin(), memory_.end(), [this](const Busy& busy) { return busy.end > now_; });
  memory_.erase(memory_.begin(), past);  // new transfers cannot start before now
  double at = start;
  size_t i = 0;
  while (i < memory_.size() && memory_[i].end <= at) {
    ++i;
  }
  const size_t first = i;
  Busy taken{start, start};
  if (first < memory_.size() && memory_[first].start <= start) {
    taken.start = memory_[first].start;
  }
  for (; i < memory_.size(); ++i) {
    const double idle = std::max(0.0, memory_[i].start - at);
    if (idle >= need) {
      break;
    }
    need -= idle;
    at = memory_[i].end;
  }
  at += need;
  taken.end = at;
  memory_.erase(memory_.begin() + first, memory_.begin() + i);  // merged into one busy interval
  memory_.insert(memory_.begin() + first, taken);
  return at;
}

void Timing::transfer(Pipe pipe, uint64_t bytes, uint32_t blocks, uint16_t place) {
  const bool reads = pipe == Pipe::MTE2;
  const double start = issue(pipe);
  const double own = std::max(bytes * (reads ? read_ns_ : write_ns_), blocks * cost_.mte_block_cycles * cycle_ns_);
  const double memory = take_memory(start, bytes * share_ns_);  // MTE2 and MTE3 share the core's bandwidth
  const double end = std::max(start + cost_.mte_start_cycles * cycle_ns_ + own, memory);
  run(pipe, start, end, reads ? cost_.mte2_latency_ns : cost_.mte3_latency_ns, place);
}

void Timing::scalar(double cycles, uint16_t place) {
  const double start = now_;
  now_ += cycles * scalar_ns_;
  const int s = static_cast<int>(Pipe::S);
  result_->busy[s] += now_ - start;
  ++result_->instructions[s];
  if (trace_) {
    result_->trace.push_back({Pipe::S, place, start, now_});
  }
}

double Timing::set_flag(Pipe from) {
  if (from == Pipe::S) {
    now_ += issue_ns_;
    return now_;
  }
  const int p = static_cast<int>(from);
  free_[p] = issue(from) + cost_.flag_cycles * cycle_ns_;  // does not delay later instructions of its pipe
  return std::max(free_[p], done_[p]);
}

void Timing::wait_flag(Pipe to, double time) {
  if (to == Pipe::S) {
    now_ = std::max(now_ + issue_ns_, time);
    return;
  }
  const int p = static_cast<int>(to);
  free_[p] = std::max(issue(to), time) + cost_.flag_cycles * cycle_ns_;
}

void Timing::barrier(Pipe pipe) {
  const int p = static_cast<int>(pipe);
  free_[p] = std::max(issue(pipe), done_[p]) + cost_.barrier_cycles * cycle_ns_;
}

void Timing::barrier_all() {
  now_ = finish() + issue_ns_;
  for (int pipe = 0; pipe < kPipes; ++pipe) {
    free_[pipe] = now_;
  }
}

double Timing::finish() {
  double end = now_;
  for (int pipe = 0; pipe < kPipes; ++pipe) {
    end = std::max({end, free_[pipe], done_[pipe]});
  }
  return end;
}

}  // namespace cann_sim
