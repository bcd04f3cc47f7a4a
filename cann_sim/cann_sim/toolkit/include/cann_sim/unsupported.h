// Names of Ascend C that kernels use and cann_sim does not model: using one is a compile error that names it.
#pragma once

#include "cann_sim/core.h"

namespace cann_sim {

template <typename...>
inline constexpr bool always_false = false;
template <auto...>
inline constexpr bool always_false_value = false;

}  // namespace cann_sim

namespace AscendC {

// Each is callable with any arguments, with type or value template arguments, or values after one type. The ellipsis
// makes it the worst of all matches, so that a kernel's own function of the same name is still the one that is called.
#define CANN_SIM_UNSUPPORTED(NAME)                                                                   \
  template <typename... Types>                                                                       \
  void NAME(...) {                                                                                   \
    static_assert(::cann_sim::always_false<Types...>, "cann_sim does not model " #NAME);             \
  }                                                                                                  \
  template <auto first, auto... rest>                                                                \
  void NAME(...) {                                                                                   \
    static_assert(::cann_sim::always_false_value<first, rest...>, "cann_sim does not model " #NAME); \
  }                                                                                                  \
  template <typename Type, auto first, auto... rest>                                                 \
  void NAME(...) {                                                                                   \
    static_assert(::cann_sim::always_false_value<first, rest...>, "cann_sim does not model " #NAME); \
  }

// between cores
CANN_SIM_UNSUPPORTED(SyncAll)
CANN_SIM_UNSUPPORTED(IBSet)
CANN_SIM_UNSUPPORTED(IBWait)
CANN_SIM_UNSUPPORTED(CrossCoreSetFlag)
CANN_SIM_UNSUPPORTED(CrossCoreWaitFlag)
CANN_SIM_UNSUPPORTED(InitDetermineComputeWorkspace)
CANN_SIM_UNSUPPORTED(WaitPreBlock)
CANN_SIM_UNSUPPORTED(NotifyNextBlock)
CANN_SIM_UNSUPPORTED(SetNextTaskStart)
CANN_SIM_UNSUPPORTED(WaitPreTaskEnd)
// atomics
CANN_SIM_UNSUPPORTED(SetAtomicAdd)
CANN_SIM_UNSUPPORTED(SetAtomicMax)
CANN_SIM_UNSUPPORTED(SetAtomicMin)
CANN_SIM_UNSUPPORTED(SetAtomicNone)
CANN_SIM_UNSUPPORTED(SetAtomicType)
CANN_SIM_UNSUPPORTED(SetStoreAtomicConfig)
CANN_SIM_UNSUPPORTED(GetStoreAtomicConfig)
// cube unit
CANN_SIM_UNSUPPORTED(Mmad)
CANN_SIM_UNSUPPORTED(MmadWithSparse)
CANN_SIM_UNSUPPORTED(LoadData)
CANN_SIM_UNSUPPORTED(LoadDataWithTranspose)
CANN_SIM_UNSUPPORTED(LoadDataWithSparse)
CANN_SIM_UNSUPPORTED(LoadDataUnzip)
CANN_SIM_UNSUPPORTED(Fixpipe)
CANN_SIM_UNSUPPORTED(Fill)
CANN_SIM_UNSUPPORTED(InitConstValue)
CANN_SIM_UNSUPPORTED(BroadCastVecToMM)
CANN_SIM_UNSUPPORTED(Conv2D)
CANN_SIM_UNSUPPORTED(Gemm)
CANN_SIM_UNSUPPORTED(SetFixPipeConfig)
CANN_SIM_UNSUPPORTED(SetHF32Mode)
// transfers
CANN_SIM_UNSUPPORTED(SetPadValue)
CANN_SIM_UNSUPPORTED(DataCopyGather)
CANN_SIM_UNSUPPORTED(SetLoopModePara)
CANN_SIM_UNSUPPORTED(ResetLoopModePara)
CANN_SIM_UNSUPPORTED(DataCachePreload)
// sorting, gathering, transposing
CANN_SIM_UNSUPPORTED(Sort)
CANN_SIM_UNSUPPORTED(Sort32)
CANN_SIM_UNSUPPORTED(MrgSort)
CANN_SIM_UNSUPPORTED(MrgSort4)
CANN_SIM_UNSUPPORTED(RpSort16)
CANN_SIM_UNSUPPORTED(ProposalConcat)
CANN_SIM_UNSUPPORTED(ProposalExtract)
CANN_SIM_UNSUPPORTED(Concat)
CANN_SIM_UNSUPPORTED(Extract)
CANN_SIM_UNSUPPORTED(Gatherb)
CANN_SIM_UNSUPPORTED(Scatter)
CANN_SIM_UNSUPPORTED(Transpose)
CANN_SIM_UNSUPPORTED(TransDataTo5HD)
// composite vector instructions and the library on top
CANN_SIM_UNSUPPORTED(AddRelu)
CANN_SIM_UNSUPPORTED(AddReluCast)
CANN_SIM_UNSUPPORTED(SubRelu)
CANN_SIM_UNSUPPORTED(SubReluCast)
CANN_SIM_UNSUPPORTED(MulAddRelu)
CANN_SIM_UNSUPPORTED(FusedMulAddRelu)
CANN_SIM_UNSUPPORTED(MulCast)
CANN_SIM_UNSUPPORTED(AddDeqRelu)
CANN_SIM_UNSUPPORTED(CastDeq)
CANN_SIM_UNSUPPORTED(CastDequant)
CANN_SIM_UNSUPPORTED(SetDeqScale)
CANN_SIM_UNSUPPORTED(BilinearInterpolation)
CANN_SIM_UNSUPPORTED(SoftMax)
CANN_SIM_UNSUPPORTED(SoftmaxFlash)
CANN_SIM_UNSUPPORTED(SoftmaxFlashV2)
CANN_SIM_UNSUPPORTED(SimpleSoftMax)
CANN_SIM_UNSUPPORTED(LogSoftMax)
CANN_SIM_UNSUPPORTED(LayerNorm)
CANN_SIM_UNSUPPORTED(RmsNorm)
CANN_SIM_UNSUPPORTED(Broadcast)
CANN_SIM_UNSUPPORTED(BroadCast)
CANN_SIM_UNSUPPORTED(Tanh)
CANN_SIM_UNSUPPORTED(Sin)
CANN_SIM_UNSUPPORTED(Cos)
CANN_SIM_UNSUPPORTED(Tan)
CANN_SIM_UNSUPPORTED(Asin)
CANN_SIM_UNSUPPORTED(Acos)
CANN_SIM_UNSUPPORTED(Atan)
CANN_SIM_UNSUPPORTED(Sinh)
CANN_SIM_UNSUPPORTED(Cosh)
CANN_SIM_UNSUPPORTED(Asinh)
CANN_SIM_UNSUPPORTED(Acosh)
CANN_SIM_UNSUPPORTED(Atanh)
CANN_SIM_UNSUPPORTED(Erf)
CANN_SIM_UNSUPPORTED(Erfc)
CANN_SIM_UNSUPPORTED(Log2)
CANN_SIM_UNSUPPORTED(Log10)
CANN_SIM_UNSUPPORTED(Lgamma)
CANN_SIM_UNSUPPORTED(Digamma)
CANN_SIM_UNSUPPORTED(Sign)
CANN_SIM_UNSUPPORTED(Ceil)
CANN_SIM_UNSUPPORTED(Floor)
CANN_SIM_UNSUPPORTED(Round)
CANN_SIM_UNSUPPORTED(Trunc)
CANN_SIM_UNSUPPORTED(Frac)
CANN_SIM_UNSUPPORTED(Fmod)
CANN_SIM_UNSUPPORTED(Xor)
CANN_SIM_UNSUPPORTED(CumSum)
CANN_SIM_UNSUPPORTED(ClampMax)
CANN_SIM_UNSUPPORTED(ClampMin)
CANN_SIM_UNSUPPORTED(Sum)
CANN_SIM_UNSUPPORTED(Mean)
CANN_SIM_UNSUPPORTED(FasterGelu)
CANN_SIM_UNSUPPORTED(FasterGeluV2)
CANN_SIM_UNSUPPORTED(Silu)
CANN_SIM_UNSUPPORTED(Swish)
CANN_SIM_UNSUPPORTED(SwiGLU)
CANN_SIM_UNSUPPORTED(GeGLU)
CANN_SIM_UNSUPPORTED(ReGlu)
CANN_SIM_UNSUPPORTED(BatchNorm)
CANN_SIM_UNSUPPORTED(DeepNorm)
CANN_SIM_UNSUPPORTED(GroupNorm)
CANN_SIM_UNSUPPORTED(Normalize)
CANN_SIM_UNSUPPORTED(WelfordUpdate)
CANN_SIM_UNSUPPORTED(WelfordFinalize)
CANN_SIM_UNSUPPORTED(LayerNormGrad)
CANN_SIM_UNSUPPORTED(LayerNormGradBeta)
CANN_SIM_UNSUPPORTED(SoftmaxGrad)
CANN_SIM_UNSUPPORTED(SoftmaxGradFront)
CANN_SIM_UNSUPPORTED(SoftmaxFlashV3)
CANN_SIM_UNSUPPORTED(AdjustSoftMaxRes)
CANN_SIM_UNSUPPORTED(ConfusionTranspose)
CANN_SIM_UNSUPPORTED(Pad)
CANN_SIM_UNSUPPORTED(UnPad)
CANN_SIM_UNSUPPORTED(SelectWithBytesMask)
CANN_SIM_UNSUPPORTED(ArithProgression)
CANN_SIM_UNSUPPORTED(AscendQuant)
CANN_SIM_UNSUPPORTED(AscendDequant)
CANN_SIM_UNSUPPORTED(AscendAntiQuant)
CANN_SIM_UNSUPPORTED(Sigmoid)
CANN_SIM_UNSUPPORTED(Gelu)
CANN_SIM_UNSUPPORTED(Log)
CANN_SIM_UNSUPPORTED(Power)
CANN_SIM_UNSUPPORTED(TopK)
CANN_SIM_UNSUPPORTED(DropOut)
// debugging aids
CANN_SIM_UNSUPPORTED(DumpTensor)
CANN_SIM_UNSUPPORTED(DumpAccChkPoint)
CANN_SIM_UNSUPPORTED(Trap)

#undef CANN_SIM_UNSUPPORTED

#define CANN_SIM_UNSUPPORTED_CLASS(NAME)                                                 \
  template <typename... Types>                                                           \
  class NAME {                                                                           \
    static_assert(::cann_sim::always_false<Types...>, "cann_sim does not model " #NAME); \
  };

CANN_SIM_UNSUPPORTED_CLASS(TBufPool)
CANN_SIM_UNSUPPORTED_CLASS(LocalMemAllocator)
CANN_SIM_UNSUPPORTED_CLASS(TSCM)
CANN_SIM_UNSUPPORTED_CLASS(GroupBarrier)
CANN_SIM_UNSUPPORTED_CLASS(CubeResGroupHandle)
CANN_SIM_UNSUPPORTED_CLASS(Matmul)
CANN_SIM_UNSUPPORTED_CLASS(MatmulImpl)

#undef CANN_SIM_UNSUPPORTED_CLASS

}  // namespace AscendC

// Tiling data of operators that are registered with the framework; here a kernel gets it as a pointer or by value.
#define CANN_SIM_NO_TILING(NAME) static_assert(false, "cann_sim does not model " #NAME)
#define GET_TILING_DATA(...) CANN_SIM_NO_TILING(GET_TILING_DATA)
#define GET_TILING_DATA_WITH_STRUCT(...) CANN_SIM_NO_TILING(GET_TILING_DATA_WITH_STRUCT)
#define GET_TILING_DATA_MEMBER(...) CANN_SIM_NO_TILING(GET_TILING_DATA_MEMBER)
#define REGISTER_TILING_DEFAULT(...) CANN_SIM_NO_TILING(REGISTER_TILING_DEFAULT)
#define TILING_KEY_IS(...)             \
  ([] {                                \
    CANN_SIM_NO_TILING(TILING_KEY_IS); \
    return false;                      \
  }())
