// Arithmetic on N numbers: denominators, losses and their sums, and the statistics of rows that were split into parts.
//
// A task is a block of kReduceRows rows, for any number of cores. Each writes its sums to a data block of the
// workspace, and a second launch on one core adds them up in order. So results do not depend on the number of cores,
// and no core waits for another.
#pragma once

#include "ascendc/row_kernel.h"

namespace npu_xent {

// target [rows]; weight [num_classes] or null; statistics [rows], for join_parts also those of the parts [rows, parts].
struct ReduceTensors {
  GM_ADDR target;
  GM_ADDR weight;
  GM_ADDR lse;
  GM_ADDR lse_low;
  GM_ADDR picked;
  GM_ADDR wsum;
  GM_ADDR part_lse;
  GM_ADDR part_lse_low;
  GM_ADDR part_picked;
  GM_ADDR part_wsum;
  GM_ADDR part_weight;
  GM_ADDR totals;
  GM_ADDR loss;
  GM_ADDR z_loss;
  GM_ADDR sums;  // workspace: a data block for each block of rows, then for each block of class weights
  GM_ADDR entropy;
  GM_ADDR top1;
  GM_ADDR part_entropy;
  GM_ADDR part_top1;
};

class ReduceRows {
 public:
  __aicore__ inline ReduceRows(AscendC::TPipe& pipe, const XentPlan& plan, const XentArgs& args,
                               const ReduceTensors& tensors)
      : pipe_(pipe), plan_(plan), args_(args), gm_(tensors) {}

  __aicore__ inline void Run() {
    Allocate();
    const Stage stage = static_cast<Stage>(args_.stage);
    const Share mine = share_of(Tasks(stage), AscendC::GetBlockIdx(), AscendC::GetBlockNum());
    for (int64_t task = mine.begin; task < mine.end; ++task) {
      if (stage == Stage::join_parts) {
        JoinParts(task);
      } else if (stage == Stage::block_totals) {
        BlockTotals(task);
      } else if (stage == Stage::join_totals) {
        JoinTotals();
      } else if (stage == Stage::block_loss) {
        BlockLoss(task);
      } else {
        JoinLoss();
      }
      PipeBarrier<PIPE_ALL>();  // closes all flags, and frees all buffers for the next task
    }
  }

 private:
  static constexpr int64_t kCount = kReduceRows;
  // Vectors with one lane for each row, or for each part of a row. kT is scratch, kLaneSums scratch of Sum.
  enum Vector : int64_t { kKeep, kWeightOf, kBad, kLse, kLseLow, kPicked, kWsum, kLoss, kZ, kT, kLaneSums, kVectors };

  __aicore__ inline int64_t RowBlocks() const { return div_up(args_.rows, kCount); }
  __aicore__ inline int64_t WeightBlocks() const {
    return gm_.weight != nullptr ? div_up(args_.num_classes, kReduceWeights) : 0;
  }
  __aicore__ inline int64_t Tasks(Stage stage) const {
    if (stage == Stage::join_parts) {
      return args_.rows;
    }
    if (stage == Stage::block_totals) {
      return RowBlocks() + WeightBlocks();
    }
    return stage == Stage::block_loss ? RowBlocks() : 1;
  }

  // ---- blocks of rows ----

  // kKeep (1 or 0), kWeightOf (0 where not kept) and kBad (NaN or 0) of rows [first, first + n).
  __aicore__ inline void LookUp(int64_t first, int64_t n) {
    CopyIn(target_, Gm<int64_t>(gm_.target, first), n);
    SetFlag<HardEvent::MTE2_S>(ReduceFlag::kStep);
    WaitFlag<HardEvent::MTE2_S>(ReduceFlag::kStep);
    if (gm_.weight != nullptr) {
      CopyTargetWeights(target_weight_, gm_.weight, args_, target_, n);
    }
    kept_ = 0;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t y = target_.GetValue(r);
      const bool kept = IsKept(args_, y), bad = IsBad(args_, y);
      kept_ += kept ? 1 : 0;
      V(kKeep).SetValue(r, kept || bad ? 1.0f : 0.0f);
      V(kBad).SetValue(r, bad ? NaN() : 0.0f);
      V(kWeightOf).SetValue(r, !kept ? 0.0f : gm_.weight != nullptr ? target_weight_.GetValue(r * kBlock) : 1.0f);
    }
    for (int64_t r = n; r < kCount; ++r) {
      V(kKeep).SetValue(r, 0.0f);
      V(kWeightOf).SetValue(r, 0.0f);
    }
    SetFlag<HardEvent::S_V>(ReduceFlag::kStep);
    WaitFlag<HardEvent::S_V>(ReduceFlag::kStep);
  }

