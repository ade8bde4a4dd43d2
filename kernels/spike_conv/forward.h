// Convolutions of spikes on the CPU: each spike adds a row of weights to its output pixel.
//
// The sum over input channels and taps is cut into chunks of kWords words of 64 channels, whose weights for kColumns
// output channels stay in the first-level cache while all pixels of a tile pass. The tile's sums stay in the
// second-level cache from chunk to chunk. Numbers are added in an order that neither tiles nor threads change.
#pragma once

#include "../launch/pages.h"
#include "../launch/parallel.h"
#include "convolution.h"

#include <memory>
#include <vector>

namespace {  // of each instruction set's own code

// Sums of eight vectors at most fit into the registers of any instruction set, and hide the latency of additions. With
// AVX-512 at 15 to 50 % firing, 64 columns and two words (32 KB) were as fast as 32 columns or faster, faster than 48
// columns or one word, and faster than three words at 50 %.
constexpr int kLanes = VectorOf<float>::kLanes, kVectors = std::min(8, 64 / kLanes), kColumns = kVectors * kLanes;
constexpr int kWords = 2;

// Pixels of a tile, and blocks of columns that share its lists: 256 pixels and 8 blocks were no faster.
constexpr int64_t kTile = 512, kGroup = 4;

// Numbers of kColumns output channels: the weights of one input channel at one tap, or the sums of one pixel.
struct alignas(64) Columns {
  float at[kColumns];
};

struct Weights {
  Columns rows[64 * kWords];
};

// The places of a byte's set bits, lowest first, in eight bytes, and how many there are.
struct BitTable {
  uint64_t places[256];
  uint8_t count[256];

  BitTable() {
    for (int byte = 0; byte < 256; ++byte) {
      uint8_t found[8] = {};
      count[byte] = 0;
      for (int bit = 0; bit < 8; ++bit) {
        if (byte >> bit & 1) found[count[byte]++] = uint8_t(bit);
      }
      std::memcpy(&places[byte], found, 8);
    }
  }
};

template <typename Number>
class SpikeConv {
 public:
  explicit SpikeConv(const SpikeConvArguments& arguments)
      : a(arguments),
        threads(int(std::clamp<int64_t>(a.P * a.OH * a.OW * a.O / kGrain, 1, a.threads))),
        words((a.C + 63) / 64),
        taps(a.KH * a.KW),
        chunks((words * taps + kWords - 1) / kWords),
        blocks((a.O + kColumns - 1) / kColumns),
        groups((blocks + kGroup - 1) / kGroup),
        rows(a.P * a.OH),
        tile_rows(std::max<int64_t>(1, std::min(kTile / std::max<int64_t>(1, a.OW), rows * groups / threads))),
        stream(streams<Number>(a.out, rows * a.OW, a.O) && kColumns * sizeof(Number) % 64 == 0),
        weights(new Weights[blocks * chunks]) {}

  void run() const {
    prefer_large_pages(weights.get(), blocks * chunks * int64_t(sizeof(Weights)));
    prefer_large_pages(a.out, rows * a.OW * a.O * int64_t(sizeof(Number)));
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
    Memory memory;
#pragma omp parallel num_threads(threads)
    {
      Work work;
      const bool ready = memory.got([&] { prepare(work); });
#pragma omp for schedule(static)
      for (int64_t i = 0; i < blocks * words; ++i) pack(i / words, i % words);
#pragma omp for schedule(static)
      for (int64_t task = 0; task < groups * tiles; ++task) {
        if (ready) convolve_tile(task / tiles * kGroup, task % tiles * tile_rows, work);
      }
      finish_streams();
    }
    memory.check();
  }

 private:
  typedef Vector<float> V;

  struct Work {
    std::vector<uint64_t> spikes;  // [pixels, kWords]
    std::vector<uint8_t> lists;    // which rows of Weights are added: those of all pixels, one after the other
    std::vector<int32_t> ends;     // [pixels], of their lists
    std::vector<Columns> sums;     // [kGroup, pixels]
  };

  const SpikeConvArguments& a;
  const int threads;
  const int64_t words, taps, chunks, blocks, groups, rows, tile_rows;
  const bool stream;                         // whether out is written past the caches
  const std::unique_ptr<Weights[]> weights;  // [blocks, chunks]; left as it is where no spike leads to
  const BitTable bits;

  void prepare(Work& work) const {
    const int64_t pixels = tile_rows * a.OW;
    work.spikes.resize(pixels * kWords);
    work.lists.resize(pixels * 64 * kWords + 8);
    work.ends.resize(pixels);
    work.sums.resize(kGroup * pixels);
  }

  // Term t of the sum is word t / taps of the input at tap t % taps, and word t % kWords of chunk t / kWords.
  void pack(int64_t block, int64_t word) const {
    const int64_t columns = columns_of(block), channels = std::min<int64_t>(64, a.C - 64 * word);
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t term = word * taps + tap;
      Columns* to = weights[block * chunks + term / kWords].rows + term % kWords * 64;
      const Number* from = static_cast<const Number*>(a.weight) + block * kColumns * a.weight_o +
                           word * 64 * a.weight_c + tap / a.KW * a.weight_h + tap % a.KW * a.weight_w;
      if (columns < kColumns) std::memset(to, 0, 64 * sizeof(Columns));
      for (int64_t o = 0; o < columns; ++o) {
        for (int64_t c = 0; c < channels; ++c) to[c].at[o] = load(from[o * a.weight_o + c * a.weight_c]);
      }
    }
  }

