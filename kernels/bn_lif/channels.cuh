// How blocks go through rows of [outer, C, inner] numbers channel by channel, and what they sum up on the way.
//
// A thread takes VECTOR neighbouring numbers at a time, and always the same channels: SETS of them, which is VECTOR where
// inner is 1; else all neighbours are of one channel.
#pragma once

#include "../launch/access.cuh"

constexpr int THREADS = 128;  // of a block, as in cupy.py
constexpr int COLUMNS = 32;   // of these that lie side by side along the channels, at most, as in cupy.py

// Where a thread stands: `columns` threads lie side by side along the channels, and the block's rows of threads, with
// those of all `slices` blocks that have these channels, a tile of them, along the rest.
template <int SETS>
struct Place {
  int column, row, rows;   // of threads
  int tile, slice;
  int64_t first, channel;  // the first channel of the block, and of the thread
  bool inside;             // false for threads that have no channel

  SEAL_INLINE Place(int thread, int block, int64_t channels, int64_t columns) {
    const int tiles = static_cast<int>((channels + SETS * columns - 1) / (SETS * columns));
    column = thread % static_cast<int>(columns);
    row = thread / static_cast<int>(columns);
    rows = THREADS / static_cast<int>(columns);
    slice = block / tiles;
    tile = block % tiles;
    first = tile * columns * SETS;
    channel = first + column * SETS;
    inside = row < rows && channel < channels;
  }

  // Made once more, where the compiler would keep a first one in registers through the loop between.
  static SEAL_INLINE Place again(int64_t channels, int64_t columns) {
    int thread = threadIdx.x, block = blockIdx.x;
#ifdef __CUDA_ARCH__
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(block));
#endif
    return Place(thread, block, channels, columns);
  }
};

// A thread's way from there.
template <int VECTOR, int SETS>
struct Walk : Place<SETS> {
  int64_t position, n;       // among those of a channel, VECTOR / SETS numbers each; and in memory
  int64_t within, width;     // positions that lie in one stretch of inner numbers
  int step, step_within;
  int64_t step_n, to_next;
  using Place<SETS>::rows;
  using Place<SETS>::row;
  using Place<SETS>::slice;
  using Place<SETS>::channel;

