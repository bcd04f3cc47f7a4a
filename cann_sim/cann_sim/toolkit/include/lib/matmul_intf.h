// The cube unit's library, which kernels include by this name.
#error "cann_sim does not model lib/matmul_intf.h: vector kernels only"