  int64_t columns_of(int64_t block) const { return std::min<int64_t>(kColumns, a.O - block * kColumns); }

  void convolve_tile(int64_t first_block, int64_t first_row, Work& work) const {
    const int64_t count = std::min(tile_rows, rows - first_row), pixels = count * a.OW;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      gather(chunk, first_row, count, work.spikes.data());
      list(pixels, work);
      for (int64_t block = first_block; block < std::min(first_block + kGroup, blocks); ++block) {
        const int64_t column = block * kColumns, columns = columns_of(block);
        Columns* const sums = work.sums.data() + (block - first_block) * pixels;
        Columns bias = {};
        for (int64_t o = 0; a.bias && o < columns; ++o) {
          bias.at[o] = load(static_cast<const Number*>(a.bias)[column + o]);
        }
        add(weights[block * chunks + chunk].rows, pixels, chunk ? nullptr : &bias, sums, work);
        if (chunk < chunks - 1) continue;
        Number* out = static_cast<Number*>(a.out) + first_row * a.OW * a.O + column;
        for (int64_t pixel = 0; pixel < pixels; ++pixel, out += a.O) write(sums[pixel].at, columns, out);
      }
    }
  }

  // Reads a chunk's words for `count` rows of outputs; outside the input there are no spikes.
  SEAL_NOINLINE void gather(int64_t chunk, int64_t first_row, int64_t count, uint64_t* spikes) const {
    for (int64_t i = 0; i < kWords; ++i) {
      const int64_t term = chunk * kWords + i, word = term / taps, tap = term % taps;
      const Tap v(a.H, a.OH, a.stride_h, a.padding_h, a.dilation_h, tap / a.KW);
      const Tap h(a.W, a.OW, a.stride_w, a.padding_w, a.dilation_w, tap % a.KW);
      int64_t p = first_row / a.OH, y = first_row % a.OH;
      uint64_t* to = spikes + i;
      for (int64_t row = 0; row < count; ++row, to += a.OW * kWords) {
        const bool inside = word < words && v.first <= y && y < v.last;
        const int64_t first = inside ? h.first : a.OW, last = inside ? h.last : a.OW;
        const int64_t start = (p * a.H + v.input(y)) * a.W;
        int64_t x = 0;
        for (; x < first; ++x) to[x * kWords] = 0;
        for (; x < last; ++x) to[x * kWords] = a.words[(start + h.input(x)) * words + word];
        for (; x < a.OW; ++x) to[x * kWords] = 0;
        if (++y == a.OH) y = 0, ++p;
      }
    }
  }

  // By a table, as it takes no branch that spikes decide; compressing vectors of AVX-512 took three times as long.
  SEAL_NOINLINE void list(int64_t pixels, Work& work) const {
    const uint64_t* spikes = work.spikes.data();
    uint8_t *const lists = work.lists.data(), *to = lists;
    int32_t* const ends = work.ends.data();
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      for (int i = 0; i < kWords; ++i) {
        const uint64_t word = *spikes++;
        for (int byte = 0; byte < 8; ++byte) {
          const uint8_t set = uint8_t(word >> 8 * byte);
          const uint64_t found = bits.places[set] + (64 * i + 8 * byte) * 0x0101010101010101u;
          std::memcpy(to, &found, 8);
          to += bits.count[set];
        }
      }
      ends[pixel] = int32_t(to - lists);
    }
  }

  // Not inline, as GCC keeps the loop's counters in memory where it is inside of a larger function.
  SEAL_NOINLINE static void add(const Columns* rows, int64_t pixels, const Columns* bias, Columns* sums,
                                const Work& work) {
    const uint8_t *const lists = work.lists.data(), *from = lists;
    const int32_t* const ends = work.ends.data();
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      const uint8_t* const end = lists + ends[pixel];
      const float* start = bias ? bias->at : sums[pixel].at;
      V sum[kVectors];
      for (int v = 0; v < kVectors; ++v) sum[v] = load_vector(start + v * kLanes);
      for (; from < end; ++from) {
        const V* row = reinterpret_cast<const V*>(rows[*from].at);  // aligned, so that SSE adds from memory
        for (int v = 0; v < kVectors; ++v) sum[v] += row[v];
      }
      for (int v = 0; v < kVectors; ++v) store_vector(sums[pixel].at + v * kLanes, sum[v]);
    }
  }

  SEAL_INLINE void write(const float* sums, int64_t columns, Number* out) const {
    if (stream) {
      constexpr int kLine = 64 / sizeof(Number);
      for (int i = 0; i < columns; i += kLine) {
        alignas(64) Number line[kLine];
        for (int j = 0; j < kLine; j += kLanes) store_vector(line + j, load_vector(sums + i + j));
        stream_line(out + i, line);
      }
      return;
    }
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) store_vector(out + i, load_vector(sums + i));
    if (i < columns) store_part(out + i, columns - i, load_vector(sums + i));
  }
};

// out = the convolution of the spikes with weight, plus bias.
template <typename Number>
void convolve(const SpikeConvArguments& a) {
  SpikeConv<Number>(a).run();
}

}  // namespace
