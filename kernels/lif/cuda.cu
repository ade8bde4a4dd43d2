// The multi-step LIF neuron in CUDA C++. x is T rows of N numbers, each row dense in memory, whatever its shape.
//
// A thread takes VECTOR neighbouring neurons through all T steps in registers: forward reads x once and writes the
// spikes; backward reads x and the spikes' gradient once, goes through the steps again, then back, and writes x's.
// All loads of up to STEPS steps are issued before the first is used. Where T is more (LONG), steps go in chunks of
// STEPS, and backward keeps the potentials between chunks in memory.
#include "../launch/access.cuh"
#include "../surrogate/surrogate.cuh"
#include "../neuron/constants.cuh"
#include "../neuron/neuron.cuh"

constexpr int THREADS = 128;  // of a block, as in cupy.py

template <typename Number, int VECTOR, int STEPS, bool LONG, int CHARGE, bool SOFT, bool PER_CHANNEL, bool PACK>
__global__ void __launch_bounds__(THREADS, 1) lif_forward(
    const Number* __restrict__ x,                   // [T, N], rows x_stride apart
    const State<Number>* __restrict__ v_init,       // [N], or null: `reset`
    Number* __restrict__ spikes,                    // [T, N]
    State<Number>* __restrict__ v_last,             // [N], or null: not asked for
    uint8_t* __restrict__ packed,                   // with PACK, [T, ceil(N/8)]: eight spikes to a byte
    const State<Number>* __restrict__ constants,    // [4, channels]: τ, 1/τ, 1 - 1/τ, θ; or null: the numbers below
    int64_t T,
    int64_t N,
    int64_t channels,
    int64_t channel_stride,                         // neuron n is of channel n / channel_stride % channels
    int64_t x_stride,                               // 0 where one row stands for all
    State<Number> tau,
    State<Number> inverse_tau,
    State<Number> decay,
    State<Number> threshold,
    State<Number> reset) {
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * VECTOR;
  const bool inside = n < N;
  if (!PACK && !inside) return;  // threads beyond N lend a hand in packing
  Constants<State<Number>, VECTOR, PER_CHANNEL> of = {{{tau, inverse_tau, decay, threshold}}};
  if (inside && constants) of.in_memory(constants, channels, channel_stride, n);
  Group<State<Number>, VECTOR> v = row_or<VECTOR>(inside ? v_init : nullptr, n, reset);

  const int64_t steps = LONG ? T : STEPS;
  for (int64_t first = 0; first < steps; first += STEPS) {
    Group<Number, VECTOR> rows[STEPS] = {};
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      if (inside && (!LONG || first + t < T)) rows[t] = read<VECTOR>(x + (first + t) * x_stride + n);
    }
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      if (LONG && first + t >= T) break;
      Group<Number, VECTOR> fired;
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const State<Number> current = load(rows[t].at[i]);
        const State<Number> h = charge<CHARGE>(v.at[i], current, of.tau(i), of.inverse_tau(i), of.decay(i), reset);
        const State<Number> spike = fire(h, of.threshold(i));
        v.at[i] = reset_potential<SOFT>(h, spike, of.threshold(i), reset);
        store(fired.at[i], spike);
        bits |= (inside && spike != 0 ? 1u : 0u) << i;
      }
      if (inside) write<true>(spikes + (first + t) * N + n, fired);
      if (PACK) write_bits<VECTOR>(packed + (first + t) * ((N + 7) / 8), bits, n, inside);
    }
  }
  if (inside && v_last) write<true>(v_last + n, v);
}

template <typename Number, int VECTOR, int STEPS, bool LONG, int CHARGE, bool SOFT, bool PER_CHANNEL, bool DETACH,
          int SURROGATE, bool PARAMETERS>
