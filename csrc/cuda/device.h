// What a kernel file includes: CUDA, or in tests the header that runs kernels on the CPU (tests/cuda/emulation.h).
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pcm {

constexpr const char* kDeviceType = "cuda";

inline void check(const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// kernel<<<grid, threads, 0, stream>>>(arguments...), which only nvcc understands.
template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), dim3 grid, unsigned threads, void* stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  check(what, cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace pcm

#else
#include "emulation.h"
#endif
