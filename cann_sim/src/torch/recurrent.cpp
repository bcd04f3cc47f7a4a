// The fused cells of LSTM and GRU, which have no CPU kernels in torch, composed of other operators.
#include <tuple>

#include <ATen/ops/add.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/unsafe_chunk.h>

#include "operators.h"

namespace cann_sim_torch {
namespace {

at::Tensor with_bias(const at::Tensor& gates, const std::optional<at::Tensor>& bias) {
  return bias && bias->defined() ? at::add(gates, *bias) : gates;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(const at::Tensor& input_gates, const at::Tensor& hidden_gates,
                                                         const at::Tensor& cell,
                                                         const std::optional<at::Tensor>& input_bias,
                                                         const std::optional<at::Tensor>& hidden_bias) {
  const at::Tensor gates = at::add(with_bias(input_gates, input_bias), with_bias(hidden_gates, hidden_bias));
  const std::vector<at::Tensor> parts = at::unsafe_chunk(gates, 4, 1);
  const at::Tensor input = at::sigmoid(parts[0]), forget = at::sigmoid(parts[1]), output = at::sigmoid(parts[3]);
  const at::Tensor new_cell = at::add(at::mul(forget, cell), at::mul(input, at::tanh(parts[2])));
  return {at::mul(output, at::tanh(new_cell)), new_cell, gates};
}

std::tuple<at::Tensor, at::Tensor> gru_cell(const at::Tensor& input_gates, const at::Tensor& hidden_gates,
                                            const at::Tensor& hidden, const std::optional<at::Tensor>& input_bias,
                                            const std::optional<at::Tensor>& hidden_bias) {
  const std::vector<at::Tensor> from_input = at::unsafe_chunk(with_bias(input_gates, input_bias), 3, 1);
  const std::vector<at::Tensor> from_hidden = at::unsafe_chunk(with_bias(hidden_gates, hidden_bias), 3, 1);
  const at::Tensor reset = at::sigmoid(at::add(from_input[0], from_hidden[0]));
  const at::Tensor update = at::sigmoid(at::add(from_input[1], from_hidden[1]));
  const at::Tensor fresh = at::tanh(at::add(from_input[2], at::mul(reset, from_hidden[2])));
  return {at::add(fresh, at::mul(update, at::sub(hidden, fresh))), reset};
}

}  // namespace cann_sim_torch
