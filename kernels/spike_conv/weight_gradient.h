// The gradient of a convolution's weights where its inputs are spikes: for each tap and input channel the sum of the
// output's gradient over the pixels that it fired at.
//
// Output pixels are taken in tiles of 64, whose gradient lies in the first-level cache as float. A tile's spikes are
// transposed, so that a tap and an input channel have a word with a bit for each pixel. While its bits are gone
// through, the sums of up to 64 output channels stay in registers.
#pragma once

#include "../launch/bits.h"
#include "../launch/parallel.h"
#include "convolution.h"

#include <memory>
#include <vector>

namespace {  // of each instruction set's own code

template <typename Number>
class WeightGradient {
 public:
  explicit WeightGradient(const SpikeConvArguments& arguments)
      : a(arguments),
        pixels(a.P * a.OH * a.OW),
        taps(a.KH * a.KW),
        tiles((pixels + kTile - 1) / kTile),
        in_groups((a.C + kIn - 1) / kIn),
        groups(in_groups * ((a.O + kOuts - 1) / kOuts)),
        group_sums(std::min(kIn, a.C) * taps * std::min(kOuts, (a.O + kOut - 1) / kOut * kOut)) {
    for (int64_t kh = 0; kh < a.KH; ++kh) rows.emplace_back(a.H, a.OH, a.stride_h, a.padding_h, a.dilation_h, kh);
    for (int64_t kw = 0; kw < a.KW; ++kw) columns.emplace_back(a.W, a.OW, a.stride_w, a.padding_w, a.dilation_w, kw);
    // By the shape alone, so that the number of threads changes no bit of the result.
    chunks = groups ? std::clamp<int64_t>(kTasks / groups, 1, std::max<int64_t>(1, tiles / kLeast)) : 0;
  }

  void run() const {
    const int64_t tasks = groups * chunks, all_sums = tasks * group_sums;
    const int threads = int(std::clamp<int64_t>(std::min(tasks, pixels * a.C * a.O / kGrain), 1, a.threads));
    const std::unique_ptr<float[]> room(new float[all_sums + 64 / sizeof(float)]);  // each task clears its own
    float* const sums = room.get() + -reinterpret_cast<uintptr_t>(room.get()) % 64 / sizeof(float);
    Memory memory;
#pragma omp parallel num_threads(threads)
    {
      Work work;
      const bool ready = memory.got([&] {
        work.rows.resize(a.KH), work.columns.resize(a.KW);
        work.spikes.resize(taps * std::min(kIn, a.C) + kTile);
      });
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < tasks; ++task) {
        if (ready) add_up(task % groups, task / groups, work, sums + task * group_sums);
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < groups * taps; ++i) {
        if (ready) finish(i / taps, i % taps, sums + i / taps * group_sums);
      }
    }
    memory.check();
  }

 private:
  typedef Vector<float> V;
  static constexpr int kLanes = VectorOf<float>::kLanes;
  static constexpr int kTile = 64;  // pixels: the bits of a word
  static constexpr int64_t kOut = std::min(64, 8 * kLanes);  // output channels whose sums registers hold
  // Channels of a group. With 3x3 taps its sums (590 KB) stay in second-level caches of 1 MB. With 64 output channels
  // it takes a fifth longer at 5 %: the second kOut find spikes transposed and their branches known to the processor.
  static constexpr int64_t kIn = 128, kOuts = 128;
  static constexpr int64_t kTasks = 32;  // enough that 16 threads are kept busy
  static constexpr int64_t kLeast = 16;  // tiles that a chunk has at least, so that adding the chunks up takes little

  // What a thread keeps of a tile.
  struct Work {
    alignas(64) float gradient[kTile * kOut];
    int64_t inputs[kTile] = {};           // of pixel i at spread(i): the word of its input at offset 0
    std::vector<uint64_t> rows, columns;  // of each tap along an axis: a bit for each pixel that has its input inside
    std::vector<uint64_t> spikes;         // [taps, input channels]: a bit for each pixel
  };

  const SpikeConvArguments& a;
  const int64_t pixels, taps, tiles, in_groups, groups, group_sums;
  int64_t chunks;
  std::vector<Tap> rows, columns;

  int64_t first_in(int64_t group) const { return group % in_groups * kIn; }
  int64_t first_out(int64_t group) const { return group / in_groups * kOuts; }
  int64_t ins(int64_t group) const { return std::min(kIn, a.C - first_in(group)); }
  int64_t outs(int64_t group) const { return std::min(kOuts, a.O - first_out(group)); }

  // The sums [taps, input channels, kOut] of each kOut of a group's output channels, over a chunk of the tiles.
  void add_up(int64_t group, int64_t chunk, Work& work, float* sums) const {
    std::fill(sums, sums + group_sums, 0.0f);
    for (int64_t tile = tiles * chunk / chunks; tile < tiles * (chunk + 1) / chunks; ++tile) {
      const int64_t first = tile * kTile, count = std::min<int64_t>(kTile, pixels - first);
      locate(first, count, work);
      gather(group, work);
      for (int64_t out = 0; out < outs(group); out += kOut) {
        const int64_t rest = outs(group) - out, spikes = taps * ins(group);
        load(static_cast<const Number*>(a.grad_out) + first * a.O + first_out(group) + out, count, rest, work);
        if (2 * rest <= kOut) add_spikes<(kOut / kLanes + 1) / 2>(work, spikes, sums + out * spikes);
        else add_spikes<kOut / kLanes>(work, spikes, sums + out * spikes);
      }
    }
  }

