# Builds Ascend C kernel libraries with the host compiler, by the commands the device build has:
#   ascendc_library(<target> SHARED|STATIC <source>...)
#   ascendc_compile_definitions / ascendc_compile_options / ascendc_include_directories(<target> PRIVATE ...)
# Host code links the target and includes the generated aclrtlaunch_<kernel>.h.
include_guard(GLOBAL)

get_filename_component(CANN_SIM_TOOLKIT "${CMAKE_CURRENT_LIST_DIR}/../../.." REALPATH)
set(CANN_SIM_CMAKE_DIR "${CMAKE_CURRENT_LIST_DIR}")
file(STRINGS "${CANN_SIM_CMAKE_DIR}/compile_flags.txt" CANN_SIM_COMPILE_FLAGS)
find_package(Python3 REQUIRED COMPONENTS Interpreter)

if(NOT SOC_VERSION)
  message(FATAL_ERROR "SOC_VERSION is not set: Ascend910B1 to Ascend910B4 or Ascend910_93xx")
elseif(NOT SOC_VERSION MATCHES "^[Aa]scend910(B[1-4]|_93)")
  message(FATAL_ERROR "SOC_VERSION ${SOC_VERSION}: cann_sim models Ascend910B1 to Ascend910B4 and Ascend910_93xx")
endif()
if(RUN_MODE AND NOT RUN_MODE MATCHES "^(npu|sim|cpu)$")
  message(FATAL_ERROR "RUN_MODE ${RUN_MODE}: npu, sim or cpu")
endif()
if(NOT EXISTS "${CANN_SIM_TOOLKIT}/lib64/libcann_sim.so")
  message(FATAL_ERROR "${CANN_SIM_TOOLKIT}/lib64/libcann_sim.so is missing: install cann_sim with pip")
endif()
message(STATUS "cann_sim: Ascend C kernels for ${SOC_VERSION} run simulated on this host")

function(ascendc_library target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "SHARED;STATIC" "" "")
  set(type SHARED)
  if(arg_STATIC)
    set(type STATIC)
  endif()
  set(headers "${CMAKE_BINARY_DIR}/include/${target}")
  set(wrappers)
  set(number 0)
  foreach(source IN LISTS arg_UNPARSED_ARGUMENTS)
    get_filename_component(path "${source}" ABSOLUTE)
    get_filename_component(stem "${source}" NAME_WE)
    set(wrapper "${CMAKE_CURRENT_BINARY_DIR}/${target}_launchers/${number}_${stem}.cpp")
    math(EXPR number "${number} + 1")
    set(depfile)
    if(CMAKE_VERSION VERSION_GREATER_EQUAL 3.20 OR CMAKE_GENERATOR STREQUAL "Ninja")
      set(depfile DEPFILE "${wrapper}.d")
    endif()
    # What ascendc_compile_definitions and its like add later reaches the scan too.
    set(definitions "$<TARGET_PROPERTY:${target},COMPILE_DEFINITIONS>")
    set(includes "$<TARGET_PROPERTY:${target},INCLUDE_DIRECTORIES>")
    add_custom_command(
      OUTPUT "${wrapper}"
      COMMAND
        "${Python3_EXECUTABLE}" "${CANN_SIM_CMAKE_DIR}/make_launchers.py" --source "${path}" --output "${wrapper}"
        --headers "${headers}" --depfile "${wrapper}.d" -- "${CMAKE_CXX_COMPILER}" ${CANN_SIM_COMPILE_FLAGS}
        "$<$<BOOL:${definitions}>:-D$<JOIN:${definitions},;-D>>" "$<$<BOOL:${includes}>:-I$<JOIN:${includes},;-I>>"
      DEPENDS "${path}" "${CANN_SIM_CMAKE_DIR}/make_launchers.py"
      ${depfile}
      COMMAND_EXPAND_LISTS VERBATIM
      COMMENT "Launchers of ${source}")
    list(APPEND wrappers "${wrapper}")
  endforeach()

  add_library(${target} ${type} ${wrappers})
  set_target_properties(${target} PROPERTIES CXX_STANDARD 17 CXX_STANDARD_REQUIRED ON INSTALL_RPATH_USE_LINK_PATH ON
                                             POSITION_INDEPENDENT_CODE ON)
  target_compile_options(${target} PRIVATE ${CANN_SIM_COMPILE_FLAGS})
  target_include_directories(${target} PRIVATE "${CANN_SIM_TOOLKIT}/include")
  target_include_directories(${target} INTERFACE "${headers}" "${CANN_SIM_TOOLKIT}/include")
  target_link_libraries(${target} PUBLIC "${CANN_SIM_TOOLKIT}/lib64/libcann_sim.so")
  install(TARGETS ${target} LIBRARY DESTINATION lib ARCHIVE DESTINATION lib)
  install(DIRECTORY "${headers}" DESTINATION include)
endfunction()

# The documented macros HAVE_WORKSPACE, HAVE_TILING and the like are for system workspaces that vector kernels do not
# have; they are passed on as definitions and change nothing else.
function(ascendc_compile_definitions target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "PRIVATE;PUBLIC;INTERFACE" "" "")
  target_compile_definitions(${target} PRIVATE ${arg_UNPARSED_ARGUMENTS})
endfunction()

function(ascendc_include_directories target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "PRIVATE;PUBLIC;INTERFACE" "" "")
  target_include_directories(${target} PRIVATE ${arg_UNPARSED_ARGUMENTS})
endfunction()

# Options of the device compiler that g++ does not know (those with a --cce prefix) are dropped; device and host are one
# compilation here, so -forward-options-to-host-compiler is a mere separator.
function(ascendc_compile_options target)
  cmake_parse_arguments(PARSE_ARGV 1 arg "PRIVATE;PUBLIC;INTERFACE" "" "")
  list(FILTER arg_UNPARSED_ARGUMENTS EXCLUDE REGEX "^(--cce|-forward-options-to-host-compiler)")
  target_compile_options(${target} PRIVATE ${arg_UNPARSED_ARGUMENTS})
endfunction()

function(ascendc_fatbin_library)
  message(FATAL_ERROR "cann_sim does not model ascendc_fatbin_library: use ascendc_library")
endfunction()
