// What CUDA kernels know of their threads' neurons: the dtype of their state and their constants.
#pragma once

#include "../launch/numbers.h"

template <typename Number>
struct StateOf { typedef float type; };
template <>
struct StateOf<double> { typedef double type; };
template <typename Number>
using State = typename StateOf<Number>::type;

// The constants of a thread's neurons: one set for all, or one for each.
template <typename Real, int VECTOR, bool PER_CHANNEL>
struct Constants {
  static constexpr int SETS = PER_CHANNEL ? VECTOR : 1;
  Real set[SETS][4];

  SEAL_INLINE Real tau(int i) const { return set[i % SETS][0]; }
  SEAL_INLINE Real inverse_tau(int i) const { return set[i % SETS][1]; }
  SEAL_INLINE Real decay(int i) const { return set[i % SETS][2]; }
  SEAL_INLINE Real threshold(int i) const { return set[i % SETS][3]; }

  SEAL_INLINE void in_memory(const Real* constants, int64_t channels, int64_t channel_stride, int64_t n) {
    int64_t channel = PER_CHANNEL ? n / channel_stride % channels : 0, place = PER_CHANNEL ? n % channel_stride : 0;
#pragma unroll
    for (int i = 0; i < SETS; ++i) {
#pragma unroll
      for (int name = 0; name < 4; ++name) set[i][name] = constants[name * channels + channel];
      if (++place < channel_stride) continue;
      place = 0;
      channel = channel + 1 < channels ? channel + 1 : 0;
    }
  }
};
