// Batch norm, residual and the multi-step LIF neuron in CUDA C++, in the layouts of tensors.py: rows of N numbers that
// are [outer, C, inner], inner being the channels' stride.
//
// neuron/steps.cuh has the loop over time, in which forward and backward make the membrane input m. Sums by channel are
// partial sums of blocks; the last block of the same channels adds them up, and makes what follows.
#include "../neuron/steps.cuh"
#include "channels.cuh"
#include "statistics.cuh"

enum ResidualKind { NONE, PLAIN, NORMALISED };

template <int RESIDUAL>
constexpr int SCALES = RESIDUAL == NORMALISED ? 4 : 2;
template <int RESIDUAL>
constexpr int SUMS = RESIDUAL == NORMALISED ? 3 : 2;

// The current of VECTOR neurons from n on is m; with GRAD_M, its own gradient is read with it, for backward.
template <typename Number, int VECTOR, int SETS, int RESIDUAL, bool GRAD_M = false>
struct MembraneInput {
  typedef State<Number> Real;
  struct Step { Group<Number, VECTOR> y, residual = {}, grad_m = {}; };
  const Number* y;
  const Number* residual;
  int64_t y_stride, residual_stride, n;
  const Table<Real, SETS, SCALES<RESIDUAL>>& scales;
  const Number* grad_m = nullptr;
  int64_t m_stride = 0;

  template <bool ORDERED>
  SEAL_INLINE Step fetch(int64_t t) const {
    Step step;
    if (GRAD_M && (m_stride || t == 0)) step.grad_m = read<VECTOR, ORDERED>(grad_m + t * m_stride + n);
    if (RESIDUAL) step.residual = read<VECTOR, ORDERED>(residual + t * residual_stride + n);
    step.y = read<VECTOR, ORDERED>(y + t * y_stride + n);
    return step;
  }

  // In the order of tensors.py, each operation rounded.
  SEAL_INLINE Real current(const Step& step, int i) const {
    const Real normalised = load(step.y.at[i]) * scales.row[0].at[i % SETS] + scales.row[1].at[i % SETS];
    if (RESIDUAL == NONE) return normalised;
    const Real other = load(step.residual.at[i]);
    if (RESIDUAL == PLAIN) return normalised + other;
    constexpr int LAST = SCALES<RESIDUAL> - 1;
    return normalised + (other * scales.row[LAST - 1].at[i % SETS] + scales.row[LAST].at[i % SETS]);
  }
};

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

  const MembraneInput<Number, VECTOR, SETS, RESIDUAL> input = {y, residual, y_stride, residual_stride, n, table};
  steps_forward<Number, VECTOR, STEPS, LONG, CHARGE, SOFT, PACK>(
      input, of, v, spikes, packed, m, m_stride, T, N, n, inside, reset);
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
  typedef MembraneInput<Number, VECTOR, SETS, RESIDUAL, GRAD_M> Input;
  Walk<VECTOR, SETS> walk(channels, inner, columns, slices);
  Table<Real, SETS, SCALES<RESIDUAL>> table = {};
  Table<Real, SETS, SUMS<RESIDUAL> - 1> mean = {};
  Constants<Real, SETS, PER_CHANNEL> of = {{{tau, inverse_tau, decay, threshold}}};
  if (walk.inside) {
    table.in_memory(norms, channels, walk.channel);
    mean.in_memory(norms + SCALES<RESIDUAL> * channels, channels, walk.channel);
    if (constants) of.in_memory(constants, constant_channels, 1, PER_CHANNEL ? walk.channel : 0);
  }
  Sums<Real, SUMS<RESIDUAL>> mine[SETS] = {};
  for (; walk.inside && walk.position < positions; walk.next()) {
    const int64_t n = walk.n;
    const Input input = {y, residual, y_stride, residual_stride, n, table, grad_m, m_stride};
    Group<Real, VECTOR> c = {};
    Sums<Real, SUMS<RESIDUAL>> own[VECTOR] = {};
    const auto take = [&](const typename Input::Step& step, int i, Real dm) {
      if (GRAD_M) dm += load(step.grad_m.at[i]);
      auto& sum = own[i].at;
      sum[0] += dm;
      sum[1] = multiply_add(dm, load(step.y.at[i]) - mean.row[0].at[i % SETS], sum[1]);
      if (RESIDUAL == NORMALISED) {
        constexpr int LAST = SUMS<RESIDUAL> - 1;
        sum[LAST] = multiply_add(dm, load(step.residual.at[i]) - mean.row[LAST - 1].at[i % SETS], sum[LAST]);
      }
      return dm;
    };
    steps_backward<Number, VECTOR, STEPS, LONG, CHARGE, SOFT, DETACH, SURROGATE, PARAMETERS>(
        input, of, nullptr, c, grad_spikes, N, grad_steps, grad_threshold, grad_inverse_tau, checkpoints, T, N, n,
        reset, alpha, take);
    Group<Number, VECTOR> total;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      mine[i % SETS].merge(own[i]);
      store(total.at[i], own[i].at[0]);
    }
    if (grad_total) write<true>(grad_total + n, total);
  }
  const auto place = Place<SETS>::again(channels, columns);
  const NormGradients<Real, SUMS<RESIDUAL> - 1> made = {
      norms, sums, coefficients, grad_norms, channels, place.first, count, residual_count};
  const Meeting<Real> meeting = {partials, of_teams, counters, team};
  merge_blocks<Sums<double, SUMS<RESIDUAL>>>(place, mine, channels, columns, slices, meeting, made);
}