  // out[0] = the sum of kCount numbers, a tree sum.
  __aicore__ inline void Sum(const LocalTensor<float>& out, const LocalTensor<float>& x) {
    AscendC::WholeReduceSum(V(kLaneSums), x, kLanes, kCount / kLanes, 1, 1, 8);
    PipeBarrier<PIPE_V>();
    AscendC::WholeReduceSum(out, V(kLaneSums), kCount / kLanes, 1, 1, 1, 8);
    PipeBarrier<PIPE_V>();
  }

  __aicore__ inline void BlockTotals(int64_t task) {
    float rows = 0.0f;
    if (task < RowBlocks()) {
      const int64_t first = task * kCount;
      LookUp(first, smaller(kCount, args_.rows - first));
      Sum(result_, V(kWeightOf));
      rows = static_cast<float>(kept_);
    } else {
      SumWeights((task - RowBlocks()) * kReduceWeights);
    }
    SetFlag<HardEvent::V_S>(ReduceFlag::kStep);
    WaitFlag<HardEvent::V_S>(ReduceFlag::kStep);
    StoreSums(task, result_.GetValue(0), rows);
  }
  // The sum of class weights [first, first + kReduceWeights).
  __aicore__ inline void SumWeights(int64_t first) {
    const int64_t n = smaller(kReduceWeights, args_.num_classes - first);
    CopyIn(weights_, Gm<float>(gm_.weight, first), n);
    SetFlag<HardEvent::MTE2_V>(ReduceFlag::kStep);
    WaitFlag<HardEvent::MTE2_V>(ReduceFlag::kStep);
    PadTail(weights_, n, round_up(n, kChunkUnit), 0.0f);
    PipeBarrier<PIPE_V>();
    Reduce<Total>(result_, V(kLse), weights_, round_up(n, kChunkUnit));  // scratch: from kLse on
  }
  __aicore__ inline void StoreSums(int64_t task, float first, float second) {
    stored_.SetValue(0, first);
    stored_.SetValue(1, second);
    for (int64_t i = 2; i < kBlock; ++i) {
      stored_.SetValue(i, 0.0f);
    }
    SetFlag<HardEvent::S_MTE3>(ReduceFlag::kStep);
    WaitFlag<HardEvent::S_MTE3>(ReduceFlag::kStep);
    CopyOut(Gm<float>(gm_.sums, task * kBlock), stored_, kBlock);
  }

