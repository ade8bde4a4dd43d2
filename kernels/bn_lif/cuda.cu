// Batch norm, residual and the multi-step LIF neuron in CUDA C++, in the layouts of tensors.py: rows of N numbers that
// are [outer, C, inner], inner being the channels' stride.
//
// forward and backward take VECTOR neighbouring neurons through all T steps in registers, as lif/cuda.cu does, and make
// the membrane input m there. Sums by channel are partial sums of blocks; the last block of the same channels adds them
// up, and makes what follows.
#include "../neuron/constants.cuh"
#include "../neuron/neuron.cuh"
#include "../surrogate/surrogate.cuh"
#include "channels.cuh"
#include "statistics.cuh"

enum ResidualKind { NONE, PLAIN, NORMALISED };

template <int RESIDUAL>
constexpr int SCALES = RESIDUAL == NORMALISED ? 4 : 2;
template <int RESIDUAL>
constexpr int SUMS = RESIDUAL == NORMALISED ? 3 : 2;

// In the order of tensors.py, each operation rounded.
template <int RESIDUAL, typename Real, int SETS>
SEAL_FN Real membrane_input(const Table<Real, SETS, SCALES<RESIDUAL>>& scales, int set, Real y, Real residual) {
  const Real normalised = y * scales.row[0].at[set] + scales.row[1].at[set];
  if (RESIDUAL == NONE) return normalised;
  if (RESIDUAL == PLAIN) return normalised + residual;
  constexpr int LAST = SCALES<RESIDUAL> - 1;
  return normalised + (residual * scales.row[LAST - 1].at[set] + scales.row[LAST].at[set]);
}

// A norm with fixed statistics; null pointers as in NormRows.
template <typename Real>
struct FixedNorm {
  const Real* weight;
  const Real* bias;
  const Real* mean;
  const Real* variance;
  Real eps;

  SEAL_INLINE Line<Real> of(int64_t channel) const {
    const Real factor = weight ? weight[channel] : Real(1), added = bias ? bias[channel] : Real(0);
    return Line<Real>(mean[channel], variance[channel], factor, added, eps);
  }
};

// FIXED: scales are made of the norms' fixed statistics, as fill_table makes them.
template <typename Number, int VECTOR, int SETS, int STEPS, bool LONG, int CHARGE, bool SOFT, bool PER_CHANNEL,
          int RESIDUAL, bool PACK, bool FIXED>
__global__ void __launch_bounds__(THREADS, 1) bn_lif_forward(
    const Number* __restrict__ y,                 // [T, N], rows y_stride apart
    const Number* __restrict__ residual,          // [T, N], or null where RESIDUAL is NONE
    const State<Number>* __restrict__ scales,     // [SCALES, C]; not used where FIXED, else the next eight are not
    const State<Number>* __restrict__ weight,
    const State<Number>* __restrict__ bias,
    const State<Number>* __restrict__ mean,
    const State<Number>* __restrict__ variance,
    const State<Number>* __restrict__ residual_weight,
    const State<Number>* __restrict__ residual_bias,
    const State<Number>* __restrict__ residual_mean,
    const State<Number>* __restrict__ residual_variance,
    Number* __restrict__ spikes,                  // [T, N]
    Number* __restrict__ m,                       // rows m_stride apart; or null: not asked for
    uint8_t* __restrict__ packed,                 // with PACK, [T, ceil(N/8)]: eight spikes to a byte
    const State<Number>* __restrict__ constants,  // [4, constant_channels]: τ, 1/τ, 1 - 1/τ, θ; or null: those below
    int64_t T,
    int64_t N,
    int64_t channels,
    int64_t inner,
    int64_t constant_channels,
    int64_t y_stride,                             // 0 where one row stands for all, as the next two
    int64_t residual_stride,
    int64_t m_stride,
    State<Number> eps,
    State<Number> residual_eps,
    State<Number> tau,
    State<Number> inverse_tau,
    State<Number> decay,
    State<Number> threshold,
    State<Number> reset) {
  typedef State<Number> Real;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * VECTOR;
  const bool inside = n < N;
  if (!PACK && !inside) return;  // threads beyond N lend a hand in packing
  Table<Real, SETS, SCALES<RESIDUAL>> table = {};
  Constants<Real, SETS, PER_CHANNEL> of = {{{tau, inverse_tau, decay, threshold}}};
  if (inside) {
    // 32 bits divide several times faster.
    const bool few = N >> 32 == 0;
    const int64_t channel = few ? static_cast<uint32_t>(n) / static_cast<uint32_t>(inner) %
                                      static_cast<uint32_t>(channels)
                                : n / inner % channels;
    if (!FIXED) {
      table.in_memory(scales, channels, channel);
    } else {
      const FixedNorm<Real> norms[] = {
          {weight, bias, mean, variance, eps},
          {residual_weight, residual_bias, residual_mean, residual_variance, residual_eps}};
#pragma unroll
      for (int row = 0; row < SCALES<RESIDUAL>; row += 2) {
#pragma unroll
        for (int set = 0; set < SETS; ++set) {
          const Line<Real> line = norms[row / 2].of(channel + set);
          table.row[row].at[set] = line.scale;
          table.row[row + 1].at[set] = line.shift;
        }
      }
    }
    if (constants) of.in_memory(constants, constant_channels, 1, PER_CHANNEL ? channel : 0);
  }
  Group<Real, VECTOR> v = row_or<VECTOR>(static_cast<const Real*>(nullptr), n, reset);

  const int64_t steps = LONG ? T : STEPS;
  for (int64_t first = 0; first < steps; first += STEPS) {
    Group<Number, VECTOR> rows[STEPS] = {}, added[RESIDUAL ? STEPS : 1] = {};
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      if (!inside || (LONG && first + t >= T)) break;
      rows[t] = read<VECTOR>(y + (first + t) * y_stride + n);
      if (RESIDUAL) added[RESIDUAL ? t : 0] = read<VECTOR>(residual + (first + t) * residual_stride + n);
    }
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      if (LONG && first + t >= T) break;
      Group<Number, VECTOR> fired, input;
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const int set = SETS > 1 ? i : 0;
        const Real other = RESIDUAL ? load(added[RESIDUAL ? t : 0].at[i]) : Real(0);
        const Real current = membrane_input<RESIDUAL>(table, set, load(rows[t].at[i]), other);
        const Real h = charge<CHARGE>(v.at[i], current, of.tau(set), of.inverse_tau(set), of.decay(set), reset);
        const Real spike = fire(h, of.threshold(set));
        v.at[i] = reset_potential<SOFT>(h, spike, of.threshold(set), reset);
        store(fired.at[i], spike);
        store(input.at[i], current);
        bits |= (inside && spike != 0 ? 1u : 0u) << i;
      }
      if (inside) write<true>(spikes + (first + t) * N + n, fired);
      if (inside && m && (m_stride || first + t == 0)) write<true>(m + (first + t) * m_stride + n, input);
      if (PACK) write_bits<VECTOR>(packed + (first + t) * ((N + 7) / 8), bits, n, inside);
    }
  }
}

