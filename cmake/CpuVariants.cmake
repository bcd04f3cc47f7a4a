# The vectorised CPU loops, built for each instruction set that the compiler supports; one is picked at run time.
include(CheckCXXCompilerFlag)

# Sets NPU_XENT_VARIANTS to at::vec's names, and NPU_XENT_FLAGS_<name> to their compiler flags.
set(NPU_XENT_VARIANTS DEFAULT)
set(NPU_XENT_FLAGS_DEFAULT "")
macro(npu_xent_variant name flags)
  string(REPLACE ";" " " flag_words "${flags}")
  check_cxx_compiler_flag("${flag_words}" NPU_XENT_HAS_${name})
  if(NPU_XENT_HAS_${name})
    list(APPEND NPU_XENT_VARIANTS ${name})
    set(NPU_XENT_FLAGS_${name} ${flags})
  endif()
endmacro()
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  npu_xent_variant(AVX2 "-mavx2;-mfma;-mf16c")
  # GCC warns about uninitialised variables inside its own AVX512 intrinsics (GCC bug 105593).
  npu_xent_variant(AVX512 "-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mavx2;-mfma;-mf16c;-Wno-uninitialized;-Wno-maybe-uninitialized")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  # CPU_CAPABILITY_SVE: the headers of torch 2.11 and older ask for it too, and redefine functions without it.
  npu_xent_variant(SVE256 "-march=armv8-a+sve+bf16;-msve-vector-bits=256;-DCPU_CAPABILITY_SVE;-DHAVE_SVE_CPU_DEFINITION;-DHAVE_ARM_BF16_CPU_DEFINITION")
endif()
# Fewer variants, for tests whose compiler takes minutes for each.
if(NOT "$ENV{NPU_XENT_VARIANTS}" STREQUAL "")
  set(NPU_XENT_VARIANTS $ENV{NPU_XENT_VARIANTS})
endif()
message(STATUS "CPU variants: ${NPU_XENT_VARIANTS}")

# Adds an interface library `name` with the objects of every variant and their table.
function(npu_xent_add_cpu_variants name)
  set(kernels "${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../csrc/cpu/kernels")
  add_library(${name} INTERFACE)
  set(list "")
  foreach(variant ${NPU_XENT_VARIANTS})
    string(APPEND list "X(${variant})")
    set(target ${name}_${variant})
    add_library(${target} OBJECT ${kernels}/chunk_kernels.cpp)
    target_link_libraries(${target} PRIVATE npu_xent_options)
    target_compile_features(${target} PRIVATE cxx_std_17)
    target_compile_definitions(${target} PRIVATE CPU_CAPABILITY=${variant} CPU_CAPABILITY_${variant})
    # Only explicit fmadd calls may be fused. Loops over doubles with conditions are vectorised only if comparisons
    # need not raise floating-point exceptions, which nobody looks at.
    target_compile_options(${target} PRIVATE -ffp-contract=off -fno-trapping-math -fno-math-errno ${NPU_XENT_FLAGS_${variant}})
    target_link_libraries(${name} INTERFACE ${target} $<TARGET_OBJECTS:${target}>)
  endforeach()
  add_library(${name}_table OBJECT ${kernels}/chunk_kernels_table.cpp)
  target_link_libraries(${name}_table PRIVATE npu_xent_options)
  target_compile_features(${name}_table PRIVATE cxx_std_17)
  target_compile_definitions(${name}_table PRIVATE "NPU_XENT_VARIANTS=${list}")
  target_link_libraries(${name} INTERFACE $<TARGET_OBJECTS:${name}_table>)
endfunction()
