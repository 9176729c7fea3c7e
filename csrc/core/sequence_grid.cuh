// Grids with a sequence of the packed batch for every z.
#pragma once

#include <cuda_runtime.h>

namespace unique_attn {

// launch(first, count) for the sequences first .. first + count - 1, all of them in turn: a grid has no more than 65,535
// thread blocks in z, and a packed batch may have more sequences.
template <typename Launch>
cudaError_t launch_sequences(int batch, const Launch& launch) {
  constexpr int kMostBlocks = 65535;
  for (int first = 0; first < batch; first += kMostBlocks) {
    launch(first, static_cast<unsigned>(batch - first < kMostBlocks ? batch - first : kMostBlocks));
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace unique_attn