// Sums by channel, and what norms.py makes of them, of a tile's channels from `first` on; each operation rounded.
template <typename Real, int NORMS>
struct NormGradients {
  const Real* norms;       // the table [4 NORMS, C]
  Real* sums;              // [NORMS + 1, C]
  Real* coefficients;      // [3 NORMS, C]
  Real* grad_norms;        // [2 NORMS, C]
  int64_t channels, first;
  int64_t count;           // elements per channel of the first norm; 0 where its statistics are fixed
  int64_t residual_count;  // of the second
  Real scale[NORMS], mean[NORMS], inverse_std[NORMS];

  SEAL_INLINE void fetch(int column) {
    const int64_t channel = first + column;
#pragma unroll
    for (int i = 0; i < NORMS; ++i) {
      scale[i] = norms[2 * i * channels + channel];
      mean[i] = norms[(2 * NORMS + i) * channels + channel];
      inverse_std[i] = norms[(3 * NORMS + i) * channels + channel];
    }
  }

  SEAL_INLINE void take(int column, const Sums<double, NORMS + 1>& all) const {
    const int64_t channel = first + column;
    const Real total = static_cast<Real>(all.at[0]);
    sums[channel] = total;
#pragma unroll
    for (int i = 0; i < NORMS; ++i) {
      const Real own = static_cast<Real>(all.at[1 + i]), negative = static_cast<Real>(-(i ? residual_count : count));
      const Real c1 = negative < 0 ? scale[i] * inverse_std[i] * (inverse_std[i] * own) / negative : Real(0);
      sums[(1 + i) * channels + channel] = own;
      coefficients[3 * i * channels + channel] = scale[i];
      coefficients[(3 * i + 1) * channels + channel] = c1;
      coefficients[(3 * i + 2) * channels + channel] =
          negative < 0 ? scale[i] * total / negative - c1 * mean[i] : Real(0);
      grad_norms[2 * i * channels + channel] = inverse_std[i] * own;
      grad_norms[(2 * i + 1) * channels + channel] = total;
    }
  }
};

// How many blocks of backward have registers on a multiprocessor, at least: three, where a thread holds so few numbers
// that none spills.
template <typename Number, int VECTOR, int STEPS, int RESIDUAL, bool CONSTANTS>
constexpr int RESIDENT =
    sizeof(State<Number>) == 4 && VECTOR * STEPS <= 20 && RESIDUAL != NORMALISED && !CONSTANTS ? 3 : 1;

