// Settings that are accepted and ignored; the last error of a thread or device, which is always none.
#include "calls.h"
#include "hccl/hccl.h"

using namespace cann_sim::acl;

extern "C" {

aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode /*mode*/) {
  CANN_SIM_API();
  return ACL_SUCCESS;
}

aclError aclrtSetOpWaitTimeout(uint32_t /*seconds*/) {
  CANN_SIM_API();
  return ACL_SUCCESS;
}

aclError aclrtSetOpExecuteTimeOut(uint32_t /*seconds*/) {
  CANN_SIM_API();
  return ACL_SUCCESS;
}

aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual) {
  CANN_SIM_API();
  if (actual != nullptr) {
    *actual = timeout;
  }
  return ACL_SUCCESS;
}

aclError aclrtCtxSetSysParamOpt(aclSysParamOpt /*option*/, int64_t /*value*/) {
  CANN_SIM_API();
  return ACL_SUCCESS;
}

aclError aclrtSetSysParamOpt(aclSysParamOpt /*option*/, int64_t /*value*/) {
  CANN_SIM_API();
  return ACL_SUCCESS;
}

aclError aclrtGetSysParamOpt(aclSysParamOpt /*option*/, int64_t* value) {
  CANN_SIM_API();
  *value = 0;
  return ACL_SUCCESS;
}

// There are no collectives: asking for deterministic ones succeeds, choosing their hardware does not.
HcclResult HcclSetConfig(HcclConfig config, HcclConfigValue /*value*/) {
  if (const aclError code = api(__func__).enter(__func__); code != ACL_SUCCESS) {
    return static_cast<HcclResult>(code);
  }
  return config == HCCL_DETERMINISTIC ? HCCL_SUCCESS : HCCL_E_NOT_SUPPORT;
}

aclError aclrtGetLastError(aclrtLastErrLevel /*level*/) {
  CANN_SIM_API();
  return ACL_SUCCESS;
}

aclError aclrtPeekAtLastError(aclrtLastErrLevel /*level*/) {
  CANN_SIM_API();
  return ACL_SUCCESS;
}

}  // extern "C"