  // l and z of row_math.h, for a block of rows.
  __aicore__ inline void BlockLoss(int64_t task) {
    const int64_t first = task * kCount, n = smaller(kCount, args_.rows - first);
    CopyIn(V(kLse), Gm<float>(gm_.lse, first), n);
    CopyIn(V(kPicked), Gm<float>(gm_.picked, first), n);
    if (gm_.lse_low != nullptr) {
      CopyIn(V(kLseLow), Gm<float>(gm_.lse_low, first), n);
    }
    if (gm_.wsum != nullptr) {
      CopyIn(V(kWsum), Gm<float>(gm_.wsum, first), n);
    }
    LookUp(first, n);  // its flags, MTE2 to S to V, order these copies too
    AscendC::CompareScalar(mask_, V(kKeep), 0.5f, AscendC::CMPMODE::GT, kCount);
    AscendC::Sub(V(kLoss), V(kLse), V(kPicked), n);
    AscendC::Mul(V(kZ), V(kLse), V(kLse), n);
    AscendC::Sub(V(kT), V(kLse), V(kLse), n);  // NaN where lse is not finite, else 0
    PipeBarrier<PIPE_V>();
    AscendC::Add(V(kT), V(kT), V(kBad), n);
    AscendC::Muls(V(kZ), V(kZ), args_.lse_square_scale, n);
    if (gm_.lse_low != nullptr) {
      AscendC::Add(V(kLoss), V(kLoss), V(kLseLow), n);
    }
    PipeBarrier<PIPE_V>();
    AscendC::Mul(V(kLoss), V(kLoss), V(kWeightOf), n);
    AscendC::Add(V(kZ), V(kZ), V(kT), n);
    PipeBarrier<PIPE_V>();
    // lse - picked may be inf, which must be no factor where w or 1 - e is 0.
    AscendC::CompareScalar(weighted_, V(kWeightOf), 0.0f, AscendC::CMPMODE::NE, kCount);
    AscendC::Muls(V(kLoss), V(kLoss), args_.target_share, n);
    PipeBarrier<PIPE_V>();
    if (args_.target_share != 0.0f) {
      AscendC::Select(V(kLoss), weighted_, V(kLoss), 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, n);
    } else {
      AscendC::Duplicate(V(kLoss), 0.0f, n);
    }
    if (gm_.wsum != nullptr) {
      AscendC::Muls(V(kWsum), V(kWsum), args_.class_share, n);
      PipeBarrier<PIPE_V>();
      AscendC::Sub(V(kLoss), V(kLoss), V(kWsum), n);
    }
    PipeBarrier<PIPE_V>();
    AscendC::Add(V(kLoss), V(kLoss), V(kT), n);
    PipeBarrier<PIPE_V>();
    DropIgnored(V(kLoss), n);
    DropIgnored(V(kZ), n);
    PipeBarrier<PIPE_V>();
    if (ReductionIs(args_, Reduction::none)) {
      StoreRows(first, n);
    } else {
      Sum(result_, V(kLoss));
      Sum(result_[kBlock], V(kZ));
      SetFlag<HardEvent::V_S>(ReduceFlag::kStep);
      WaitFlag<HardEvent::V_S>(ReduceFlag::kStep);
      StoreSums(task, result_.GetValue(0), result_.GetValue(kBlock));
    }
  }
  // x = 0 for rows that are not kept, and for lanes n to kCount.
  __aicore__ inline void DropIgnored(const LocalTensor<float>& x, int64_t n) {
    AscendC::Select(x, mask_, x, 0.0f, AscendC::SELMODE::VSEL_TENSOR_SCALAR_MODE, n);
    PadTail(x, n, round_up(n, kLanes), 0.0f);
    if (round_up(n, kLanes) < kCount) {
      AscendC::Duplicate(x[round_up(n, kLanes)], 0.0f, kCount - round_up(n, kLanes));
    }
  }
  __aicore__ inline void StoreRows(int64_t first, int64_t n) {
    if (gm_.z_loss != nullptr) {
      AscendC::Add(V(kLoss), V(kLoss), V(kZ), n);
    }
    SetFlag<HardEvent::V_MTE3>(ReduceFlag::kStep);
    WaitFlag<HardEvent::V_MTE3>(ReduceFlag::kStep);
    CopyOut(Gm<float>(gm_.loss, first), V(kLoss), n);
    if (gm_.z_loss != nullptr) {
      CopyOut(Gm<float>(gm_.z_loss, first), V(kZ), n);
    }
  }

  // ---- sums of sums ----

  // The two sums of blocks [begin, end). The second of totals is a count, added up as an integer: fp32 is exact only up
  // to 2^24.
  struct Sums {
    ExactSum first, second;
    int64_t count;
  };
  __aicore__ inline Sums AddBlocks(int64_t begin, int64_t end) {
    const bool counts = args_.stage == static_cast<int64_t>(Stage::join_totals);
    Sums sums{{0, 0}, {0, 0}, 0};
    for (int64_t block = begin; block < end; block += kCount) {
      const int64_t n = smaller(kCount, end - block);
      SetFlag<HardEvent::S_MTE2>(ReduceFlag::kStep);
      WaitFlag<HardEvent::S_MTE2>(ReduceFlag::kStep);
      CopyIn(target_weight_, Gm<float>(gm_.sums, block * kBlock), n * kBlock);
      SetFlag<HardEvent::MTE2_S>(ReduceFlag::kStep);
      WaitFlag<HardEvent::MTE2_S>(ReduceFlag::kStep);
      for (int64_t i = 0; i < n; ++i) {
        const float second = target_weight_.GetValue(i * kBlock + 1);
        AddTo(sums.first, target_weight_.GetValue(i * kBlock));
        if (counts) {
          sums.count += static_cast<int32_t>(second);
        } else {
          AddTo(sums.second, second);
        }
      }
    }
    return sums;
  }

  __aicore__ inline void JoinTotals() {
    const Sums rows = AddBlocks(0, RowBlocks());
    float weight = static_cast<float>(rows.count), classes = static_cast<float>(args_.num_classes);
    if (gm_.weight != nullptr) {
      weight = Rounded(rows.first);
      classes = Rounded(AddBlocks(RowBlocks(), RowBlocks() + WeightBlocks()).first);
    }
    stored_.SetValue(kKeptWeight, weight);
    stored_.SetValue(kKeptRows, static_cast<float>(rows.count));
    stored_.SetValue(kClassWeight, classes);
    SetFlag<HardEvent::S_MTE3>(ReduceFlag::kStep);
    WaitFlag<HardEvent::S_MTE3>(ReduceFlag::kStep);
    CopyOut(Gm<float>(gm_.totals, 0), stored_, kTotals);
  }