  void load(const Number* from, int64_t count, int64_t outs, Work& work) const {
    for (int64_t i = 0; i < count; ++i, from += a.O) {
      for (int64_t out = 0; out < kOut; out += kLanes) {
        const int64_t rest = outs - out;
        const V value = rest >= kLanes ? load_vector(from + out) : rest > 0 ? load_part(from + out, rest) : V{};
        store_vector(work.gradient + i * kOut + out, value);
      }
    }
  }

  void locate(int64_t first, int64_t count, Work& work) const {
    const int64_t words = (a.C + 63) / 64;
    std::fill(work.rows.begin(), work.rows.end(), 0);
    std::fill(work.columns.begin(), work.columns.end(), 0);
    for (int64_t i = 0, length; i < count; i += length) {  // for each run of pixels in a row
      const int64_t x = (first + i) % a.OW, row = (first + i) / a.OW, y = row % a.OH, frame = row / a.OH;
      length = std::min(count - i, a.OW - x);
      for (int64_t k = 0; k < length; ++k) {
        work.inputs[spread(i + k)] = ((frame * a.H + y * a.stride_h) * a.W + (x + k) * a.stride_w) * words;
      }
      for (int64_t kh = 0; kh < a.KH; ++kh) work.rows[kh] |= inside(rows[kh], y, 1) * lowest(length) << i;
      for (int64_t kw = 0; kw < a.KW; ++kw) work.columns[kw] |= inside(columns[kw], x, length) << i;
    }
  }

  static uint64_t lowest(int64_t count) { return count ? ~uint64_t(0) >> (64 - count) : 0; }

  // A bit for each of `count` outputs from `first` on: whether its input is inside.
  static uint64_t inside(const Tap& tap, int64_t first, int64_t count) {
    const int64_t begin = std::clamp<int64_t>(tap.first - first, 0, count);
    return lowest(std::clamp<int64_t>(tap.last - first, begin, count)) & ~lowest(begin);
  }

  void gather(int64_t group, Work& work) const {
    const int64_t words = (a.C + 63) / 64, last = (a.P * a.H * a.W - 1) * words;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Tap &row = rows[tap / a.KW], &column = columns[tap % a.KW];
      const int64_t offset = (row.offset * a.W + column.offset) * words;
      const uint64_t kept = work.rows[tap / a.KW] & work.columns[tap % a.KW];
      for (int64_t in = 0; in < ins(group); in += 64) {
        const uint64_t* from = a.words + (first_in(group) + in) / 64;
        alignas(64) uint64_t gathered[kTile], transposed[kTile];
        for (int i = 0; i < kTile; ++i) gathered[i] = from[std::clamp<int64_t>(work.inputs[i] + offset, 0, last)];
        transpose_spread(gathered, transposed);
        uint64_t* to = work.spikes.data() + tap * ins(group) + in;  // the next tap overwrites what exceeds `ins`
        for (int i = 0; i < kTile; ++i) to[i] = transposed[i] & kept;
      }
    }
  }

  template <int VECTORS>
  void add_spikes(const Work& work, int64_t count, float* sums) const {
    for (int64_t i = 0; i < count; ++i, sums += kOut) {
      uint64_t word = work.spikes[i];
      if (word == 0) continue;
      V sum[VECTORS];
      for (int v = 0; v < VECTORS; ++v) sum[v] = load_vector(sums + v * kLanes);
      for (; word; word &= word - 1) {
        const float* row = work.gradient + lowest_bit(word) * kOut;
        for (int v = 0; v < VECTORS; ++v) sum[v] = sum[v] + load_vector(row + v * kLanes);
      }
      for (int v = 0; v < VECTORS; ++v) store_vector(sums + v * kLanes, sum[v]);
    }
  }

  // Adds up the chunks' sums of a tap, in their order, and writes them as weights.
  void finish(int64_t group, int64_t tap, float* sums) const {
    for (int64_t out = 0; out < outs(group); out += kOut) {
      float* at = sums + (out * taps + tap * kOut) * ins(group);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const float* more = at + chunk * groups * group_sums;
        for (int64_t i = 0; i < ins(group) * kOut; ++i) at[i] += more[i];
      }
      // By few input channels, as sums that lie kOut apart share few lines of the first-level cache.
      for (int64_t in = 0; in < ins(group); in += 32) {
        Number* to = static_cast<Number*>(a.grad_weight) + (first_out(group) + out) * a.weight_o +
                     (first_in(group) + in) * a.weight_c + tap / a.KW * a.weight_h + tap % a.KW * a.weight_w;
        const int64_t count = std::min<int64_t>(32, ins(group) - in);
        for (int64_t j = 0; j < std::min(kOut, outs(group) - out); ++j, to += a.weight_o) {
          for (int64_t i = 0; i < count; ++i) store(to[i * a.weight_c], at[(in + i) * kOut + j]);
        }
      }
    }
  }
};

template <typename Number>
void weight_gradient(const SpikeConvArguments& a) { WeightGradient<Number>(a).run(); }

}  // namespace
