// The single-operator interface. It accepts descriptors, but executing an operator fails with an error that names it,
// because the simulator has no vendor kernels.
#include <cstdio>
#include <string>
#include <vector>

#include "acl/acl_op_compiler.h"
#include "calls.h"

using namespace cann_sim::acl;

struct aclDataBuffer {
  void* data;
  size_t bytes;
};

struct aclTensorDesc {
  aclDataType type;
  aclFormat format;
  std::vector<int64_t> dims;
  std::string name;
};

struct aclopAttr {};  // attributes are never read

namespace {

aclError refuse(const char* name) {
  return fail(ACL_ERROR_OP_NOT_FOUND,
              text("cann_sim has no kernel for the operator %s: it runs only your own kernels, and operators that the "
                   "host computes",
                   name));
}

}  // namespace

extern "C" {

aclDataBuffer* aclCreateDataBuffer(void* data, size_t bytes) {
  return new aclDataBuffer{data, bytes};
}

aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) {
  delete buffer;
  return ACL_SUCCESS;
}

aclTensorDesc* aclCreateTensorDesc(aclDataType type, int count, const int64_t* dims, aclFormat format) {
  return new aclTensorDesc{type, format, std::vector<int64_t>(dims, dims + count), ""};
}

void aclDestroyTensorDesc(const aclTensorDesc* desc) {
  delete desc;
}

aclDataType aclGetTensorDescType(const aclTensorDesc* desc) {
  return desc->type;
}

aclFormat aclGetTensorDescFormat(const aclTensorDesc* desc) {
  return desc->format;
}

size_t aclGetTensorDescNumDims(const aclTensorDesc* desc) {
  return desc->dims.size();
}

aclError aclGetTensorDescDimV2(const aclTensorDesc* desc, size_t index, int64_t* size) {
  if (index >= desc->dims.size()) {
    return fail(ACL_ERROR_INVALID_PARAM, text("dimension %zu of a tensor that has %zu", index, desc->dims.size()));
  }
  *size = desc->dims[index];
  return ACL_SUCCESS;
}

void aclSetTensorDescName(aclTensorDesc* desc, const char* name) {
  desc->name = name == nullptr ? "" : name;
}

aclError aclSetTensorFormat(aclTensorDesc* /*desc*/, aclFormat /*format*/) {
  return ACL_SUCCESS;
}

aclError aclSetTensorShape(aclTensorDesc* /*desc*/, int /*count*/, const int64_t* /*dims*/) {
  return ACL_SUCCESS;
}

aclError aclSetTensorPlaceMent(aclTensorDesc* /*desc*/, aclMemType /*type*/) {
  return ACL_SUCCESS;
}

aclopAttr* aclopCreateAttr() {
  return new aclopAttr;
}

void aclopDestroyAttr(const aclopAttr* attributes) {
  delete attributes;
}

aclError aclopSetAttrBool(aclopAttr* /*attributes*/, const char* /*name*/, uint8_t /*value*/) {
  return ACL_SUCCESS;
}

aclError aclopSetAttrInt(aclopAttr* /*attributes*/, const char* /*name*/, int64_t /*value*/) {
  return ACL_SUCCESS;
}

aclError aclopSetAttrFloat(aclopAttr* /*attributes*/, const char* /*name*/, float /*value*/) {
  return ACL_SUCCESS;
}

aclError aclopSetAttrString(aclopAttr* /*attributes*/, const char* /*name*/, const char* /*value*/) {
  return ACL_SUCCESS;
}

aclError aclopSetAttrDataType(aclopAttr* /*attributes*/, const char* /*name*/, aclDataType /*value*/) {
  return ACL_SUCCESS;
}

aclError aclopSetAttrListBool(aclopAttr* /*attributes*/, const char* /*name*/, int /*count*/,
                              const uint8_t* /*values*/) {
  return ACL_SUCCESS;
}

aclError aclopSetAttrListInt(aclopAttr* /*attributes*/, const char* /*name*/, int /*count*/,
                             const int64_t* /*values*/) {
  return ACL_SUCCESS;
}

aclError aclopSetAttrListFloat(aclopAttr* /*attributes*/, const char* /*name*/, int /*count*/,
                               const float* /*values*/) {
  return ACL_SUCCESS;
}

aclError aclopSetAttrListListInt(aclopAttr* /*attributes*/, const char* /*name*/, int /*count*/, const int* /*counts*/,
                                 const int64_t* const /*values*/[]) {
  return ACL_SUCCESS;
}

aclError aclopCompileAndExecute(const char* name, int /*inputs*/, const aclTensorDesc* const /*input_descs*/[],
                                const aclDataBuffer* const /*input_buffers*/[], int /*outputs*/,
                                const aclTensorDesc* const /*output_descs*/[],
                                aclDataBuffer* const /*output_buffers*/[], const aclopAttr* /*attributes*/,
                                aclopEngineType /*engine*/, aclopCompileType /*compile*/, const char* /*path*/,
                                aclrtStream /*stream*/) {
  CANN_SIM_API();
  return refuse(name);
}

aclError aclopCompileAndExecuteV2(const char* name, int /*inputs*/, aclTensorDesc* /*input_descs*/[],
                                  aclDataBuffer* /*input_buffers*/[], int /*outputs*/,
                                  aclTensorDesc* /*output_descs*/[], aclDataBuffer* /*output_buffers*/[],
                                  aclopAttr* /*attributes*/, aclopEngineType /*engine*/, aclopCompileType /*compile*/,
                                  const char* /*path*/, aclrtStream /*stream*/) {
  CANN_SIM_API();
  return refuse(name);
}

// Compiler options are accepted and ignored; all read as disabled.
aclError aclSetCompileopt(aclCompileOpt /*option*/, const char* /*value*/) {
  CANN_SIM_API();
  return ACL_SUCCESS;
}

size_t aclGetCompileoptSize(aclCompileOpt /*option*/) {
  return sizeof("disable");
}

aclError aclGetCompileopt(aclCompileOpt /*option*/, char* value, size_t room) {
  CANN_SIM_API();
  std::snprintf(value, room, "disable");
  return ACL_SUCCESS;
}

// Called by the generated stubs of unmodelled functions.
long cann_sim_acl_not_modelled(const char* name) {
  std::fprintf(stderr, "cann_sim: %s is not modelled\n", name);
  return fail(ACL_ERROR_API_NOT_SUPPORT, text("cann_sim does not model %s", name));
}

}  // extern "C"
