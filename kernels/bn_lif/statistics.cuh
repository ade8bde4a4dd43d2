// Kernels of the batch norm alone: its rows of the table in norms.py, and the gradient that it passes on.
//
// A thread takes a group of positions at a time and asks for all of their numbers before it uses the first; while whole
// groups are left, without looking whether each of their positions exists.
#pragma once

#include "../neuron/constants.cuh"
#include "channels.cuh"

// Asks for what a thread will read when all blocks have finished, into the cache that they share.
template <typename T>
SEAL_FN void prefetch(const T* from) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

SEAL_FN float square_root(float x) { return __fsqrt_rn(x); }
SEAL_FN double square_root(double x) { return sqrt(x); }

// As torch.lerp, which has two formulas.
template <typename Real>
SEAL_FN Real between(Real from, Real to, Real weight) {
  const Real way = to - from;
  return magnitude_of(weight) < Real(0.5) ? from + weight * way : to - way * (1 - weight);
}

// Scale and shift of a channel, each operation rounded.
template <typename Real>
struct Line {
  Real inverse_std, scale, shift;

  SEAL_INLINE Line(Real mean, Real variance, Real weight, Real bias, Real eps) {
    inverse_std = 1 / square_root(variance + eps);
    scale = inverse_std * weight;
    shift = bias - mean * scale;
  }
};

// A norm's numbers by channel, and what norms.py makes of mean and variance. Pointers may be null: what they stand for
// is not there, or not asked for.
template <typename Real>
struct NormRows {
  const Real* weight;  // [C], as are all but batches and table
  const Real* bias;
  Real* running_mean;
  Real* running_var;
  int64_t* batches;    // one number, of how many batches the running statistics have seen; null: they are left alone
  Real* means;
  Real* variances;     // biased
  Real* table;         // [4 norms, C]
  int64_t channels, norms, index;
  Real momentum, correction, eps;
  Real factor, added, old_mean, old_variance;

  SEAL_INLINE void load(int64_t channel) {
    factor = weight ? weight[channel] : Real(1);
    added = bias ? bias[channel] : Real(0);
    old_mean = running_mean ? running_mean[channel] : Real(0);
    old_variance = running_var ? running_var[channel] : Real(0);
  }

  SEAL_INLINE void fetch(int64_t channel) const {
    const Real* const needed[] = {weight, bias, running_mean, running_var};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (needed[i]) prefetch(needed[i] + channel);
    }
  }

  SEAL_INLINE void take(int64_t channel, Real mean, Real variance) const {
    if (means) {
      means[channel] = mean;
      variances[channel] = variance;
    }
    if (batches) {
      running_mean[channel] = between(old_mean, mean, momentum);
      running_var[channel] = between(old_variance, variance * correction, momentum);
      if (channel == 0) ++*batches;
    }
    if (!table) return;
    const Line<Real> line(mean, variance, factor, added, eps);
    Real* const column = table + channel;
    column[2 * index * channels] = line.scale;
    column[(2 * index + 1) * channels] = line.shift;
    column[(2 * norms + index) * channels] = mean;
    column[(3 * norms + index) * channels] = line.inverse_std;
  }
};

// Of a tile's channels from `first` on, whose moments are those of distances from each channel's first number.
template <typename Real>
struct Statistics {
  const Real* origins;  // those first numbers
  int64_t first;
  NormRows<Real> rows;

  SEAL_INLINE void fetch(int column) const { rows.fetch(first + column); }
  SEAL_INLINE void take(int column, const Moments<double>& all) {
    const Real mean = static_cast<Real>(origins[column] + all.at[1]);
    rows.load(first + column);
    rows.take(first + column, mean, static_cast<Real>(all.at[2] / all.at[0]));
  }
};

