// A history that raises: for what cannot be differentiated and must not pass silently for a constant.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <memory>
#include <string>
#include <type_traits>

namespace npu_xent::autograd {

// Nodes are held by std::shared_ptr in older torch, by c10::intrusive_ptr in newer.
template <typename Node>
auto make_node(std::string message, torch::autograd::edge_list edges) {
  using Held = decltype(torch::autograd::get_current_node());
  if constexpr (std::is_same_v<Held, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<Node>(std::move(message), std::move(edges));
  } else {
    return c10::make_intrusive<Node>(std::move(message), std::move(edges));
  }
}

// `output` becomes a function of whatever `edges` lead to; its derivative raises `message`.
inline void set_refusing_history(const at::Tensor& output, std::string message, torch::autograd::edge_list edges) {
  torch::autograd::set_history(output, make_node<torch::autograd::Error>(std::move(message), std::move(edges)));
}

}  // namespace npu_xent::autograd
