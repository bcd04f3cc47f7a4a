// DataCopy and DataCopyPad between device memory and the unified buffer, and within the unified buffer.
#pragma once

#include "cann_sim/global.h"
#include "cann_sim/tensor.h"

namespace cann_sim {

// A transfer as the hardware sees it, all in bytes: `count` blocks of `length`, with the gap between the end of one and
// the start of the next. In the unified buffer each block takes left + length + right, rounded up to 32.
struct Transfer {
  uint32_t count;
  uint64_t length, gm_gap, ub_gap;
  uint32_t left = 0, right = 0;
  enum class Fill : uint8_t { none, first_element, value, undefined } fill = Fill::none;
  uint64_t value = 0;         // the padding's bytes, as many as the element has
  uint32_t gm_alignment = 1;  // of the address in device memory
};

void copy_in(const char* op, Place where, const LocalTensorBase& dst, const void* src, const Transfer& transfer,
             uint32_t element_bytes);
void copy_out(const char* op, Place where, void* dst, const LocalTensorBase& src, const Transfer& transfer,
              uint32_t element_bytes);
// Within the unified buffer, on the vector pipe; gaps in bytes.
void copy_local(const char* op, Place where, const LocalTensorBase& dst, const LocalTensorBase& src, uint32_t count,
                uint32_t length, uint32_t src_gap, uint32_t dst_gap, uint32_t element_bytes);

// "copy-params": the documented ranges.
void check_blocks(const char* op, Place where, uint32_t count, uint64_t length, uint32_t element_bytes);
void check_padding(const char* op, Place where, uint32_t left, uint32_t right, uint64_t value, bool is_pad,
                   uint32_t element_bytes);
void check_count(const char* op, Place where, uint64_t count, uint32_t element_bytes);

// A transfer of DataCopy: its device memory has to be aligned to the element.
template <typename T>
Transfer whole_blocks(uint32_t count, uint64_t length, uint64_t gm_gap, uint64_t ub_gap) {
  Transfer transfer{count, length, gm_gap, ub_gap};
  transfer.gm_alignment = sizeof(T);
  return transfer;
}

template <typename T>
uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

}  // namespace cann_sim

namespace AscendC {

// Strides and gaps are two names of the same thing.
struct DataCopyParams {
  uint16_t blockCount = 1, blockLen = 0;
  union {
    uint16_t srcGap = 0;
    uint16_t srcStride;
  };
  union {
    uint16_t dstGap = 0;
    uint16_t dstStride;
  };
  constexpr DataCopyParams() {}
  constexpr DataCopyParams(uint16_t count, uint16_t len, uint16_t src, uint16_t dst)
      : blockCount(count), blockLen(len), srcGap(src), dstGap(dst) {}
};

struct DataCopyExtParams {
  uint16_t blockCount = 1;
  uint32_t blockLen = 0, srcStride = 0, dstStride = 0, rsv = 0;
  constexpr DataCopyExtParams() {}
  constexpr DataCopyExtParams(uint16_t count, uint32_t len, uint32_t src, uint32_t dst, uint32_t reserved)
      : blockCount(count), blockLen(len), srcStride(src), dstStride(dst), rsv(reserved) {}
};

struct DataCopyPadParams {
  bool isPad = false;
  uint8_t leftPadding = 0, rightPadding = 0;
  uint64_t paddingValue = 0;
  constexpr DataCopyPadParams() {}
  constexpr DataCopyPadParams(bool pad, uint8_t left, uint8_t right, uint64_t value)
      : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
};

template <typename T>
struct DataCopyPadExtParams {
  bool isPad = false;
  uint8_t leftPadding = 0, rightPadding = 0;
  T paddingValue{};
  constexpr DataCopyPadExtParams() {}
  constexpr DataCopyPadExtParams(bool pad, uint8_t left, uint8_t right, T value)
      : isPad(pad), leftPadding(left), rightPadding(right), paddingValue(value) {}
};

// ---- DataCopy: whole 32-byte blocks ----

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, uint32_t count, CANN_SIM_HERE) {
  ::cann_sim::check_count("DataCopy", where, count, sizeof(T));
  ::cann_sim::copy_in("DataCopy", where, dst, src.GetPhyAddr(),
                      ::cann_sim::whole_blocks<T>(1, uint64_t{count} * sizeof(T), 0, 0), sizeof(T));
}
template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count, CANN_SIM_HERE) {
  ::cann_sim::check_count("DataCopy", where, count, sizeof(T));
  ::cann_sim::copy_out("DataCopy", where, dst.GetPhyAddr(0), src,
                       ::cann_sim::whole_blocks<T>(1, uint64_t{count} * sizeof(T), 0, 0), sizeof(T));
}
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, uint32_t count, CANN_SIM_HERE) {
  ::cann_sim::check_count("DataCopy", where, count, sizeof(T));
  ::cann_sim::copy_local("DataCopy", where, dst, src, 1, count * sizeof(T), 0, 0, sizeof(T));
}

