# ascendc_library and its like, at the path where older toolkits have them: the commands are those under tools.
include("${CMAKE_CURRENT_LIST_DIR}/../../../tools/tikcpp/ascendc_kernel_cmake/ascendc.cmake")
