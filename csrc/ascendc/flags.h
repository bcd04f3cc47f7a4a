// Which flags the kernels use: event ids, by pair of pipes.
//
// A flag is a pair of pipes and an id: SetFlag<HardEvent::X_Y>(id) on pipe X, WaitFlag<HardEvent::X_Y>(id) on pipe Y.
// Each pair has ids of its own, so the same number for two pairs is two flags. A flag is open from SetFlag to WaitFlag.
// Setting an open flag is undefined: an order between the pipes has to put WaitFlag first. The column "open" below says
// how many flags of a line are open at a time at most.
//
// There are ids 0 to 7. The vendor advises against 6 (set aside for the system, unused so far) and 7 (automatic
// synchronisation), and no kernel here uses them. A TPipe gives its queues ids of MTE2_V, V_MTE2, V_MTE3 and MTE3_V. A
// kernel with queues therefore asks the TPipe for ids of these pairs, and chooses ids only for pairs with S.
#pragma once

#include <cstdint>

#include "kernel_operator.h"

namespace npu_xent {

// Long rows (long_*.h). There are no queues, so all ids are chosen here. i is the number of a load in its block of
// pieces. At the end of a block all flags are closed (PIPE_ALL).
//
//   pair       id            set in              waited for in        what it tells                               open
//   MTE2_V     i % 6         CopyLogitsIn        WaitLogits           the slot's logits have arrived              6
//   V_MTE3     i % 6         OutputStep          OutputStep           the slot's output is made                   6
//   MTE3_MTE2  i % 6         OutputStep          Load of i + slots    the slot is free: its output has left       6
//   V_MTE2     i % 6         SumHeld             Load of i + slots    the slot is free: its sums are made         5
//   MTE3_V     i % 6         OutputStep          OutputStep of i + 6  V_MTE3 of i is closed (if no load waits)    6
//   V_MTE2     last i % 6    CopyWeightIn        CopyWeightIn         the class weights may be overwritten        1
//   MTE2_V     last i % 6    CopyWeightIn        CopyWeightIn         the class weights have arrived              1
//   MTE2_S     kOperands     LongFacts::Stage    LongFacts::Stage     targets and operands have arrived           1
//   MTE2_S     kTargets      LongFacts::Stage    LongFacts::Stage     targets' logits and weights have arrived    1
//   S_V        kCap          CapPicked           CapPicked            targets' logits are written                 1
//   V_S        kCap          CapPicked           CapPicked            targets' logits are capped                  1
//   V_S        kMax + i % 2  FindMax             SumChunk             a chunk's maximum is made                   2
//   S_V        kMax + i % 2  Begin, SumChunk     FindMax, End         that maximum has been read                  2
//   S_V        kFold         Fold                Fold                 maxima are written, row_sum_ has been read  1
//   V_S        kFold         FoldRow, CarryFold  TakeRow, CarryFold   row_sum_ and the chunks' sums are made      1
//   S_V        kCarry        CarryFold           CarryFold            the joined chunk is written                 1
//   S_MTE3     kResults      LongResults::Store  LongResults::Store   statistics are written                      1
//   V_S        kZeros        StoreZeros          StoreZeros           zeros are made                              1
//   S_MTE3     kZeros        StoreZeros          StoreZeros           the same, passed on by S                    1
//
// Class weights use the id of the load that V waited for last, "last i". Both of its flags are closed then: V has taken
// MTE2_V of i; MTE2 took V_MTE2 of i - 6 before it loaded i; load i + 6 has not been issued, since loads are at most 4
// ahead. Zeros go by way of S, because every id of V_MTE3 may be open at the end of a block.
struct LongFlag {
  static constexpr int64_t kChunkIds = 6;
  enum Id : int32_t {
    kOperands = 0,
    kTargets = 1,
    kMax = 0,  // and 1
    kFold = 2,
    kCarry = 3,
    kCap = 4,
    kResults = 0,
    kZeros = 3,
  };
  static __aicore__ inline int32_t OfChunk(int64_t load) { return static_cast<int32_t>(load % kChunkIds); }
  static __aicore__ inline int32_t OfMax(int64_t load) { return kMax + static_cast<int32_t>(load % 2); }
};

// Short rows (short_*.h). Tiles and operands go through queues. From the TPipe come one id of V_MTE3 and one of MTE3_V
// for the copies out of ShortStatistics, and ids of V_MTE2 and MTE2_V for the class weights (CopyWeightIn).
//
//   pair       id            set in              waited for in        what it tells                               open
//   V_S        kPrepared     ShortRows::Prepare  ShortRows::Prepare   lanes hold constants: S may write its own   1
//   S_MTE2     kTileTargets  LookUp              LookUp               the targets of the tile before are read     1
//   MTE2_S     kTileTargets  LookUp              LookUp               the targets of a tile have arrived          1
//   S_V        kSet + set    LookUp              ComputeTile          the lanes of this set are written           3
struct ShortFlag {
  enum Id : int32_t {
    kPrepared = 0,
    kTileTargets = 0,
    kSet = 0,  // to 2: one for each of kSets
  };
  static __aicore__ inline int32_t OfSet(int64_t set) { return kSet + static_cast<int32_t>(set); }
};

// reduce_rows.h. There are no queues. Each WaitFlag follows its SetFlag at once, and at the end of a task all flags are
// closed (PIPE_ALL), so one id serves every step. Only JoinParts sets S_MTE3 several times in a row, for up to six
// values. Each value has an id of its own, because S does not know when MTE3 has taken the flag of the value before.
struct ReduceFlag {
  enum Id : int32_t {
    kStep = 0,
    kValue = 0,  // to 5: one for each value of JoinParts
  };
  static __aicore__ inline int32_t OfValue(int64_t slot) { return kValue + static_cast<int32_t>(slot); }
};

// MTE2_S in CopyTargetWeights (row_kernel.h), for short rows and reduce_rows: the targets' class weights have arrived.
// At most one is open.
constexpr int32_t kTargetWeightsFlag = 1;

}  // namespace npu_xent