  SEAL_INLINE Walk(int64_t channels, int64_t inner, int64_t columns, int64_t slices)
      : Place<SETS>(threadIdx.x, blockIdx.x, channels, columns) {
    width = inner > 1 ? inner / VECTOR : 1;
    step = static_cast<int>(slices) * rows;
    step_within = static_cast<int>(step % width);
    step_n = step / width * channels * inner + step_within * VECTOR;
    to_next = channels * inner - (inner > 1 ? inner : 0);
    position = static_cast<int64_t>(slice) * rows + row;
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

// Merges what the rows of threads have into what those of the first row have. `board` has room for all, `across` Parts
// from one row to the next.
template <int SETS, typename Part>
SEAL_FN void merge_rows(Part (&mine)[SETS], int column, int row, int rows, int across, Part* board) {
  Part* const own = board + row * across + column * SETS;
  if (row < rows) {
#pragma unroll
    for (int set = 0; set < SETS; ++set) own[set] = mine[set];
  }
  for (int left = rows; left > 1;) {
    const int half = (left + 1) / 2;
    __syncthreads();
    if (row + half < left) {
#pragma unroll
      for (int set = 0; set < SETS; ++set) {
        mine[set].merge(own[half * across + set]);
        own[set] = mine[set];
      }
    }
    left = half;
  }
}

// Whether this block is the last of so many that come to the counter, which is 0 again then. Its threads see what all
// threads of the others have stored before, if they read it past the first-level cache.
SEAL_FN bool comes_last(int* counter, int blocks) {
  __shared__ int last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(counter, 1) == blocks - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  if (!last) return false;
  __threadfence();
  return true;
}

// Where the blocks of a tile leave what they have summed up for the last of them: SIZE numbers of each channel, each of
// all the tile's channels side by side. Where all slices would be much for one block, the last block of each team of
// neighbouring slices merges these, and the last of all teams merges the teams.
template <typename Real>
struct Meeting {
  Real* partials;    // [tiles, slices, SIZE, across], across being columns SETS
  double* of_teams;  // [tiles, teams, SIZE, across]; not used where there is one team
  int* counters;     // [tiles, teams + 1], of each team's blocks, then of teams; 0 before and after
  int64_t team;      // slices of a team
};

// The Parts i, i + rows, … before `end` of a channel, all asked for before the first is used.
template <typename Real, typename Wide, int AHEAD>
SEAL_FN void load_parts(Wide (&parts)[AHEAD], const Real* of_channel, int i, int rows, int end, int across) {
  constexpr int SIZE = sizeof(Wide) / sizeof(double);
  Real numbers[AHEAD][SIZE];
#pragma unroll
  for (int ahead = 0; ahead < AHEAD; ++ahead) {
    const int at = min(i + ahead * rows, end - 1) * SIZE;
#pragma unroll
    for (int number = 0; number < SIZE; ++number) numbers[ahead][number] = __ldcg(of_channel + (at + number) * across);
  }
#pragma unroll
  for (int ahead = 0; ahead < AHEAD; ++ahead) {
#pragma unroll
    for (int number = 0; number < SIZE; ++number) parts[ahead].at[number] = numbers[ahead][number];
  }
}

// Merges what the threads of all blocks of a tile have, in Wide, which is Part in float64. `made` is what comes of it:
// for each of the tile's channels, a thread of the last block has it fetch what it needs, and take the sums.
template <typename Wide, int SETS, typename Part, typename Real, typename Made>
SEAL_FN void merge_blocks(
    const Place<SETS>& place, Part (&mine)[SETS], int64_t channels, int64_t columns, int64_t slices,
    const Meeting<Real>& meeting, Made made) {
  constexpr int SIZE = sizeof(Wide) / sizeof(double);
  constexpr int AHEAD = SETS > 1 ? 4 : 2;  // Parts that a thread asks for at once
  constexpr int BYTES = THREADS * (sizeof(Part) * SETS > sizeof(Wide) ? sizeof(Part) * SETS : sizeof(Wide));
  __shared__ double memory[BYTES / sizeof(double)];
  const int across = static_cast<int>(columns) * SETS;
  merge_rows(mine, place.column, place.row, place.rows, across, reinterpret_cast<Part*>(memory));
  Real* const partials = meeting.partials + place.tile * slices * (SIZE * across);
  if (place.row == 0 && place.inside) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      Group<Real, SETS> numbers;
#pragma unroll
      for (int set = 0; set < SETS; ++set) numbers.at[set] = mine[set].at[i];
      write<true>(partials + (place.slice * SIZE + i) * across + place.column * SETS, numbers);
    }
  }

  const int most = static_cast<int>(meeting.team), team = place.slice / most;
  const int teams = (static_cast<int>(slices) + most - 1) / most;
  int* const counters = meeting.counters + place.tile * (teams + 1);
  const Real* const of_slices = partials + team * most * (SIZE * across);
  double* const of_teams = meeting.of_teams + static_cast<int64_t>(place.tile) * teams * (SIZE * across);
  Wide* const board = reinterpret_cast<Wide*>(memory);
  const int here = static_cast<int>(channels - place.first < across ? channels - place.first : across);
  int count = min(most, static_cast<int>(slices) - team * most);
  bool all_slices = teams == 1, first = true;
  if (!comes_last(counters + team, count)) return;
#pragma unroll 1
  for (;;) {  // of slices, then of teams if there are several: one body for both needs fewer registers
    for (int begin = 0; begin < here; begin += THREADS) {
      const int width = min(here - begin, THREADS), rows = min(THREADS / width, count);
      const int column = threadIdx.x % width, row = threadIdx.x / width, channel = begin + column;
      if (row == 0 && all_slices) made.fetch(channel);
      Wide sum[1] = {};
      const int end = row < rows ? count : 0;
#pragma unroll 1
      for (int i = row; i < end; i += AHEAD * rows) {
        Wide parts[AHEAD];
        if (first) load_parts(parts, of_slices + channel, i, rows, end, across);
        else load_parts(parts, of_teams + channel, i, rows, end, across);
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ++ahead) {
          if (i + ahead * rows < end) sum[0].merge(parts[ahead]);
        }
      }
      merge_rows(sum, column, row, rows, width, board);
      if (row == 0 && all_slices) made.take(channel, sum[0]);
#pragma unroll
      for (int number = 0; row == 0 && !all_slices && number < SIZE; ++number) {
        of_teams[(team * SIZE + number) * across + channel] = sum[0].at[number];
      }
      __syncthreads();
    }
    if (all_slices || !comes_last(counters + teams, teams)) return;
    count = teams;
    all_slices = true;
    first = false;
  }
}
