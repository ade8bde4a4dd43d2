// Packed spikes back to numbers in CUDA C++.
//
// A thread writes VECTOR neighbouring numbers of a row at once, ACCESSES times; bytes are read before the first is used.
#include "../launch/access.cuh"

constexpr int THREADS = 128;  // of a block, as in cupy.py
constexpr int ACCESSES = 4;   // of a thread, as in cupy.py

template <typename Number, int VECTOR>
__global__ void __launch_bounds__(THREADS, 1) unpack(
    const uint8_t* __restrict__ packed,  // [T, ceil(N/8)]
    Number* __restrict__ spikes,         // [T, N]
    int64_t N) {
  constexpr int TOGETHER = THREADS * VECTOR, BLOCK = ACCESSES * TOGETHER;
  const unsigned blocks = static_cast<unsigned>((N + BLOCK - 1) / BLOCK);  // of a row
  const int64_t t = blockIdx.x / blocks;
  const int64_t begin = static_cast<int64_t>(blockIdx.x % blocks) * BLOCK + threadIdx.x * VECTOR;
  packed += t * ((N + 7) / 8);
  spikes += t * N;
  uint32_t bits[ACCESSES];
#pragma unroll
  for (int i = 0; i < ACCESSES; ++i) {
    const int64_t n = begin + i * TOGETHER;
    bits[i] = n < N ? packed[n / 8] >> (n % 8) : 0;
  }
  Number one;
  store(one, 1);
#pragma unroll
  for (int i = 0; i < ACCESSES; ++i) {
    const int64_t n = begin + i * TOGETHER;
    if (n >= N) return;
    Group<Number, VECTOR> fired;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) fired.at[j] = bits[i] >> j & 1 ? one : Number{};
    write<true>(spikes + n, fired);
  }
}