// Mean and variance of each channel, and what follows from them. All numbers are taken from the channel's first one, so
// that a mean far from 0 costs no digits.
template <typename Number, int VECTOR, int SETS>
__global__ void __launch_bounds__(THREADS, SETS > 1 || sizeof(Number) > 4 ? 5 : 6) moments(
    const Number* __restrict__ y,              // [outer, C, inner]
    State<Number>* partials,                   // this and the next two are those of Meeting, of 3 numbers
    double* of_teams,
    int* counters,
    const State<Number>* __restrict__ weight,  // this and the next are those of NormRows
    const State<Number>* __restrict__ bias,
    State<Number>* __restrict__ running_mean,
    State<Number>* __restrict__ running_var,
    int64_t* __restrict__ batches,
    State<Number>* __restrict__ means,
    State<Number>* __restrict__ variances,
    State<Number>* __restrict__ table,
    int64_t channels,
    int64_t inner,
    int64_t positions,
    int64_t columns,
    int64_t slices,
    int64_t team,
    int64_t norms,
    int64_t index,                             // of this norm in the table
    State<Number> momentum,
    State<Number> correction,                  // of the running variance
    State<Number> eps) {
  typedef State<Number> Real;
  constexpr int EACH = VECTOR / SETS;       // numbers of a channel at a position
  constexpr int MANY = VECTOR > 4 ? 4 : 8;  // positions whose numbers are in flight
  Walk<VECTOR, SETS> walk(channels, inner, columns, slices);
  const Group<Number, SETS> origin = read<SETS>(y + (walk.inside ? walk.channel * inner : 0));
  Real count = 0;
  Moments<Real> mine[SETS] = {};
  const auto add = [&](const Group<Number, VECTOR> (&rows)[MANY], int there) {  // so many of the rows
    const Real more = there * EACH, inverse = 1 / more, weight = more / (count + more);
#pragma unroll
    for (int set = 0; set < SETS; ++set) {
      const Real from = load(origin.at[set]);
      Real sum = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < MANY * EACH; ++i) {
        if (i / EACH < there) sum += load(rows[i / EACH].at[set + i % EACH]) - from;
      }
      const Real mean = sum * inverse, distance = mean - mine[set].at[1];
#pragma unroll
      for (int i = 0; i < MANY * EACH; ++i) {
        const Real off = load(rows[i / EACH].at[set + i % EACH]) - from - mean;
        if (i / EACH < there) squares = multiply_add(off, off, squares);
      }
      mine[set].at[1] += distance * weight;
      mine[set].at[2] += squares + distance * distance * (count * weight);
    }
    count += more;
  };
  const int64_t whole = walk.inside ? positions - (MANY - 1) * walk.step : 0;
  while (walk.position < whole) {
    Group<Number, VECTOR> rows[MANY];
#pragma unroll
    for (int ahead = 0; ahead < MANY; ++ahead) {
      rows[ahead] = read<VECTOR>(y + walk.n);
      walk.next();
    }
    add(rows, MANY);
  }
  if (walk.inside && walk.position < positions) {
    Group<Number, VECTOR> rows[MANY] = {};
    int there = 0;
#pragma unroll
    for (int ahead = 0; ahead < MANY - 1; ++ahead) {
      if (walk.position < positions) rows[ahead] = read<VECTOR>(y + walk.n), ++there;
      walk.next();
    }
    add(rows, there);
  }
#pragma unroll
  for (int set = 0; set < SETS; ++set) mine[set].at[0] = count;
  const auto place = Place<SETS>::again(channels, columns);
  __shared__ Real origins[COLUMNS * SETS];
#pragma unroll
  for (int set = 0; place.row == 0 && set < SETS; ++set) origins[place.column * SETS + set] = load(origin.at[set]);
  const Statistics<Real> made = {
      origins, place.first,
      {weight, bias, running_mean, running_var, batches, means, variances, table, channels, norms, index, momentum,
       correction, eps}};
  const Meeting<Real> meeting = {partials, of_teams, counters, team};
  merge_blocks<Moments<double>>(place, mine, channels, columns, slices, meeting, made);
}

// The table's rows of a norm with fixed statistics, its running ones; a thread for each channel.
template <typename Real>
__global__ void __launch_bounds__(THREADS, 1) fill_table(
    const Real* __restrict__ weight,  // this and the next as in moments
    const Real* __restrict__ bias,
    Real* __restrict__ running_mean,
    Real* __restrict__ running_var,
    int64_t* __restrict__ batches,
    Real* __restrict__ table,
    int64_t channels,
    int64_t norms,
    int64_t index,
    Real momentum,
    Real correction,
    Real eps) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (channel >= channels) return;
  NormRows<Real> rows = {weight, bias, running_mean, running_var, batches, nullptr, nullptr, table, channels, norms,
                         index, momentum, correction, eps};
  rows.load(channel);
  rows.take(channel, rows.old_mean, rows.old_variance);
}

// out = c0 grad + c1 y + c2 by channel; without WITH_Y, c0 grad. out may be grad.
template <typename Number, int VECTOR, int SETS, bool WITH_Y>
__global__ void __launch_bounds__(THREADS, 1) normalised_gradient(
    const Number* grad,
    const Number* __restrict__ y,
    const State<Number>* __restrict__ coefficients,  // [3, C]
    Number* out,
    int64_t channels,
    int64_t inner,
    int64_t positions,
    int64_t columns,
    int64_t slices) {
  typedef State<Number> Real;
  constexpr int GROUPS = 4;
  Walk<VECTOR, SETS> walk(channels, inner, columns, slices);
  if (!walk.inside) return;
  Table<Real, SETS, 3> by;
  by.in_memory(coefficients, channels, walk.channel);
  const auto group = [&](bool whole) {  // of positions, all or some of which exist
    Group<Number, VECTOR> gradients[GROUPS] = {}, rows[GROUPS] = {};
    int64_t places[GROUPS];
    int there = 0;  // of these
#pragma unroll
    for (int ahead = 0; ahead < GROUPS; ++ahead) {
      places[ahead] = walk.n;
      if (whole || walk.position < positions) {
        gradients[ahead] = read<VECTOR>(grad + walk.n);
        if (WITH_Y) rows[ahead] = read<VECTOR>(y + walk.n);
        ++there;
      }
      walk.next();
    }
#pragma unroll
    for (int ahead = 0; ahead < GROUPS; ++ahead) {
      if (!whole && ahead >= there) break;
      Group<Number, VECTOR> result;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const int set = SETS > 1 ? i : 0;
        const Real scaled = by.row[0].at[set] * load(gradients[ahead].at[i]);
        const Real shifted = by.row[1].at[set] * load(rows[ahead].at[i]) + by.row[2].at[set];
        store(result.at[i], WITH_Y ? scaled + shifted : scaled);
      }
      write<true>(out + places[ahead], result);
    }
  };
  while (walk.position < positions - (GROUPS - 1) * walk.step) group(true);
  if (walk.position < positions) group(false);
}
