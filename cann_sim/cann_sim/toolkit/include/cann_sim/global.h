// GlobalTensor: device memory of the launch's buffers, its scalar accesses, and the data cache calls.
#pragma once

#include "cann_sim/tensor.h"

namespace cann_sim {

// A scalar access of device memory: bounds, hazards, counting, timing.
void scalar_gm(const char* op, Place where, const void* address, uint32_t bytes, bool writes);
void clean_cache(Place where);

}  // namespace cann_sim

namespace AscendC {

enum class CacheMode : uint32_t { CACHE_MODE_DISABLE, CACHE_MODE_NORMAL, CACHE_MODE_LAST, CACHE_MODE_PERSISTENT };
enum class CacheRwMode : uint32_t { READ, WRITE, RW };
enum class CacheLine : uint64_t { SINGLE_CACHE_LINE, ENTIRE_DATA_CACHE };
enum class DcciDst : uint64_t { CACHELINE_ALL, CACHELINE_UB, CACHELINE_OUT, CACHELINE_ATOMIC };

template <typename T>
class GlobalTensor {
 public:
  using PrimType = T;

  // What operator() gives: reads and writes through it are scalar accesses at the place of the call.
  class Element {
   public:
    Element(const GlobalTensor& tensor, ::cann_sim::Index index) : tensor_(tensor), index_(index) {}
    operator T() const { return tensor_.GetValue(index_.value, index_.where); }
    Element& operator=(T value) {
      tensor_.write(index_.value, value, index_.where);
      return *this;
    }
    Element& operator=(const Element& other) { return *this = static_cast<T>(other); }

   private:
    const GlobalTensor& tensor_;
    ::cann_sim::Index index_;
  };

  void SetGlobalBuffer(__gm__ T* buffer, uint64_t bufferSize) {
    address_ = buffer;
    size_ = bufferSize;
  }
  void SetGlobalBuffer(__gm__ T* buffer) { SetGlobalBuffer(buffer, 0); }

  const __gm__ T* GetPhyAddr() const { return address_; }
  __gm__ T* GetPhyAddr(uint64_t offset) const { return address_ + offset; }
  uint64_t GetSize() const { return size_; }

  T GetValue(uint64_t offset, CANN_SIM_HERE) const {
    ::cann_sim::scalar_gm("GlobalTensor::GetValue", where, address_ + offset, sizeof(T), false);
    T value;
    std::memcpy(&value, address_ + offset, sizeof(T));
    return value;
  }
  void SetValue(uint64_t offset, T value, CANN_SIM_HERE) { write(offset, value, where); }
  Element operator()(::cann_sim::Index index) const { return Element(*this, index); }

  GlobalTensor operator[](uint64_t offset) const {
    GlobalTensor part = *this;
    part.address_ += offset;
    part.size_ = size_ > offset ? size_ - offset : 0;
    return part;
  }

  template <typename U>
  GlobalTensor<U> ReinterpretCast() const {
    GlobalTensor<U> other;
    other.SetGlobalBuffer(reinterpret_cast<U*>(address_), size_ * sizeof(T) / sizeof(U));
    return other;
  }

  template <CacheRwMode mode = CacheRwMode::RW>
  void SetL2CacheHint(CacheMode) {}  // the L2 cache is not modelled

 private:
  void write(uint64_t offset, T value, ::cann_sim::Place where) const {
    ::cann_sim::scalar_gm("GlobalTensor::SetValue", where, address_ + offset, sizeof(T), true);
    std::memcpy(address_ + offset, &value, sizeof(T));
  }

  T* address_ = nullptr;
  uint64_t size_ = 0;
};

template <typename T, CacheLine entire, DcciDst dst = DcciDst::CACHELINE_ALL>
void DataCacheCleanAndInvalid(const GlobalTensor<T>&, CANN_SIM_HERE) {
  ::cann_sim::clean_cache(where);
}

}  // namespace AscendC
