// LocalTensor (a range of the unified buffer) and its scalar accesses, with the range and alignment checks that every
// vector and copy API uses.
#pragma once

#include <type_traits>

#include "cann_sim/core.h"
#include "cann_sim/position.h"

namespace cann_sim {

struct QueueBuffer;  // one buffer of a TQue: queue.h

// An index with the place it was written at: operators take no default arguments, conversions do.
struct Index {
  uint64_t value;
  Place where;

  template <typename T, typename = std::enable_if_t<std::is_integral_v<T> || std::is_enum_v<T>>>
  Index(T index, CANN_SIM_HERE) : value(static_cast<uint64_t>(index)), where(where) {}
};

// What is there of a LocalTensor whatever its element type.
class LocalTensorBase {
 public:
  uint32_t address() const { return address_; }  // absolute byte offset in UB
  uint32_t bytes() const { return bytes_; }
  bool valid() const { return valid_; }
  QueueBuffer* buffer() const { return buffer_; }  // the queue buffer it came from, or null

 protected:
  friend struct TensorAccess;
  uint32_t address_ = 0, bytes_ = 0;
  bool valid_ = false;
  AscendC::TPosition position_ = AscendC::TPosition::VECCALC;
  QueueBuffer* buffer_ = nullptr;
};

// The runtime's door to a tensor's fields.
struct TensorAccess {
  static void set(LocalTensorBase& tensor, uint32_t address, uint32_t bytes, AscendC::TPosition position,
                  QueueBuffer* buffer) {
    tensor.address_ = address;
    tensor.bytes_ = bytes;
    tensor.valid_ = true;
    tensor.position_ = position;
    tensor.buffer_ = buffer;
  }
};

// Slow paths of the checks below.
[[noreturn]] void fail_range(const char* op, Place where, const char* name, const LocalTensorBase& tensor,
                             uint64_t offset_bytes, uint64_t bytes, uint32_t element_bytes);
[[noreturn]] void fail_alignment(const char* op, Place where, const char* name, const LocalTensorBase& tensor,
                                 uint32_t alignment);

// "bounds": bytes [offset, offset + bytes) of the tensor must lie inside it. `name` is the parameter's name.
inline void require_range(const char* op, Place where, const char* name, const LocalTensorBase& tensor,
                          uint64_t offset_bytes, uint64_t bytes, uint32_t element_bytes) {
  if (!tensor.valid() || offset_bytes + bytes > tensor.bytes()) {
    fail_range(op, where, name, tensor, offset_bytes, bytes, element_bytes);
  }
}

// "alignment": the tensor must start at a multiple of `alignment` bytes of UB.
inline void require_alignment(const char* op, Place where, const char* name, const LocalTensorBase& tensor,
                              uint32_t alignment) {
  if (tensor.address() % alignment != 0) {
    fail_alignment(op, where, name, tensor, alignment);
  }
}

}  // namespace cann_sim

namespace AscendC {

template <typename T>
class LocalTensor : public ::cann_sim::LocalTensorBase {
 public:
  using PrimType = T;

  LocalTensor() = default;

  // A tensor at an address of one's own choice, without TPipe; `size` in elements.
  LocalTensor(TPosition position, uint32_t address, uint32_t size, CANN_SIM_HERE) {
    ::cann_sim::TensorAccess::set(*this, address, size * sizeof(T), position, nullptr);
    if (uint64_t{address} + uint64_t{size} * sizeof(T) > ::cann_sim::kUbUsable) {
      ::cann_sim::core().fail("ub-overflow", where,
                              ::cann_sim::format("LocalTensor of %u elements at byte %u: %u bytes of UB are usable",
                                                 size, address, ::cann_sim::kUbUsable));
    }
  }

  // What operator() gives: reads and writes through it are scalar accesses at the place of the call.
  class Element {
   public:
    Element(const LocalTensor& tensor, ::cann_sim::Index index) : tensor_(tensor), index_(index) {}
    operator T() const { return tensor_.GetValue(static_cast<uint32_t>(index_.value), index_.where); }
    Element& operator=(T value) {
      tensor_.SetValue(static_cast<uint32_t>(index_.value), value, index_.where);
      return *this;
    }
    Element& operator=(const Element& other) { return *this = static_cast<T>(other); }

   private:
    const LocalTensor& tensor_;
    ::cann_sim::Index index_;
  };

  T GetValue(uint32_t index, CANN_SIM_HERE) const {
    access("GetValue", index, where, false);
    T value;
    std::memcpy(&value, data() + index, sizeof(T));
    return value;
  }
  void SetValue(uint32_t index, T value, CANN_SIM_HERE) const {
    access("SetValue", index, where, true);
    std::memcpy(data() + index, &value, sizeof(T));
  }
  Element operator()(::cann_sim::Index index) const { return Element(*this, index); }

  // The tensor from element `offset` to this one's end.
  LocalTensor operator[](::cann_sim::Index offset) const {
    const uint64_t skipped = offset.value * sizeof(T);
    if (!valid_ || skipped > bytes_) {
      ::cann_sim::fail_range("LocalTensor::operator[]", offset.where, "offset", *this, skipped, 0, sizeof(T));
    }
    LocalTensor part = *this;
    part.address_ += static_cast<uint32_t>(skipped);
    part.bytes_ -= static_cast<uint32_t>(skipped);
    return part;
  }

  template <typename U>
  LocalTensor<U> ReinterpretCast() const {
    LocalTensor<U> other;
    if (valid_) {
      ::cann_sim::TensorAccess::set(other, address_, bytes_, position_, buffer_);
    }
    return other;
  }

  uint32_t GetSize() const { return bytes_ / sizeof(T); }
  uint32_t GetLength() const { return bytes_; }
  // What the tensor says of itself from now on; it is not held to the buffer that it came from.
  void SetSize(uint32_t size) { bytes_ = size * sizeof(T); }
  void SetBufferLen(uint32_t bytes) { bytes_ = bytes; }
  int32_t GetPosition() const { return static_cast<int32_t>(position_); }
  uint64_t GetPhyAddr() const { return reinterpret_cast<uint64_t>(data()); }
  uint64_t GetPhyAddr(uint32_t offset) const { return reinterpret_cast<uint64_t>(data() + offset); }
  void SetUserTag(uint32_t tag) { tag_ = tag; }
  uint32_t GetUserTag() const { return tag_; }

  // Host memory behind the tensor, for the APIs' data effects.
  T* data() const { return reinterpret_cast<T*>(::cann_sim::core().ub() + address_); }

 private:
  void access(const char* op, uint32_t index, ::cann_sim::Place where, bool writes) const {
    const uint64_t offset = uint64_t{index} * sizeof(T);
    ::cann_sim::require_range(op, where, "offset", *this, offset, sizeof(T), sizeof(T));
    const ::cann_sim::Accesses touched(address_ + static_cast<uint32_t>(offset), sizeof(T));
    const ::cann_sim::Accesses none;
    ::cann_sim::core().scalar(op, where, writes ? none : touched, writes ? touched : none);
  }

  uint32_t tag_ = 0;
};

}  // namespace AscendC
