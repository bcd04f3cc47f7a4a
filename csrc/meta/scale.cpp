// scale_ without values.
#include <torch/library.h>

#include "meta/shapes.h"

namespace npu_xent::meta {

TORCH_LIBRARY_IMPL(npu_xent, Meta, m) {
  m.impl("scale_", check_scale);
}

}  // namespace npu_xent::meta
