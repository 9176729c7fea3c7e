// The two CUDA types that launcher declarations need, without the CUDA headers: host-only builds include this too.
#pragma once

#if defined(UNIQUE_ATTN_WITH_CUDA) || defined(__CUDACC__)
#include <driver_types.h>
#else
enum cudaError : int;
using cudaError_t = cudaError;
struct CUstream_st;
using cudaStream_t = CUstream_st*;
#endif