template <typename Number, int VECTOR, int SETS, int STEPS, bool LONG, int CHARGE, bool SOFT, bool PER_CHANNEL,
          int RESIDUAL, bool DETACH, int SURROGATE, bool PARAMETERS, bool GRAD_M>
__global__ void __launch_bounds__(THREADS, (RESIDENT<Number, VECTOR, STEPS, RESIDUAL, PARAMETERS || PER_CHANNEL>))
bn_lif_backward(
    const Number* __restrict__ grad_spikes,        // [T, N]
    const Number* __restrict__ grad_m,             // with GRAD_M, rows m_stride apart; or one, the first step's
    const Number* __restrict__ y,                  // this and the next as in bn_lif_forward
    const Number* __restrict__ residual,
    const State<Number>* __restrict__ norms,       // the table [2 SCALES, C] of norms.py
    Number* __restrict__ grad_steps,               // [T, N], or null: not asked for
    Number* __restrict__ grad_total,               // [N], their sum over T, or null
    State<Number>* __restrict__ grad_threshold,    // with PARAMETERS, [N]: the sum over T of each neuron's part
    State<Number>* __restrict__ grad_inverse_tau,  // with PARAMETERS, [N]: the same for 1/τ
    State<Number>* partials,                       // this and the next two are those of Meeting, of SUMS numbers
    double* of_teams,
    int* counters,
    State<Number>* __restrict__ sums,              // this and the next two are those of NormGradients
    State<Number>* __restrict__ coefficients,
    State<Number>* __restrict__ grad_norms,
    State<Number>* checkpoints,                    // with LONG, [chunks - 1, N]: potentials between the chunks
    const State<Number>* __restrict__ constants,
    int64_t T,
    int64_t N,
    int64_t channels,
    int64_t inner,
    int64_t constant_channels,
    int64_t y_stride,
    int64_t residual_stride,
    int64_t m_stride,
    int64_t positions,                             // how often each channel occurs in a row, in steps of a thread
    int64_t columns,
    int64_t slices,
    int64_t team,
    int64_t count,
    int64_t residual_count,
    State<Number> tau,
    State<Number> inverse_tau,
    State<Number> decay,
    State<Number> threshold,
    State<Number> reset,
    State<Number> alpha) {
  typedef State<Number> Real;
  constexpr bool ORDERED = !LONG;  // else the chunks' addresses leave too few registers
  constexpr bool DECAY_INPUT = CHARGE == FILTER_DIVIDE || CHARGE == FILTER_MULTIPLY;
  constexpr int ADDED = RESIDUAL ? STEPS : 1, DIRECT = GRAD_M ? STEPS : 1;
  Walk<VECTOR, SETS> walk(channels, inner, columns, slices);
  Table<Real, SETS, SCALES<RESIDUAL>> table = {};
  Table<Real, SETS, SUMS<RESIDUAL> - 1> mean = {};
  Constants<Real, SETS, PER_CHANNEL> of = {{{tau, inverse_tau, decay, threshold}}};
  if (walk.inside) {
    table.in_memory(norms, channels, walk.channel);
    mean.in_memory(norms + SCALES<RESIDUAL> * channels, channels, walk.channel);
    if (constants) of.in_memory(constants, constant_channels, 1, PER_CHANNEL ? walk.channel : 0);
  }
  const auto charged = [&](int i, Real v, Number current, Number other) {
    const int set = SETS > 1 ? i : 0;
    const Real m = membrane_input<RESIDUAL>(table, set, load(current), RESIDUAL ? load(other) : Real(0));
    return charge<CHARGE>(v, m, of.tau(set), of.inverse_tau(set), of.decay(set), reset);
  };
  const auto after = [&](int i, Real h) {
    const Real level = of.threshold(SETS > 1 ? i : 0);
    return reset_potential<SOFT>(h, fire(h, level), level, reset);
  };

  const int64_t last = LONG ? (T - 1) / STEPS : 0;  // chunk
  Sums<Real, SUMS<RESIDUAL>> mine[SETS] = {};
  for (; walk.inside && walk.position < positions; walk.next()) {
    const int64_t n = walk.n;
    Group<Real, VECTOR> v = row_or<VECTOR>(static_cast<const Real*>(nullptr), n, reset);
    for (int64_t chunk = 0; chunk < last; ++chunk) {
      Group<Number, VECTOR> rows[STEPS], added[ADDED] = {};
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
        rows[t] = read<VECTOR>(y + (chunk * STEPS + t) * y_stride + n);
        if (RESIDUAL) added[RESIDUAL ? t : 0] = read<VECTOR>(residual + (chunk * STEPS + t) * residual_stride + n);
      }
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          v.at[i] = after(i, charged(i, v.at[i], rows[t].at[i], added[RESIDUAL ? t : 0].at[i]));
        }
      }
      write<true>(checkpoints + chunk * N + n, v);
    }

    Group<Real, VECTOR> c = {}, total = {}, threshold_sum = {}, inverse_tau_sum = {};  // c is ∂L/∂v_t
    Real with_y[VECTOR] = {}, with_residual[VECTOR] = {};
    for (int64_t chunk = last; chunk >= 0; --chunk) {
      if (LONG && chunk < last) {
        v = row_or<VECTOR>(chunk ? checkpoints + (chunk - 1) * N : static_cast<const Real*>(nullptr), n, reset);
      }
      const Group<Real, VECTOR> before = v;
      const int64_t first = chunk * STEPS;
      Group<Number, VECTOR> rows[STEPS], upstream[STEPS], added[ADDED] = {}, direct[DIRECT] = {};
      Real h[STEPS][VECTOR];
#pragma unroll
      for (int i = 0; i < STEPS; ++i) {
        const int t = ORDERED ? STEPS - 1 - i : i;
        if (LONG && first + t >= T) break;
        if (GRAD_M && (m_stride || first + t == 0)) {
          direct[GRAD_M ? t : 0] = read<VECTOR, ORDERED>(grad_m + (first + t) * m_stride + n);
        }
        upstream[t] = read<VECTOR, ORDERED>(grad_spikes + (first + t) * N + n);
        if (RESIDUAL) added[RESIDUAL ? t : 0] = read<VECTOR, ORDERED>(residual + (first + t) * residual_stride + n);
        rows[t] = read<VECTOR, ORDERED>(y + (first + t) * y_stride + n);
      }
#pragma unroll
      for (int t = 0; t < STEPS; ++t) {
        if (LONG && first + t >= T) break;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          h[t][i] = charged(i, v.at[i], rows[t].at[i], added[RESIDUAL ? t : 0].at[i]);
          v.at[i] = after(i, h[t][i]);
        }
      }
