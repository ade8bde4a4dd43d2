// The type of the loss's gradient between the forward and the backward pass, and the kernels of the latter.
#pragma once
#include "sums.cuh"

constexpr int SCALE_THREADS = 256;  // as in cupy.py

// As gradient_dtype in reference.py, which says why.
template <typename Number>
struct GradientOf { typedef Number type; };
template <>
struct GradientOf<float16> { typedef float type; };

template <int VECTOR, typename From, typename To>
SEAL_FN void multiply(const From* from, To* to, float by, int64_t size) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * SCALE_THREADS * VECTOR;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * SCALE_THREADS + threadIdx.x) * VECTOR; i < size; i += stride) {
    const Group<float, VECTOR> numbers = floats<VECTOR>(from + i);
    Group<To, VECTOR> scaled;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) store(scaled.at[j], numbers.at[j] * by);
    write(to + i, scaled);
  }
}

// grad *= factor, without a write where that is 1.
template <typename Number, int VECTOR>
__global__ void __launch_bounds__(SCALE_THREADS) scale(
    Number* __restrict__ grad,          // [size]
    const float* __restrict__ factor,   // one number
    int64_t size) {                     // a multiple of VECTOR
  const float by = *factor;
  if (by != 1.0f) multiply<VECTOR>(grad, grad, by, size);
}

// scaled = grad · factor, rounded once.
template <typename Number, int VECTOR>
__global__ void __launch_bounds__(SCALE_THREADS) narrow(
    const float* __restrict__ grad,     // [size]
    Number* __restrict__ scaled,        // [size]
    const float* __restrict__ factor,   // one number
    int64_t size) {                     // a multiple of VECTOR
  multiply<VECTOR>(grad, scaled, *factor, size);
}