template <typename T>
void DataCopy(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& repeat, CANN_SIM_HERE) {
  ::cann_sim::check_blocks("DataCopy", where, repeat.blockCount, repeat.blockLen * 32u, 1);
  ::cann_sim::copy_in(
      "DataCopy", where, dst, src.GetPhyAddr(),
      ::cann_sim::whole_blocks<T>(repeat.blockCount, repeat.blockLen * 32u, repeat.srcGap * 32u, repeat.dstGap * 32u),
      sizeof(T));
}
template <typename T>
void DataCopy(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& repeat, CANN_SIM_HERE) {
  ::cann_sim::check_blocks("DataCopy", where, repeat.blockCount, repeat.blockLen * 32u, 1);
  ::cann_sim::copy_out(
      "DataCopy", where, dst.GetPhyAddr(0), src,
      ::cann_sim::whole_blocks<T>(repeat.blockCount, repeat.blockLen * 32u, repeat.dstGap * 32u, repeat.srcGap * 32u),
      sizeof(T));
}
template <typename T>
void DataCopy(const LocalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& repeat, CANN_SIM_HERE) {
  ::cann_sim::check_blocks("DataCopy", where, repeat.blockCount, repeat.blockLen * 32u, 1);
  ::cann_sim::copy_local("DataCopy", where, dst, src, repeat.blockCount, repeat.blockLen * 32u, repeat.srcGap * 32u,
                         repeat.dstGap * 32u, sizeof(T));
}

// ---- DataCopyPad: any number of bytes; strides are bytes in device memory, 32-byte units in the unified buffer ----

template <typename T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyExtParams& params,
                 const DataCopyPadExtParams<T>& pad, CANN_SIM_HERE) {
  using ::cann_sim::Transfer;
  const uint64_t value = ::cann_sim::bits_of(pad.paddingValue);
  ::cann_sim::check_blocks("DataCopyPad", where, params.blockCount, params.blockLen, sizeof(T));
  ::cann_sim::check_padding("DataCopyPad", where, pad.leftPadding, pad.rightPadding, value, pad.isPad, sizeof(T));
  const bool sides = pad.leftPadding != 0 || pad.rightPadding != 0;
  Transfer transfer{params.blockCount, params.blockLen, params.srcStride, uint64_t{params.dstStride} * 32};
  transfer.left = pad.leftPadding * sizeof(T);
  transfer.right = pad.rightPadding * sizeof(T);
  transfer.fill = !sides      ? Transfer::Fill::first_element
                  : pad.isPad ? Transfer::Fill::value
                              : Transfer::Fill::undefined;
  transfer.value = value;
  ::cann_sim::copy_in("DataCopyPad", where, dst, src.GetPhyAddr(), transfer, sizeof(T));
}
template <typename T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyExtParams& params,
                 CANN_SIM_HERE) {
  ::cann_sim::check_blocks("DataCopyPad", where, params.blockCount, params.blockLen, sizeof(T));
  ::cann_sim::copy_out("DataCopyPad", where, dst.GetPhyAddr(0), src,
                       {params.blockCount, params.blockLen, params.dstStride, uint64_t{params.srcStride} * 32},
                       sizeof(T));
}

template <typename T>
void DataCopyPad(const LocalTensor<T>& dst, const GlobalTensor<T>& src, const DataCopyParams& params,
                 const DataCopyPadParams& pad, CANN_SIM_HERE) {
  T value{};
  std::memcpy(&value, &pad.paddingValue, sizeof(T));
  DataCopyPad(dst, src, DataCopyExtParams(params.blockCount, params.blockLen, params.srcStride, params.dstStride, 0),
              DataCopyPadExtParams<T>(pad.isPad, pad.leftPadding, pad.rightPadding, value), where);
}
template <typename T>
void DataCopyPad(const GlobalTensor<T>& dst, const LocalTensor<T>& src, const DataCopyParams& params, CANN_SIM_HERE) {
  DataCopyPad(dst, src, DataCopyExtParams(params.blockCount, params.blockLen, params.srcStride, params.dstStride, 0),
              where);
}

}  // namespace AscendC
