// Facts about long rows, besides their logits: the target's logit and class weight, and statistics and upstream
// gradients that are operands. From these the scalar unit computes the numbers for a row's output.
#pragma once

#include "ascendc/long_pieces.h"
#include "ascendc/softcap.h"

namespace npu_xent {

// The numbers for the output of a row.
struct RowState {
  bool zero, undefined;  // an ignored row; a row without a distribution
  float lse, lse_low;
  float row_scale;
  // The gradient is ((scale + tilt (x - lse)) exp(x - lse) - offset w) slope; x and slope after all scales and softcap.
  float scale, tilt, offset;
  int64_t target;     // column, or -1
  bool target_known;  // the gradient at the target is `target_value`; else `target_step` has to be added there
  float target_value, target_step;
};

template <typename T, Output kOutput, bool kStats>
class LongFacts {
 public:
  __aicore__ inline LongFacts(const XentArgs& args, const RowTensors& tensors) : args_(args), gm_(tensors) {}

  __aicore__ inline void Allocate(UnifiedBuffer& ub, const LongBuffers& b) {
    picked_ = ub.GetWithOffset<T>(kFactRows * kBlockOf<T>, b.picked);
    target_weight_ = ub.GetWithOffset<float>(kFactRows * kBlock, b.target_weight);
    lse_ = ub.GetWithOffset<float>(kFactRows, b.lse);
    lse_low_ = ub.GetWithOffset<float>(kFactRows, b.lse_low);
    grad_loss_ = ub.GetWithOffset<float>(kFactRows, b.grad_loss);
    grad_z_loss_ = ub.GetWithOffset<float>(kFactRows, b.grad_z_loss);
    if (args_.softcap != 0.0f) {
      capped_ = ub.GetWithOffset<float>(kFactRows, b.capped);
    }
    if (args_.by_row != 0) {
      row_scale_ = ub.GetWithOffset<float>(kFactRows, b.row_scale);
      entropy_ = ub.GetWithOffset<float>(kFactRows, b.entropy);
      grad_entropy_ = ub.GetWithOffset<float>(kFactRows, b.grad_entropy);
    }
  }
  // Reads what all rows share.
  __aicore__ inline void Prepare() {
    if constexpr (kOutput == Output::grad) {
      upstream_ = ReadUpstream(args_, gm_);
    }
  }

  // Brings the facts of a block to where the scalar unit reads them.
  __aicore__ inline void Stage(LongPieces<kStats>& pieces, const Softcap& softcap) {
    pieces.CopyTargetsIn(gm_.target);
    if (!kStats) {
      CopyOperandIn(lse_, gm_.lse, pieces);
      CopyOperandIn(lse_low_, gm_.lse_low, pieces);
      if (ReductionIs(args_, Reduction::none)) {
        CopyOperandIn(grad_loss_, gm_.grad_loss, pieces);
        CopyOperandIn(grad_z_loss_, gm_.grad_z_loss, pieces);
      }
      CopyOperandIn(entropy_, gm_.entropy, pieces);
      CopyOperandIn(grad_entropy_, gm_.grad_entropy, pieces);
    }
    CopyOperandIn(row_scale_, gm_.row_scale, pieces);
    SetFlag<HardEvent::MTE2_S>(LongFlag::kOperands);
    WaitFlag<HardEvent::MTE2_S>(LongFlag::kOperands);
    // A copy for each target's logit and weight: copies can overlap; scalar reads of GM would wait for each other.
    for (int64_t i = 0; i < pieces.Count(); ++i) {
      const Piece piece = pieces.At(i);
      const int64_t column = gm_.top1 != nullptr ? pieces.ColumnOfRow(piece.row) : pieces.TargetColumn(piece);
      if (column >= 0) {
        CopyIn(picked_[i * kBlockOf<T>], Gm<T>(gm_.logits, piece.row * args_.logits_stride + column), 1);
      }
      if (kOutput == Output::grad && gm_.weight != nullptr && IsKept(args_, pieces.TargetOf(piece.row))) {
        CopyIn(target_weight_[i * kBlock], Gm<float>(gm_.weight, pieces.TargetOf(piece.row)), 1);
      }
    }
    SetFlag<HardEvent::MTE2_S>(LongFlag::kTargets);
    WaitFlag<HardEvent::MTE2_S>(LongFlag::kTargets);
    if (softcap.IsOn()) {
      CapPicked(pieces, softcap);
    }
  }

