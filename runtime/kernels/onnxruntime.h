/* What the operators need of ONNX Runtime's C interface, and no more.
 *
 * Its table of functions only grows, so a function keeps its place: the places are those of the public header
 * (https://github.com/microsoft/onnxruntime/blob/main/include/onnxruntime/core/session/onnxruntime_c_api.h), counted
 * from 0. The layout of OrtCustomOp is that of version 16, whose kernels return a status.
 */
#ifndef KVX_ONNXRUNTIME_H
#define KVX_ONNXRUNTIME_H

#include <stddef.h>
#include <stdint.h>

#define API_VERSION 18 /* the first with KernelContext_ParallelFor is 17 */
#define OPERATOR_VERSION 16

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtShape OrtShape; /* OrtTensorTypeAndShapeInfo */
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtCustomOp OrtCustomOp;

enum { FAIL = 1, INVALID_ARGUMENT = 2 };              /* OrtErrorCode */
enum { FLOAT = 1, UINT8 = 2, INT8 = 3, INT32 = 6, INT64 = 7 }; /* ONNXTensorElementDataType */
enum { REQUIRED = 0, OPTIONAL = 1 };                  /* OrtCustomOpInputOutputCharacteristic */

typedef struct OrtApi {
    const void *functions[275];
} OrtApi;

typedef struct OrtApiBase {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
    const char *(*GetName)(const OrtCustomOp *);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *);
    int (*GetInputType)(const OrtCustomOp *, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp *);
    int (*GetOutputType)(const OrtCustomOp *, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *);
    void (*KernelCompute)(void *, OrtKernelContext *);
    void (*KernelDestroy)(void *);
    int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
    OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
};

/* The functions by their places. */
#define FUNCTION(place, result, ...) ((result(*)(__VA_ARGS__))api->functions[place])
#define CreateStatus FUNCTION(0, OrtStatus *, int, const char *)
#define CreateCustomOpDomain FUNCTION(26, OrtStatus *, const char *, OrtCustomOpDomain **)
#define CustomOpDomain_Add FUNCTION(27, OrtStatus *, OrtCustomOpDomain *, const OrtCustomOp *)
#define AddCustomOpDomain FUNCTION(28, OrtStatus *, OrtSessionOptions *, OrtCustomOpDomain *)
#define GetTensorMutableData FUNCTION(51, OrtStatus *, const OrtValue *, void **)
#define GetDimensionsCount FUNCTION(61, OrtStatus *, const OrtShape *, size_t *)
#define GetDimensions FUNCTION(62, OrtStatus *, const OrtShape *, int64_t *, size_t)
#define GetTensorTypeAndShape FUNCTION(65, OrtStatus *, const OrtValue *, OrtShape **)
#define KernelInfoGetAttribute_int64 FUNCTION(86, OrtStatus *, const OrtKernelInfo *, const char *, int64_t *)
#define KernelContext_GetInputCount FUNCTION(88, OrtStatus *, const OrtKernelContext *, size_t *)
#define KernelContext_GetInput FUNCTION(90, OrtStatus *, const OrtKernelContext *, size_t, const OrtValue **)
#define KernelContext_GetOutput \
    FUNCTION(91, OrtStatus *, OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **)
#define ReleaseStatus FUNCTION(93, void, OrtStatus *)
#define ReleaseTensorTypeAndShapeInfo FUNCTION(99, void, OrtShape *)
#define KernelContext_ParallelFor \
    FUNCTION(274, OrtStatus *, const OrtKernelContext *, void (*)(void *, size_t), size_t, size_t, void *)

#endif