#pragma unroll
      for (int t = STEPS - 1; t >= 0; --t) {
        if (LONG && first + t >= T) continue;
        Group<Number, VECTOR> gradient;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          const int set = SETS > 1 ? i : 0;
          const Real level = of.threshold(set), spike = fire(h[t][i], level), a = load(upstream[t].at[i]);
          const Real current = load(rows[t].at[i]), other = RESIDUAL ? load(added[RESIDUAL ? t : 0].at[i]) : Real(0);
          const Real g = surrogate_derivative<SURROGATE>(h[t][i] - level, alpha);
          const Real slope = reset_slope<SOFT, DETACH>(h[t][i], spike, g, level, reset);
          const Real dh = multiply_add(a, g, c.at[i] * slope);
          if (PARAMETERS) {
            const Real of_level = reset_threshold_slope<SOFT, DETACH>(h[t][i], spike, g, level, reset);
            threshold_sum.at[i] += c.at[i] * of_level - a * g;
            const Real distance = (t ? after(i, h[t ? t - 1 : 0][i]) : before.at[i]) - reset;
            const Real m = DECAY_INPUT ? membrane_input<RESIDUAL>(table, set, current, other) : Real(0);
            inverse_tau_sum.at[i] += dh * (m - distance);
          }
          c.at[i] = dh * of.decay(set);
          Real dm = DECAY_INPUT ? dh * of.inverse_tau(set) : dh;
          if (GRAD_M) dm += load(direct[GRAD_M ? t : 0].at[i]);
          total.at[i] += dm;
          with_y[i] = multiply_add(dm, current - mean.row[0].at[set], with_y[i]);
          if (RESIDUAL == NORMALISED) {
            with_residual[i] = multiply_add(dm, other - mean.row[SUMS<RESIDUAL> - 2].at[set], with_residual[i]);
          }
          store(gradient.at[i], dm);
        }
        if (grad_steps) write<true>(grad_steps + (first + t) * N + n, gradient);
      }
    }
    Group<Number, VECTOR> sum;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const int set = SETS > 1 ? i : 0;
      store(sum.at[i], total.at[i]);
      mine[set].at[0] += total.at[i];
      mine[set].at[1] += with_y[i];
      if (RESIDUAL == NORMALISED) mine[set].at[SUMS<RESIDUAL> - 1] += with_residual[i];
    }
    if (grad_total) write<true>(grad_total + n, sum);
    if (PARAMETERS) {
      write<true>(grad_threshold + n, threshold_sum);
      write<true>(grad_inverse_tau + n, inverse_tau_sum);
    }
  }
  const auto place = Place<SETS>::again(channels, columns);
  const NormGradients<Real, SUMS<RESIDUAL> - 1> made = {
      norms, sums, coefficients, grad_norms, channels, place.first, count, residual_count};
  const Meeting<Real> meeting = {partials, of_teams, counters, team};
  merge_blocks<Sums<double, SUMS<RESIDUAL>>>(place, mine, channels, columns, slices, meeting, made);
}
