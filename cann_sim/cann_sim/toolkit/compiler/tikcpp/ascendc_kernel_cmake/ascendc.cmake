# The place older toolkits have it.
include("${CMAKE_CURRENT_LIST_DIR}/../../../tools/tikcpp/ascendc_kernel_cmake/ascendc.cmake")
