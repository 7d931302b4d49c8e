/* SPDX-License-Identifier: Apache-2.0 */
/* SPDX-FileCopyrightText: The ascend_direct authors */
/*
 * needs_hardware.c owns the symbols that the libraries look up when they start and that nothing
 * but an NPU or its network card could answer. A call names itself on stderr and fails; none of
 * them pretends. Under host_shm, host_tcp and device_sdma none is called.
 */
#include "emulation.h"

#define NEEDS_HARDWARE(function)                                           \
    EXPORT int function(void) {                                            \
        say("%s() needs an NPU and is not emulated: it fails", #function); \
        return kNeedsHardware;                                             \
    }

/* libascendcl.so: notifications, contexts, memory shared through the device */
NEEDS_HARDWARE(aclrtStreamGetId)
NEEDS_HARDWARE(aclrtCreateNotify)
NEEDS_HARDWARE(aclrtGetNotifyId)
NEEDS_HARDWARE(aclrtDestroyNotify)
NEEDS_HARDWARE(aclrtWaitAndResetNotify)
NEEDS_HARDWARE(aclrtGetCurrentContext)
NEEDS_HARDWARE(aclrtSetStreamAttribute)
NEEDS_HARDWARE(rtSetIpcMemorySuperPodPid)
NEEDS_HARDWARE(rtIpcSetMemoryName)
NEEDS_HARDWARE(rtIpcDestroyMemoryName)
NEEDS_HARDWARE(rtIpcOpenMemory)
NEEDS_HARDWARE(rtIpcCloseMemory)

/* libascend_hal.so: memory of the older generations */
NEEDS_HARDWARE(halMemFree)
NEEDS_HARDWARE(drvNotifyIdAddrOffset)

/* libra.so and libtsdclient.so: the device's network card, device_rdma */
NEEDS_HARDWARE(RaInit)
NEEDS_HARDWARE(RaSocketInit)
NEEDS_HARDWARE(RaSocketDeinit)
NEEDS_HARDWARE(RaRdevInitV2)
NEEDS_HARDWARE(RaRdevGetHandle)
NEEDS_HARDWARE(RaSocketBatchConnect)
NEEDS_HARDWARE(RaSocketBatchClose)
NEEDS_HARDWARE(RaSocketListenStart)
NEEDS_HARDWARE(RaSocketListenStop)
NEEDS_HARDWARE(RaGetSockets)
NEEDS_HARDWARE(RaGetIfnum)
NEEDS_HARDWARE(RaGetIfaddrs)
NEEDS_HARDWARE(RaSocketWhiteListAdd)
NEEDS_HARDWARE(RaSocketWhiteListDel)
NEEDS_HARDWARE(RaQpCreate)
NEEDS_HARDWARE(RaQpCreateWithAttrs)
NEEDS_HARDWARE(RaAiQpCreate)
NEEDS_HARDWARE(RaQpDestroy)
NEEDS_HARDWARE(RaGetQpStatus)
NEEDS_HARDWARE(RaQpConnectAsync)
NEEDS_HARDWARE(RaRegisterMr)
NEEDS_HARDWARE(RaDeregisterMr)
NEEDS_HARDWARE(RaSendWr)
NEEDS_HARDWARE(RaSendWrV2)
NEEDS_HARDWARE(RaGetNotifyBaseAddr)
NEEDS_HARDWARE(RaGetNotifyMrInfo)
NEEDS_HARDWARE(RaSetQpAttrQos)
NEEDS_HARDWARE(TsdOpen)

/* libhcomm.so: collective communication */
NEEDS_HARDWARE(HcclCommInitClusterInfoMemConfig)
NEEDS_HARDWARE(HcclCommDestroy)
