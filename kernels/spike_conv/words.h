// Packed spikes as the words that convolutions read: 64 channels of a pixel in each.
#pragma once

#include "../launch/bits.h"
#include "../launch/export.h"
#include "../launch/parallel.h"

SEAL_STRUCT(SpikeWordsArguments,
  const uint8_t* packed;            // [ceil(P pixels C / 8)]: bits in the order in which spikes lie in memory
  uint64_t* words;                  // [P, pixels, ceil(C/64)]
  int64_t P, pixels, C;             // frames, and pixels of a frame
  int32_t channels_last, threads;   // whether the channels of a pixel lie together, or the pixels of a channel
)

namespace {  // of each instruction set's own code

// What is at hand of 64 words, for each of `count` pixels from `pixel` on and the channels from `channel` on.
inline void words_of_pixels(const SpikeWordsArguments& a, int64_t frame, int64_t pixel, int64_t count, int64_t channel,
                            uint64_t (&words)[64]) {
  const int64_t bytes = (a.P * a.pixels * a.C + 7) / 8, channels = std::min<int64_t>(64, a.C - channel);
  if (a.channels_last) {
    const int64_t first = (frame * a.pixels + pixel) * a.C + channel;
    for (int64_t i = 0; i < count; ++i) words[i] = bits_from(a.packed, bytes, first + i * a.C, channels);
    return;
  }
  const int64_t first = (frame * a.C + channel) * a.pixels + pixel;
  uint64_t of_channels[64];
  for (int64_t i = 0; i < 64; ++i) {
    of_channels[spread(i)] = i < channels ? bits_from(a.packed, bytes, first + i * a.pixels, count) : 0;
  }
  transpose_spread(of_channels, words);
}

inline void spike_words(const SpikeWordsArguments& a) {
  const int64_t columns = (a.C + 63) / 64, blocks = (a.pixels + 63) / 64;
  const int threads = a.P * a.pixels * columns > kGrain / 64 ? a.threads : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < a.P * blocks; ++block) {
    const int64_t frame = block / blocks, pixel = block % blocks * 64, count = std::min<int64_t>(64, a.pixels - pixel);
    for (int64_t column = 0; column < columns; ++column) {
      uint64_t words[64];
      words_of_pixels(a, frame, pixel, count, 64 * column, words);
      uint64_t* to = a.words + (frame * a.pixels + pixel) * columns + column;
      for (int64_t i = 0; i < count; ++i) to[i * columns] = words[i];
    }
  }
}

}  // namespace
