// Convolutions of spikes on the CPU: each spike adds a row of weights to its output pixel.
//
// The sum over input channels and taps is cut into chunks of kWords words of 64 channels, whose weights for kColumns
// output channels stay in the first-level cache while all pixels of a tile pass. The tile's sums stay in the
// second-level cache from chunk to chunk. The places of a word's bits are listed once a tile, and a pixel's list is
// that of its words at the chunk's taps, one after the other. Numbers are added in an order that neither tiles nor
// threads change.
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

// Pixels of a tile, and blocks of columns that share its lists: 256 pixels and 8 blocks were no faster. A tile reads so
// many input pixels at most that their lists stay in the second-level cache, or a row of outputs.
constexpr int64_t kTile = 512, kGroup = 4, kInputs = 2048;

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
        tile_rows(std::max<int64_t>(1, std::min({kTile / std::max<int64_t>(1, a.OW), kInputs * a.OH / (a.H * a.W),
                                                 rows * groups / threads}))),
        inputs(most_input_rows() * a.W),
        stream(!a.planes && streams<Number>(a.out, rows * a.OW, a.O) && kColumns * sizeof(Number) % 64 == 0),
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

  // The places of a word's set bits, lowest first.
  struct alignas(64) Places {
    uint8_t at[64];
  };

  // Input pixels of a tile are counted from its first row on; after the last there is one without spikes.
  struct Work {
    std::vector<Places> places[2];   // [inputs + 1] of words with an even number, and with an odd one
    std::vector<uint8_t> counts[2];  // of each, how many
    std::vector<int32_t> sources;    // [pixels, kWords]: which input pixel
    std::vector<uint8_t> lists;      // which rows of Weights are added: those of all pixels, one after the other
    std::vector<int32_t> ends;       // [pixels], of their lists
    std::vector<Columns> sums;       // [kGroup, pixels]
  };

  // Rows of the input, counted through all frames, that a tile reads.
  struct Range {
    int64_t first, last;
  };

  const SpikeConvArguments& a;
  const int threads;
  const int64_t words, taps, chunks, blocks, groups, rows, tile_rows, inputs;
  const bool stream;                         // whether out is written past the caches
  const std::unique_ptr<Weights[]> weights;  // [blocks, chunks]; left as it is where no spike leads to
  const BitTable bits;

  void prepare(Work& work) const {
    const int64_t pixels = tile_rows * a.OW;
    for (int i = 0; i < 2; ++i) work.places[i].resize(inputs + 1), work.counts[i].resize(inputs + 1);
    work.sources.resize(pixels * kWords);
    work.lists.resize(pixels * 64 * kWords + sizeof(Places));
    work.ends.resize(pixels);
    work.sums.resize(kGroup * pixels);
  }

  Range input_rows(int64_t first_row) const {
    const int64_t last_row = std::min(first_row + tile_rows, rows) - 1, reach = (a.KH - 1) * a.dilation_h;
    const int64_t first = first_row % a.OH * a.stride_h - a.padding_h;
    const int64_t last = last_row % a.OH * a.stride_h - a.padding_h;
    return {first_row / a.OH * a.H + std::clamp<int64_t>(first, 0, a.H - 1),
            last_row / a.OH * a.H + std::clamp<int64_t>(last + reach, 0, a.H - 1)};
  }

  int64_t most_input_rows() const {
    int64_t most = 0;
    for (int64_t row = 0; row < rows; row += tile_rows) {
      const Range range = input_rows(row);
      most = std::max(most, range.last - range.first + 1);
    }
    return most;
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
    const Range range = input_rows(first_row);
    int64_t located = 0;  // words
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t needed = std::min(words, (chunk * kWords + kWords - 1) / taps + 1);
      for (; located < needed; ++located) locate(located, range, work);
      find_sources(chunk, first_row, count, range, work);
      list(chunk, pixels, work);
      for (int64_t block = first_block; block < std::min(first_block + kGroup, blocks); ++block) {
        const int64_t column = block * kColumns, columns = columns_of(block);
        Columns* const sums = work.sums.data() + (block - first_block) * pixels;
        Columns bias = {};
        for (int64_t o = 0; a.bias && o < columns; ++o) {
          bias.at[o] = load(static_cast<const Number*>(a.bias)[column + o]);
        }
        add(weights[block * chunks + chunk].rows, pixels, chunk ? nullptr : &bias, sums, work);
        if (chunk < chunks - 1) continue;
        if (a.planes) {
          write_planes(sums, first_row, count, column, columns);
          continue;
        }
        Number* out = static_cast<Number*>(a.out) + first_row * a.OW * a.O + column;
        for (int64_t pixel = 0; pixel < pixels; ++pixel, out += a.O) write(sums[pixel].at, columns, out);
      }
    }
  }

  // By a table, as it takes no branch that spikes decide; compressing vectors of AVX-512 took three times as long.
  SEAL_NOINLINE void locate(int64_t word, Range range, Work& work) const {
    Places* const places = work.places[word % 2].data();
    uint8_t* const counts = work.counts[word % 2].data();
    const int64_t first = range.first * a.W, count = (range.last + 1) * a.W - first;
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t spikes = a.words[(first + i) * words + word];
      uint8_t room[sizeof(Places) + 8], *to = room;
      for (int byte = 0; byte < 8; ++byte) {
        const uint8_t set = uint8_t(spikes >> 8 * byte);
        const uint64_t found = bits.places[set] + 8 * byte * 0x0101010101010101u;
        std::memcpy(to, &found, 8);
        to += bits.count[set];
      }
      std::memcpy(places[i].at, room, sizeof(Places));
      counts[i] = uint8_t(to - room);
    }
    counts[inputs] = 0;
  }

  // Which input pixel meets each pixel of `count` rows of outputs at each of a chunk's taps.
  SEAL_NOINLINE void find_sources(int64_t chunk, int64_t first_row, int64_t count, Range range, Work& work) const {
    const int32_t none = int32_t(inputs);
    for (int64_t i = 0; i < kWords; ++i) {
      const int64_t term = chunk * kWords + i, tap = term % taps;
      const Tap v(a.H, a.OH, a.stride_h, a.padding_h, a.dilation_h, tap / a.KW);
      const Tap h(a.W, a.OW, a.stride_w, a.padding_w, a.dilation_w, tap % a.KW);
      int64_t p = first_row / a.OH, y = first_row % a.OH;
      int32_t* to = work.sources.data() + i;
      for (int64_t row = 0; row < count; ++row, to += a.OW * kWords) {
        const bool inside = term / taps < words && v.first <= y && y < v.last;
        const int64_t first = inside ? h.first : a.OW, last = inside ? h.last : a.OW;
        const int32_t start = int32_t((p * a.H + v.input(y) - range.first) * a.W + h.offset);
        int64_t x = 0;
        for (; x < first; ++x) to[x * kWords] = none;
        for (; x < last; ++x) to[x * kWords] = start + int32_t(x * h.stride);
        for (; x < a.OW; ++x) to[x * kWords] = none;
        if (++y == a.OH) y = 0, ++p;
      }
    }
  }

  SEAL_NOINLINE void list(int64_t chunk, int64_t pixels, Work& work) const {
    const Places* places[kWords];
    const uint8_t* counts[kWords];
    for (int64_t i = 0; i < kWords; ++i) {
      const int64_t word = (chunk * kWords + i) / taps % 2;
      places[i] = work.places[word].data(), counts[i] = work.counts[word].data();
    }
    const int32_t* sources = work.sources.data();
    uint8_t *const lists = work.lists.data(), *to = lists;
    int32_t* const ends = work.ends.data();
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      for (int i = 0; i < kWords; ++i) {
        const int64_t source = *sources++;
        const int count = counts[i][source];
        constexpr int kCopied = 32;  // at a time: more than half of the bits are rarely set
        for (int n = 0; n < count; n += kCopied) {
          uint64_t part[kCopied / 8];
          std::memcpy(part, places[i][source].at + n, sizeof part);
          for (uint64_t& eight : part) eight += 64 * i * 0x0101010101010101u;
          std::memcpy(to + n, part, sizeof part);
        }
        to += count;
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

  // A pixel's sums lie kColumns apart in planes: 16 pixels a time are a line of each plane.
  SEAL_NOINLINE void write_planes(const Columns* sums, int64_t first_row, int64_t count, int64_t column,
                                  int64_t columns) const {
    const int64_t plane = a.OH * a.OW;
    for (int64_t row = 0; row < count; ++row, sums += a.OW) {
      const int64_t p = (first_row + row) / a.OH, y = (first_row + row) % a.OH;
      Number* out = static_cast<Number*>(a.out) + (p * a.O + column) * plane + y * a.OW;
      for (int64_t first = 0; first < a.OW; first += 16) {
        const int64_t last = std::min(a.OW, first + 16);
        for (int64_t o = 0; o < columns; ++o) {
          for (int64_t x = first; x < last; ++x) store(out[o * plane + x], sums[x].at[o]);
        }
      }
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
