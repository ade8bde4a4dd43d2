// Numbers by channel for native CPU code: number n of a tensor has channel n / stride % channels.
#pragma once

#include "vector.h"

namespace {  // of each instruction set's own code

struct Channels {
  int64_t channels, stride;

  // Each number's own of `values` [channels], for the block from `start`.
  template <typename State>
  void fill(const State* values, int64_t start, Block<State>& block) const {
    each_run(start, kBlock, [&](int64_t channel, int64_t n, int64_t length) {
      if (stride == 1) {
        std::memcpy(block.at + n, values + channel, length * sizeof(State));
      } else {
        std::fill(block.at + n, block.at + n + length, values[channel]);
      }
    });
  }

  // Adds the first `count` numbers of the block from `start` to `sums` [channels].
  template <typename State>
  void add(const Block<State>& block, int64_t start, int64_t count, double* sums) const {
    each_run(start, count, [&](int64_t channel, int64_t n, int64_t length) {
      if (stride == 1) {
        for (int64_t i = 0; i < length; ++i) sums[channel + i] += double(block.at[n + i]);
      } else {
        sums[channel] += sum(block.at + n, length);
      }
    });
  }

 private:
  // Calls action(channel, n, length) for numbers that follow each other from the block's n-th on: those of one channel
  // or, where each number has another, those of the channels from `channel` on.
  template <typename Action>
  SEAL_INLINE void each_run(int64_t start, int64_t count, Action action) const {
    int64_t channel = start / stride % channels;
    int64_t length = stride == 1 ? channels - channel : stride - start % stride;
    for (int64_t n = 0; n < count;) {
      length = std::min(length, count - n);
      action(channel, n, length);
      n += length;
      channel = stride == 1 || channel + 1 == channels ? 0 : channel + 1;
      length = stride == 1 ? channels : stride;
    }
  }

  template <typename State>
  static double sum(const State* from, int64_t length) {
    constexpr int64_t kLanes = VectorOf<State>::kLanes;
    Vector<State> lanes = {};
    int64_t i = 0;
    for (; i + kLanes <= length; i += kLanes) lanes += load_vector(from + i);
    double total = sum_of_lanes<State>(lanes);
    for (; i < length; ++i) total += double(from[i]);
    return total;
  }
};

}  // namespace