  // What the logits of a row are multiplied by after the softcap.
  __aicore__ inline float RowScale(const LongPieces<kStats>& pieces, int64_t row) const {
    return gm_.row_scale != nullptr ? row_scale_.GetValue(row - pieces.FirstRow()) : 1.0f;
  }
  // The target's logit after all scales and softcap, in fp32, for piece `index`, which has its row's target.
  __aicore__ inline float MappedPicked(const LongPieces<kStats>& pieces, int64_t index) const {
    const float row_scale = RowScale(pieces, pieces.At(index).row);
    if (!IsFinite(row_scale)) {
      return NaN();
    }
    // Rounded as LongChunks::Mapped rounds it.
    return args_.softcap != 0.0f ? Product(capped_.GetValue(index), row_scale)
                                 : ScaledPicked(index, Product(row_scale, args_.logit_scale));
  }
  // The target's logit with the sign of the logit scale, for top1; finite.
  __aicore__ inline float OrderedPicked(int64_t index) const {
    const float x = Bounded(ScalarOf(picked_, index * kBlockOf<T>));
    return args_.logit_scale > 0.0f ? x : args_.logit_scale < 0.0f ? -x : 0.0f;
  }
  // `picked` of row_math.h; NaN for a bad target.
  __aicore__ inline float Picked(const LongPieces<kStats>& pieces, int64_t index) const {
    const Piece piece = pieces.At(index);
    return pieces.IsRowBad(piece.row) ? NaN() : pieces.TargetColumn(piece) >= 0 ? MappedPicked(pieces, index) : 0.0f;
  }

  // From statistics that are operands, or that were computed here.
  __aicore__ inline RowState MakeState(const LongPieces<kStats>& pieces, const Softcap& softcap, int64_t index) const {
    const int64_t fact = pieces.At(index).row - pieces.FirstRow();
    const float lse_low = gm_.lse_low != nullptr ? lse_low_.GetValue(fact) : 0.0f;
    return MakeState(pieces, softcap, index, lse_.GetValue(fact), lse_low);
  }
  __aicore__ inline RowState MakeState(const LongPieces<kStats>& pieces, const Softcap& softcap, int64_t index,
                                       float lse, float lse_low) const {
    const Piece piece = pieces.At(index);
    RowState s;
    s.lse = lse;
    s.lse_low = lse_low;
    s.row_scale = RowScale(pieces, piece.row);
    s.zero = kOutput == Output::grad && pieces.IsRowIgnored(piece.row);
    s.undefined = !IsFinite(lse);
    s.target = -1;
    if (kOutput != Output::grad || s.zero) {
      return s;
    }
    const int64_t fact = piece.row - pieces.FirstRow();
    const Upstream up = UpstreamOf(fact);
    const float grad_entropy = gm_.grad_entropy != nullptr ? grad_entropy_.GetValue(fact) : 0.0f;
    const bool is_bad = pieces.IsRowBad(piece.row);
    const bool has_weight = gm_.weight != nullptr && IsKept(args_, pieces.TargetOf(piece.row));
    const float weight = has_weight ? target_weight_.GetValue(index * kBlock) : 1.0f;
    s.undefined = s.undefined || is_bad || !IsFinite(weight) || !IsFinite(up.class_weight) || !IsFinite(up.loss) ||
                  !IsFinite(up.z) || !IsFinite(grad_entropy) || !IsFinite(s.row_scale);
    if (s.undefined) {
      return s;
    }
    const Coefficients k = MakeCoefficients(args_, weight, up, lse, s.row_scale);
    const float entropy = grad_entropy != 0.0f ? entropy_.GetValue(fact) : 0.0f;
    const float h = args_.grad_scale * s.row_scale * grad_entropy;
    const float factor = ExpOfMinus(lse_low);
    s.scale = (k.a - h * (entropy - lse_low)) * factor;
    s.tilt = -h * factor;
    s.offset = k.s;
    s.target = pieces.TargetColumn(piece);
    s.target_known = false;
    s.target_step = -k.b;
    const float picked = s.target >= 0 ? MappedPicked(pieces, index) : 0.0f;
    if (s.target >= 0 && IsFinite(picked)) {
      // a p - b would cancel for a confident prediction, where p is near 1.
      const float below = (picked - lse) - lse_low;
      const float slope = softcap.IsOn() ? softcap.SlopeAt(capped_.GetValue(index)) : 1.0f;
      s.target_known = below > kNearZero;
      if (s.target_known) {
        const float less_one = Expm1NearZero(below);
        const float of_entropy = h * (1.0f + less_one) * (below + entropy);
        s.target_value = slope * (k.a * less_one + (k.a - k.b) - k.s * weight - of_entropy);
      }
      s.target_step *= slope;
    }
    return s;
  }

