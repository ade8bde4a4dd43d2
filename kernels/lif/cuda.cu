// The multi-step LIF neuron in CUDA C++: neuron/steps.cuh has the loop over time. x is T rows of N numbers, each
// row dense in memory, whatever its shape.
#include "../neuron/steps.cuh"

constexpr int THREADS = 128;  // of a block, as in cupy.py

// The current of VECTOR neurons from n on is x itself.
template <typename Number, int VECTOR>
struct Rows {
  typedef Group<Number, VECTOR> Step;
  const Number* x;
  int64_t stride, n;

  template <bool ORDERED>
  SEAL_INLINE Step fetch(int64_t t) const { return read<VECTOR, ORDERED>(x + t * stride + n); }
  SEAL_INLINE State<Number> current(const Step& step, int i) const { return load(step.at[i]); }
};

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

  const Rows<Number, VECTOR> rows = {x, x_stride, n};
  steps_forward<Number, VECTOR, STEPS, LONG, CHARGE, SOFT, PACK>(
      rows, of, v, spikes, packed, nullptr, 0, T, N, n, inside, reset);
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
  const int64_t n = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * VECTOR;
  if (n >= N) return;
  Constants<Real, VECTOR, PER_CHANNEL> of = {{{tau, inverse_tau, decay, threshold}}};
  if (constants) of.in_memory(constants, channels, channel_stride, n);

  const Rows<Number, VECTOR> rows = {x, x_stride, n};
  Group<Real, VECTOR> c = row_or<VECTOR>(grad_v_last, n, Real(0));
  steps_backward<Number, VECTOR, STEPS, LONG, CHARGE, SOFT, DETACH, SURROGATE, PARAMETERS>(
      rows, of, v_init, c, grad_spikes, grad_stride, grad_x, grad_threshold, grad_inverse_tau, checkpoints, T, N, n,
      reset, alpha, [](const Group<Number, VECTOR>&, int, Real gradient) { return gradient; });
  if (grad_v_init) write<true>(grad_v_init + n, c);
}
