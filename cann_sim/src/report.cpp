// The report of a launch as JSON: counts and times per core, synchronisation sites, the trace, the error.
#include <algorithm>
#include <map>
#include <tuple>

#include "launch_state.h"

namespace cann_sim {

namespace {

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
      result += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      result += format("\\u%04x", c);
    } else {
      result += c;
    }
  }
  return result + '"';
}

template <typename T>
std::string per_pipe(const T* values, const char* number) {
  std::string text;
  for (int pipe = 0; pipe < kPipes; ++pipe) {
    text += format("%s\"%s\":", pipe == 0 ? "{" : ",", pipe_name(static_cast<Pipe>(pipe)));
    text += number[0] == 'f' ? format("%.3f", static_cast<double>(values[pipe]))
                             : format("%llu", static_cast<unsigned long long>(values[pipe]));
  }
  return text + "}";
}

// The time until the last core finishes; with more blocks than cores on the chip, blocks queue up.
double launch_time(const Launch& launch) {
  std::vector<double> cores(kMaxCores, 0);
  for (uint32_t index = 0; index < launch.blocks; ++index) {
    cores[index % kMaxCores] += launch.results[index].time;
  }
  return *std::max_element(cores.begin(), cores.end());
}

std::string sites_json(const Launch& launch) {
  std::map<std::tuple<std::string, int, std::string>, uint64_t> sites;
  for (const CoreResult& core : launch.results) {
    for (const PlaceEntry& place : core.places) {
      if (place.executions != 0) {
        sites[{place.where.file, place.where.line, place.op}] += place.executions;
      }
    }
  }
  std::string text = "[";
  for (const auto& [site, count] : sites) {
    const auto& [file, line, kind] = site;
    text += format("%s[%s,%s,%d,%llu]", text.size() == 1 ? "" : ",", quoted(kind).c_str(), quoted(file).c_str(), line,
                   static_cast<unsigned long long>(count));
  }
  return text + "]";
}

std::string trace_json(const Launch& launch) {
  std::string text = "[";
  for (const CoreResult& core : launch.results) {
    for (const Interval& interval : core.trace) {
      const PlaceEntry& place = core.places[interval.place];
      text += format("%s[\"%s\",%s,%.3f,%.3f,%s,%d]", text.size() == 1 ? "" : ",", pipe_name(interval.pipe),
                     quoted(place.op).c_str(), interval.start, interval.end, quoted(place.where.file).c_str(),
                     place.where.line);
    }
  }
  return text + "]";
}

}  // namespace

std::string report_json(const Launch& launch) {
  std::string text = format("{\"kernel\":%s,\"blocks\":%u,\"time_ns\":%.3f,\"cores\":[", quoted(launch.kernel).c_str(),
                            launch.blocks, launch_time(launch));
  for (uint32_t index = 0; index < launch.blocks; ++index) {
    const CoreResult& core = launch.results[index];
    text += format("%s{\"index\":%u,\"read_bytes\":%llu,\"written_bytes\":%llu,\"time_ns\":%.3f,\"instructions\":",
                   index == 0 ? "" : ",", index, static_cast<unsigned long long>(core.read_bytes),
                   static_cast<unsigned long long>(core.written_bytes), core.time);
    text += per_pipe(core.instructions, "u") + ",\"busy_ns\":" + per_pipe(core.busy, "f") + "}";
  }
  text += "],\"sync_sites\":" + sites_json(launch) + ",\"trace\":" + trace_json(launch);
  if (launch.error) {
    text += format(",\"error\":{\"kind\":%s,\"core\":%d,\"file\":%s,\"line\":%d,\"message\":%s}",
                   quoted(launch.error.kind).c_str(), launch.error_core, quoted(launch.error.file).c_str(),
                   launch.error.line, quoted(launch.error.message).c_str());
  }
  return text + "}";
}

}  // namespace cann_sim