  // l is divided by the kept weight and z by the kept rows before they are added.
  __aicore__ inline void JoinLoss() {
    const Sums sums = AddBlocks(0, RowBlocks());
    float loss_sum = Rounded(sums.first), z_sum = Rounded(sums.second);
    if (ReductionIs(args_, Reduction::mean)) {
      const GlobalTensor<float> totals = Gm<float>(gm_.totals, 0);
      loss_sum = Quotient(loss_sum, totals.GetValue(kKeptWeight));
      z_sum = Quotient(z_sum, totals.GetValue(kKeptRows));
    }
    if (gm_.z_loss != nullptr) {
      loss_sum = SumOfTwo(loss_sum, z_sum);
    }
    stored_.SetValue(0, loss_sum);
    result_.SetValue(0, z_sum);
    SetFlag<HardEvent::S_MTE3>(ReduceFlag::kStep);
    WaitFlag<HardEvent::S_MTE3>(ReduceFlag::kStep);
    CopyOut(Gm<float>(gm_.loss, 0), stored_, 1);
    if (gm_.z_loss != nullptr) {
      CopyOut(Gm<float>(gm_.z_loss, 0), result_, 1);
    }
  }

  // ---- parts of one row ----

  // lse = log sum exp(lse_i), wsum = sum (wsum_i + W_i (lse_i - lse)), entropy = sum p_i (H_i + lse - lse_i) with
  // p_i = exp(lse_i - lse): each part is a class shard (options.h). top1: no part beats the target.
  __aicore__ inline void JoinParts(int64_t row) {
    const int64_t n = plan_.parts, first = row * n;
    CopyIn(V(kLse), Gm<float>(gm_.part_lse, first), n);
    CopyIn(V(kLseLow), Gm<float>(gm_.part_lse_low, first), n);
    CopyIn(V(kPicked), Gm<float>(gm_.part_picked, first), n);
    if (gm_.wsum != nullptr) {
      CopyIn(V(kWsum), Gm<float>(gm_.part_wsum, first), n);
      CopyIn(V(kWeightOf), Gm<float>(gm_.part_weight, first), n);
    }
    if (gm_.entropy != nullptr) {
      CopyIn(V(kZ), Gm<float>(gm_.part_entropy, first), n);
    }
    if (gm_.top1 != nullptr) {
      CopyIn(V(kKeep), Gm<float>(gm_.part_top1, first), n);
    }
    SetFlag<HardEvent::MTE2_V>(ReduceFlag::kStep);
    WaitFlag<HardEvent::MTE2_V>(ReduceFlag::kStep);
    const LocalTensor<float> max = result_, sum = result_[kBlock], picked = result_[2 * kBlock];
    BoundVector(V(kT), V(kLse), n);
    AscendC::WholeReduceMax(max, V(kT), n, kBlock, 1, 1, 0, AscendC::ReduceOrder::ORDER_ONLY_VALUE);
    AscendC::WholeReduceSum(picked, V(kPicked), n, kBlock, 1, 1, 0);
    PipeBarrier<PIPE_V>();
    AscendC::Sub(V(kT), V(kLse), max, n, 1, AscendC::BinaryRepeatParams(1, 1, 0, 8, 8, 0));
    PipeBarrier<PIPE_V>();
    AscendC::Add(V(kT), V(kT), V(kLseLow), n);
    PipeBarrier<PIPE_V>();
    AscendC::Exp(V(kT), V(kT), n);
    PipeBarrier<PIPE_V>();
    AscendC::WholeReduceSum(sum, V(kT), n, kBlock, 1, 1, 0);
    PipeBarrier<PIPE_V>();
    AscendC::Adds(result_[3 * kBlock], sum, 0.0f, kBlock);
    PipeBarrier<PIPE_V>();
    AscendC::Ln(sum, sum, kBlock);
    SetFlag<HardEvent::V_S>(ReduceFlag::kStep);
    WaitFlag<HardEvent::V_S>(ReduceFlag::kStep);
    const TwoFloats lse = TwoSum(max.GetValue(0), sum.GetValue(0));
    float wsum = 0.0f;
    for (int64_t i = 0; gm_.wsum != nullptr && i < n; ++i) {
      const float part_lse = V(kLse).GetValue(i);
      wsum = SumOfTwo(wsum, V(kWsum).GetValue(i));
      if (IsFinite(part_lse) && IsFinite(lse.high)) {
        const float below = (part_lse - lse.high) + (V(kLseLow).GetValue(i) - lse.low);
        wsum = SumOfTwo(wsum, V(kWeightOf).GetValue(i) * below);
      }
    }
    const float entropy = gm_.entropy != nullptr && IsFinite(lse.high) ? JoinEntropies(lse, n) : NaN();
    float top1 = IsFinite(lse.high) ? 1.0f : 0.0f;
    for (int64_t i = 0; gm_.top1 != nullptr && i < n; ++i) {
      top1 = V(kKeep).GetValue(i) == 0.0f ? 0.0f : top1;
    }
    const bool unread = IsUnread(row);
    StoreValue(gm_.lse, row, 0, unread ? 0.0f : lse.high);
    StoreValue(gm_.lse_low, row, 1, unread ? 0.0f : lse.low);
    StoreValue(gm_.picked, row, 2, picked.GetValue(0));
    if (gm_.wsum != nullptr) {
      StoreValue(gm_.wsum, row, 3, unread ? 0.0f : wsum);
    }
    if (gm_.entropy != nullptr) {
      StoreValue(gm_.entropy, row, 4, unread ? 0.0f : entropy);
    }
    if (gm_.top1 != nullptr) {
      StoreValue(gm_.top1, row, 5, unread ? 0.0f : top1);
    }
  }
  // From the parts' exp(lse_i - max) in kT, the sum of these in result_, and H_i in kZ.
  __aicore__ inline float JoinEntropies(const TwoFloats& lse, int64_t n) const {
    float entropy = 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      const float share = V(kT).GetValue(i);
      if (share != 0.0f) {  // otherwise lse_i may be -inf, and H_i NaN
        const float above = (lse.high - V(kLse).GetValue(i)) + (lse.low - V(kLseLow).GetValue(i));
        entropy += share * (V(kZ).GetValue(i) + above);
      }
    }
    return entropy / result_.GetValue(3 * kBlock);
  }
  __aicore__ inline void StoreValue(GM_ADDR to, int64_t row, int64_t slot, float value) {
    const LocalTensor<float> block = V(kLoss)[slot * kBlock];
    block.SetValue(0, value);
    SetFlag<HardEvent::S_MTE3>(ReduceFlag::OfValue(slot));
    WaitFlag<HardEvent::S_MTE3>(ReduceFlag::OfValue(slot));
    CopyOut(Gm<float>(to, row), block, 1);
  }
  // The parts of an unread row hold zeros, which would join to log(parts).
  __aicore__ inline bool IsUnread(int64_t row) const {
    return args_.read_ignored == 0 && IsIgnored(args_, Gm<int64_t>(gm_.target, row).GetValue(0));
  }

  // ---- memory ----

  __aicore__ inline LocalTensor<float> V(Vector v) const { return vectors_[v * kCount]; }
  __aicore__ inline void Allocate() {
    Pieces ub{};
    const int64_t vectors = ub.take(kVectors * kCount * 4), target = ub.take(kCount * 8);
    const int64_t mask = ub.take(kCount / 8), weighted = ub.take(kCount / 8);
    const int64_t target_weight = ub.take(kCount * kDataBlock), weights = ub.take(kReduceWeights * 4);
    const int64_t result = ub.take(4 * kDataBlock), stored = ub.take(kDataBlock);
    pipe_.InitBuffer(ub_, ub.end);
    vectors_ = ub_.GetWithOffset<float>(kVectors * kCount, vectors);
    mask_ = ub_.GetWithOffset<uint8_t>(kCount / 8, mask);
    weighted_ = ub_.GetWithOffset<uint8_t>(kCount / 8, weighted);
    target_ = ub_.GetWithOffset<int64_t>(kCount, target);
    target_weight_ = ub_.GetWithOffset<float>(kCount * kBlock, target_weight);
    weights_ = ub_.GetWithOffset<float>(kReduceWeights, weights);
    result_ = ub_.GetWithOffset<float>(4 * kBlock, result);
    stored_ = ub_.GetWithOffset<float>(kBlock, stored);
  }

  AscendC::TPipe& pipe_;
  const XentPlan plan_;
  const XentArgs args_;
  const ReduceTensors gm_;
  int64_t kept_ = 0;

  UnifiedBuffer ub_;
  LocalTensor<float> vectors_, target_weight_, weights_, result_, stored_;
  LocalTensor<uint8_t> mask_, weighted_;  // a bit a row: is it kept; has its target a weight other than 0
  LocalTensor<int64_t> target_;
};

}  // namespace npu_xent
