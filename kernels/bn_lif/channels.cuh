// How blocks go through rows of [outer, C, inner] numbers channel by channel, and what they sum up on the way.
//
// A thread takes VECTOR neighbouring numbers at a time, and always the same channels: SETS of them, which is VECTOR where
// inner is 1; else all neighbours are of one channel.
#pragma once

#include "../launch/access.cuh"

constexpr int THREADS = 128;  // of a block, as in cupy.py

// a b + c in one rounding where that is one instruction: for gradients and sums.
SEAL_FN float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
SEAL_FN double multiply_add(double a, double b, double c) { return a * b + c; }

// A thread's way: `columns` threads lie side by side along the channels, and the block's rows of threads, with those of
// all `slices` blocks that have these channels, along the rest.
template <int VECTOR, int SETS>
struct Walk {
  int column, row, rows;     // of threads
  int64_t channel, slice;    // the first channel
  int64_t position, n;       // among those of a channel, VECTOR / SETS numbers each; and in memory
  int64_t within, width;     // positions that lie in one stretch of inner numbers
  int64_t step, step_within, step_n, to_next;
  bool inside;               // false for threads that have no channel

  SEAL_INLINE Walk(int64_t channels, int64_t inner, int64_t columns, int64_t slices) {
    const int64_t tiles = (channels + SETS * columns - 1) / (SETS * columns);
    column = threadIdx.x % static_cast<int>(columns);
    row = threadIdx.x / static_cast<int>(columns);
    rows = THREADS / static_cast<int>(columns);
    slice = blockIdx.x / tiles;
    channel = (blockIdx.x % tiles * columns + column) * SETS;
    inside = row < rows && channel < channels;
    width = inner > 1 ? inner / VECTOR : 1;
    step = slices * rows;
    step_within = step % width;
    step_n = step / width * channels * inner + step_within * VECTOR;
    to_next = channels * inner - (inner > 1 ? inner : 0);
    position = slice * rows + row;
    within = position % width;
    n = position / width * channels * inner + channel * inner + within * VECTOR;
  }

  SEAL_INLINE void next() {
    position += step;
    within += step_within;
    n += step_n;
    if (within < width) return;
    within -= width;
    n += to_next;
  }
};

// `ROWS` numbers [ROWS, C] of each of a thread's channels.
template <typename Real, int SETS, int ROWS>
struct Table {
  Group<Real, SETS> row[ROWS];

  SEAL_INLINE void in_memory(const Real* from, int64_t channels, int64_t channel) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) row[i] = read<SETS>(from + i * channels + channel);
  }
};

template <typename Real, int SIZE>
struct Sums {
  Real at[SIZE];

  SEAL_INLINE void merge(const Sums& other) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) at[i] += other.at[i];
  }
};

// How many numbers, their mean, and the sum of their squared distances from it.
template <typename Real>
struct Moments {
  Real at[3];

  SEAL_INLINE void merge(const Moments& other) {
    const Real count = at[0] + other.at[0];
    const Real weight = count > 0 ? other.at[0] / count : 0, distance = other.at[1] - at[1];
    at[1] += distance * weight;
    at[2] += other.at[2] + distance * distance * (at[0] * weight);
    at[0] = count;
  }
};

// Merges what the threads of each column have, and writes it to the slice's place in partials [C, slices].
template <int VECTOR, int SETS, typename Part>
SEAL_FN void write_merged(
    const Walk<VECTOR, SETS>& walk, Part (&mine)[SETS], int64_t channels, int64_t columns, int64_t slices,
    Part* partials) {
  __shared__ Part board[THREADS * SETS];
  const int across = static_cast<int>(columns) * SETS;  // from one row to the next
  Part* place = board + walk.row * across + walk.column * SETS;
  if (walk.row < walk.rows) {
#pragma unroll
    for (int set = 0; set < SETS; ++set) place[set] = mine[set];
  }
  for (int left = walk.rows; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (walk.row + half < left) {
#pragma unroll
      for (int set = 0; set < SETS; ++set) {
        mine[set].merge(place[half * across + set]);
        place[set] = mine[set];
      }
    }
    left = half;
  }
  if (walk.row > 0 || !walk.inside) return;
#pragma unroll
  for (int set = 0; set < SETS; ++set) partials[(walk.channel + set) * slices + walk.slice] = mine[set];
}

// Merges a channel's partials in a block; its first thread has them all. Wide is Part in float64.
template <typename Wide, typename Part>
SEAL_FN Wide merged_slices(const Part* partials, int64_t slices) {
  constexpr int SIZE = sizeof(Wide) / sizeof(double);
  __shared__ Wide of_warp[THREADS / 32];
  Wide all = {};
#pragma unroll 4
  for (int64_t slice = threadIdx.x; slice < slices; slice += THREADS) {
    const Part part = partials[slice];
    Wide wide;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) wide.at[i] = part.at[i];
    all.merge(wide);
  }
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) {
    Wide other;
#pragma unroll
    for (int i = 0; i < SIZE; ++i) other.at[i] = __shfl_down_sync(0xffffffffu, all.at[i], lanes);
    all.merge(other);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = all;
  __syncthreads();
#pragma unroll
  for (int warp = 1; threadIdx.x == 0 && warp < THREADS / 32; ++warp) all.merge(of_warp[warp]);
  return all;
}
