// See aliases.h.
#include "aliases.h"

#include <cstring>
#include <optional>

#include <ATen/EmptyTensor.h>
#include <ATen/ops/as_strided_ops.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/resize_ops.h>
#include <c10/core/CPUAllocator.h>

namespace cann_sim_torch {
namespace {

c10::Storage alias_storage(const c10::Storage& npu) {
  auto nothing = [](void*) {};
  c10::DataPtr data(const_cast<void*>(npu.data()), nullptr, nothing, c10::Device(at::kCPU));
  return c10::Storage(c10::Storage::use_byte_size_t(), npu.nbytes(), std::move(data), c10::GetCPUAllocator(),
                      /*resizable=*/true);
}

void copy_dense(const at::Tensor& to, const at::Tensor& from) {
  const size_t bytes = at::detail::computeStorageNbytes(from.sizes(), from.strides(), from.itemsize());
  if (from.numel() != 0 && to.data_ptr() != from.data_ptr()) {
    std::memcpy(to.data_ptr(), from.const_data_ptr(), bytes);
  }
}

}  // namespace

at::Tensor Aliases::to_cpu(const at::Tensor& tensor, bool written) {
  if (!tensor.defined() || !tensor.is_privateuseone()) {
    return tensor;
  }
  auto [place, is_new] = by_npu_.try_emplace(tensor.unsafeGetTensorImpl(), pairs_.size());
  if (!is_new) {
    pairs_[place->second].written |= written;
    return pairs_[place->second].cpu;
  }
  const c10::Storage& npu_storage = tensor.storage();
  auto [storage, new_storage] = storages_.try_emplace(npu_storage.unsafeGetStorageImpl());
  if (new_storage) {
    storage->second = alias_storage(npu_storage);
  }
  at::Tensor cpu = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage->second),
                                                            c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  c10::TensorImpl* impl = cpu.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  if (tensor.is_conj()) {
    cpu._set_conj(true);
  }
  if (tensor.is_neg()) {
    cpu._set_neg(true);
  }
  by_cpu_.emplace(impl, pairs_.size());
  pairs_.push_back({cpu, tensor, written});
  return cpu;
}

at::Tensor Aliases::to_npu(const at::Tensor& tensor, c10::Device device) {
  if (!tensor.defined() || !tensor.is_cpu()) {
    return tensor;
  }
  if (auto place = by_cpu_.find(tensor.unsafeGetTensorImpl()); place != by_cpu_.end()) {
    return pairs_[place->second].npu;
  }
  at::Tensor result = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(device));
  if (tensor.is_conj()) {
    result._set_conj(true);
  }
  if (tensor.is_neg()) {
    result._set_neg(true);
  }
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    result.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  new_.push_back({tensor, result, true});
  return result;
}

std::vector<Aliases::Pair> Aliases::arriving() const {
  std::vector<Pair> arriving = new_;
  for (const Pair& pair : pairs_) {
    if (!pair.written || pair.cpu.sizes() == pair.npu.sizes()) {
      continue;
    }
    at::Tensor npu = pair.npu;
    at::_ops::resize_::call(npu, c10::fromIntArrayRefSlow(pair.cpu.sizes()), std::nullopt);
    if (npu.strides() != pair.cpu.strides()) {
      at::_ops::as_strided_::call(npu, c10::fromIntArrayRefSlow(pair.cpu.sizes()),
                                  c10::fromIntArrayRefSlow(pair.cpu.strides()), std::nullopt);
    }
    arriving.push_back(pair);
  }
  return arriving;
}

void Aliases::write(const Pair& pair) {
  copy_dense(pair.npu, pair.cpu);
}

}  // namespace cann_sim_torch
