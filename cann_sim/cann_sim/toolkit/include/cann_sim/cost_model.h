// What an instruction costs in simulated time: every constant of the cost model, each with where it comes from.
// "Published" figures stand in public documents ([n] below), "derived" ones are worked out from a published
// measurement, "assumed" ones have no source and are meant to be on the slow side. All are for one vector core of
// Atlas A2 (Ascend 910B1 to B4).
//
//  [1] asc-devkit, examples/01_simd_cpp_api/05_best_practices/00_vector_compute/add_high_performance/README.md:
//      an Add of 8192 x 8192 half on Atlas A2, with profiler figures for seven variants
//  [2] asc-devkit, .../05_best_practices/04_memory_access/bank_conflict_ub/README.md: cycles of 1000 Adds
//  [3] asc-devkit, .../05_best_practices/04_memory_access/data_copy/README.md: DataCopyPad with small and large blocks
//  [4] asc-devkit, docs/zh/guide, SIMD operator performance: "L2 Cache partitioning"
//  [5] pto-isa (github.com/hw-native-sys/pto-isa), include/pto/costmodel/a2a3/cce_costmodel/*.hpp and
//      formula_costmodel/formula_params.csv: vector instructions measured on a 910B3; arch_config.hpp: clock and rates
//  [6] Ascend910B1.ini of the CANN platform configuration, as quoted in public repositories
#pragma once

#include <cstdint>
#include <initializer_list>

#include "cann_sim/core.h"

namespace cann_sim {

struct CostModel {
  // ---- clock
  double clock_ghz = 1.85;  // published [5][6]: 910B1; 910B2 and 910B3 run at 1.8

  // ---- scalar unit
  // Derived [1]: variants 3 and 4 spend 33 ns = 61 cycles of scalar time a loop pass with 12 instructions.
  double issue_cycles = 5;
  // Derived [1]: variant 0 spends 34 cycles an element on two GetValue, a SetValue, conversions, add and loop.
  double scalar_ub_cycles = 10;
  double scalar_gm_cycles = 400;  // assumed: each GM access by the scalar unit misses its cache, and a miss takes what
                                  // a DMA read takes to its first byte
  int queue_depth = 16;           // assumed: unpublished

  // ---- synchronisation
  double flag_cycles = 1;     // published [5]: set_flag and wait_flag
  double barrier_cycles = 1;  // published [5]: pipe_barrier, besides the draining

  // ---- vector unit (cycles of a repeat: repeat_cycles below)
  // Derived [2]: 1000 independent Adds of 64 repeats take 88.4 cycles each, 24 more than their repeats; [1] has
  // 22.5 (variant 4) and 22.6 (variant 6), [5] 24 for Add.
  double vector_start_cycles = 24;
  double vector_latency_cycles = 8;  // derived [5]: what Exp, Ln, Div, Cast take longer than Add to their result

  // ---- transfers
  // Derived [1]: the profile of variant 1 (one core, 8 KiB blocks, nothing overlapped) has 379 ns for two reads and
  // 159.5 ns for a write; less the time of the bytes and mte_start_cycles this is what is left.
  double mte2_latency_ns = 208;
  double mte3_latency_ns = 81;
  double mte_start_cycles = 18;  // derived [3]: 128-byte DataCopyPads one after the other take 20.6 cycles each
  double mte_block_cycles = 6;   // derived [3]: a 128-byte block of a 64-block DataCopyPad takes 8.3 cycles in all
  double core_read_gbps = 108;   // published [5]: GM to UB, 100.9 GiB/s a core
  double core_write_gbps = 118;  // published [6]: UB to L2, 64 bytes a cycle ([5] says 202 GB/s; this is the slower)
  // Published [4]: "about 1.6 TB/s", shared by reads and writes. [1] reaches 1.56 (variant 4), [3] 1.49. L2 hits,
  // which are faster (7 TB/s [4]), are not modelled.
  double total_gbps = 1600;
  double ub_copy_bytes_per_cycle = 256;  // assumed: one repeat a cycle, as Copy

  // Times are those on the cores, as a profiler's aiv_time. The dispatch of a launch is not in them: 6500 ns, derived
  // [1] as task duration less aiv_time with 48 cores, variants 3 and 4.

  // Cycles of one repeat (256 bytes, or as many elements as the wider type of a Cast has in 256 bytes). `op` tells
  // the forms of a class apart; without it the slowest is taken.
  constexpr double repeat_cycles(VectorClass kind, uint32_t element_bytes, const char* op = "") const {
    const bool is_16_bit = element_bytes <= 2;
    switch (kind) {
      case VectorClass::move:
        return 1;  // published [5]: vector_dup, vcopy
      case VectorClass::logic:
        return 2;  // published [5]: vand, vor 2.03
      case VectorClass::add:
      case VectorClass::mul:
        // Published [5]: two sources 2.0 to 2.1 cycles, one source 1.0. Two sources in different bank groups of UB
        // take 1 [1][2]; the simulator does not look at bank groups and takes every pair as being in conflict.
        return has_one_source(op) ? 1 : 2;
      case VectorClass::fma:
        return 2;  // assumed: as Mul
      case VectorClass::div:
        if (starts_with(op, "Reciprocal")) {
          return is_16_bit ? 4 : 2;  // assumed: as Exp
        }
        return is_16_bit ? 8 : 4;  // published [5]: vdiv 4.03 in fp32, 16 elements a cycle in fp16
      case VectorClass::sqrt:
        if (starts_with(op, "Rsqrt")) {
          return is_16_bit ? 2 : 1;  // published [5] for fp32: 1.07
        }
        return is_16_bit ? 4 : 2;  // published [5]
      case VectorClass::exp:
        return is_16_bit ? 4 : 2;  // published [5]: 0.0314 cycles an element, any type
      case VectorClass::ln:
        return is_16_bit ? 4 : 2;  // published [5] for fp32; fp16 assumed: as Exp
      case VectorClass::cast:
        return 2;  // published [5]: vconv
      case VectorClass::compare:
        return 2;  // published [5]: vcmpv
      case VectorClass::select:
        return 2;  // published [5]: vsel
      case VectorClass::reduce:
        if (starts_with(op, "BlockReduce")) {
          return 1;  // published [5]: vcgadd, vcgmax
        }
        if (starts_with(op, "PairReduce")) {
          return 2;  // assumed
        }
        return 7;  // published [5]: vcadd, and TROWMAX of one repeat a row
      case VectorClass::gather:
        return 26;  // published [5]: vgather, one repeat a call
    }
    return 2;
  }

 private:
  static constexpr bool starts_with(const char* text, const char* prefix) {
    for (; *prefix != '\0'; ++text, ++prefix) {
      if (*text != *prefix) {
        return false;
      }
    }
    return true;
  }
  static constexpr bool has_one_source(const char* op) {
    for (const char* name : {"Adds", "Muls", "Maxs", "Mins", "Abs", "Relu", "LeakyRelu"}) {
      if (starts_with(op, name)) {
        return true;
      }
    }
    return false;
  }
};

}  // namespace cann_sim