__global__ void __launch_bounds__(THREADS, 1) lif_backward(
    const Number* __restrict__ grad_spikes,         // [T, N], rows grad_stride apart
    const State<Number>* __restrict__ grad_v_last,  // [N], or null: 0
    const Number* __restrict__ x,                   // [T, N], rows x_stride apart
    const State<Number>* __restrict__ v_init,       // [N], or null: `reset`
    Number* __restrict__ grad_x,                    // [T, N]
    State<Number>* __restrict__ grad_v_init,        // [N], or null: not asked for
    State<Number>* __restrict__ grad_threshold,     // with PARAMETERS, [N]: the sum over T of each neuron's part
    State<Number>* __restrict__ grad_inverse_tau,   // with PARAMETERS, [N]: the same for 1/τ
    State<Number>* checkpoints,                     // with LONG, [chunks - 1, N]: potentials between the chunks
    const State<Number>* __restrict__ constants,    // this and the next as in lif_forward
    int64_t T,
    int64_t N,
    int64_t channels,
    int64_t channel_stride,
    int64_t x_stride,
    int64_t grad_stride,
    State<Number> tau,
    State<Number> inverse_tau,
    State<Number> decay,
    State<Number> threshold,
    State<Number> reset,
    State<Number> alpha) {
  typedef State<Number> Real;
  constexpr bool ORDERED = !LONG;  // else the chunks' addresses leave too few registers
  constexpr bool DECAY_INPUT = CHARGE == FILTER_DIVIDE || CHARGE == FILTER_MULTIPLY;
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * VECTOR;
  if (n >= N) return;
  Constants<Real, VECTOR, PER_CHANNEL> of = {{{tau, inverse_tau, decay, threshold}}};
  if (constants) of.in_memory(constants, channels, channel_stride, n);

  const auto charged = [&](int i, Real v, Number current) {
    return charge<CHARGE>(v, load(current), of.tau(i), of.inverse_tau(i), of.decay(i), reset);
  };
  const auto after = [&](int i, Real h) {
    return reset_potential<SOFT>(h, fire(h, of.threshold(i)), of.threshold(i), reset);
  };

  Group<Real, VECTOR> v = row_or<VECTOR>(v_init, n, reset);
  const int64_t last = LONG ? (T - 1) / STEPS : 0;  // chunk
  for (int64_t chunk = 0; chunk < last; ++chunk) {
    Group<Number, VECTOR> rows[STEPS];
#pragma unroll
    for (int t = 0; t < STEPS; ++t) rows[t] = read<VECTOR>(x + (chunk * STEPS + t) * x_stride + n);
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) v.at[i] = after(i, charged(i, v.at[i], rows[t].at[i]));
    }
    write<true>(checkpoints + chunk * N + n, v);
  }

  Group<Real, VECTOR> c = row_or<VECTOR>(grad_v_last, n, Real(0));  // ∂L/∂v_t
  Group<Real, VECTOR> threshold_sum = {}, inverse_tau_sum = {};
  for (int64_t chunk = last; chunk >= 0; --chunk) {
    if (LONG && chunk < last) {
      v = chunk ? read<VECTOR>(checkpoints + (chunk - 1) * N + n) : row_or<VECTOR>(v_init, n, reset);
    }
    const Group<Real, VECTOR> before = v;
    const int64_t first = chunk * STEPS;
    Group<Number, VECTOR> rows[STEPS], upstream[STEPS];
    Real h[STEPS][VECTOR];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int t = ORDERED ? STEPS - 1 - i : i;
      if (LONG && first + t >= T) break;
      upstream[t] = read<VECTOR, ORDERED>(grad_spikes + (first + t) * grad_stride + n);
      rows[t] = read<VECTOR, ORDERED>(x + (first + t) * x_stride + n);
    }
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      if (LONG && first + t >= T) break;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        h[t][i] = charged(i, v.at[i], rows[t].at[i]);
        v.at[i] = after(i, h[t][i]);
      }
    }
#pragma unroll
    for (int t = STEPS - 1; t >= 0; --t) {
      if (LONG && first + t >= T) continue;
      Group<Number, VECTOR> gradient;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const Real spike = fire(h[t][i], of.threshold(i)), a = load(upstream[t].at[i]);
        const Real g = surrogate_derivative<SURROGATE>(h[t][i] - of.threshold(i), alpha);
        const Real dh = a * g + c.at[i] * reset_slope<SOFT, DETACH>(h[t][i], spike, g, of.threshold(i), reset);
        if (PARAMETERS) {
          const Real slope = reset_threshold_slope<SOFT, DETACH>(h[t][i], spike, g, of.threshold(i), reset);
          threshold_sum.at[i] += c.at[i] * slope - a * g;
          const Real distance = (t ? after(i, h[t ? t - 1 : 0][i]) : before.at[i]) - reset;
          inverse_tau_sum.at[i] += dh * (DECAY_INPUT ? load(rows[t].at[i]) - distance : -distance);
        }
        c.at[i] = dh * of.decay(i);
        store(gradient.at[i], DECAY_INPUT ? dh * of.inverse_tau(i) : dh);
      }
      write<true>(grad_x + (first + t) * N + n, gradient);
    }
  }
  if (grad_v_init) write<true>(grad_v_init + n, c);
  if (PARAMETERS) {
    write<true>(grad_threshold + n, threshold_sum);
    write<true>(grad_inverse_tau + n, inverse_tau_sum);
  }
}