 private:
  __aicore__ inline float ScaledPicked(int64_t index, float scale) const {
    return Product(ScalarOf(picked_, index * kBlockOf<T>), scale);
  }
  // The scalar unit has no exp: the vector unit caps the targets' logits of a block, all at once.
  __aicore__ inline void CapPicked(const LongPieces<kStats>& pieces, const Softcap& softcap) const {
    for (int64_t i = 0; i < kFactRows; ++i) {
      const bool has_target = i < pieces.Count() && pieces.TargetColumn(pieces.At(i)) >= 0;
      capped_.SetValue(i, has_target ? ScaledPicked(i, args_.logit_scale) : 0.0f);
    }
    SetFlag<HardEvent::S_V>(LongFlag::kCap);
    WaitFlag<HardEvent::S_V>(LongFlag::kCap);
    softcap.Apply(capped_, kFactRows);
    SetFlag<HardEvent::V_S>(LongFlag::kCap);
    WaitFlag<HardEvent::V_S>(LongFlag::kCap);
  }
  __aicore__ inline void CopyOperandIn(const LocalTensor<float>& to, GM_ADDR from, const LongPieces<kStats>& pieces) {
    if (from != nullptr) {
      CopyIn(to, Gm<float>(from, pieces.FirstRow()), pieces.RowCount());
    }
  }
  __aicore__ inline Upstream UpstreamOf(int64_t fact) const {
    Upstream up = upstream_;
    if (ReductionIs(args_, Reduction::none)) {
      up.loss = gm_.grad_loss != nullptr ? grad_loss_.GetValue(fact) : 0.0f;
      if (args_.lse_square_scale != 0.0f || args_.adds_to_a != 0) {
        up.z = gm_.grad_z_loss != nullptr ? grad_z_loss_.GetValue(fact) : 0.0f;
        up.z = args_.adds_to_a != 0 ? up.z : SumOfTwo(up.z, up.loss);
      }
    }
    return up;
  }

  const XentArgs args_;
  const RowTensors gm_;
  Upstream upstream_{};
  LocalTensor<T> picked_;             // a data block a piece
  LocalTensor<float> target_weight_;  // a data block a piece
  LocalTensor<float> capped_;         // with a softcap: picked logits, by piece
  LocalTensor<float> lse_, lse_low_, grad_loss_, grad_z_loss_, row_scale_, entropy_, grad_entropy_;  // operands, by row
};

}  // namespace npu_xent
