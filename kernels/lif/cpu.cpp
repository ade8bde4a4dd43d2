// The multi-step LIF neuron on the CPU. x is T rows of N numbers, each row dense in memory, whatever its shape.
//
// A thread takes a block of a few vectors of neurons through all T steps in registers: forward reads x once and writes
// the spikes, backward reads x and the spikes' gradient and writes x's, with the T potentials before the reset in the
// first-level cache. Compiled once for each instruction set in ISA (setup.py).
#include "../launch/export.h"
#include "../launch/vector.h"
#include "../surrogate/surrogate.cuh"
#include "neuron.cuh"

#include <vector>

// As in cpu.py. Null pointers stand for what is absent or not asked for.
struct LifArguments {
  const void *x, *v_init;                   // [T, N], [N] in the state's type
  void *spikes, *v_last;                    // [T, N], [N] in the state's type
  uint8_t* packed;                          // [T, ceil(N/8)]
  const void *grad_spikes, *grad_v_last;    // [T, N], [N] in the state's type
  void *grad_x, *grad_v_init;               // [T, N], [N] in the state's type
  void *grad_threshold, *grad_inverse_tau;  // [N] in the state's type: the sum over T of each neuron's part
  const void* constants;                    // [4, channels] in the state's type: τ, 1/τ, 1 - 1/τ and threshold
  int64_t T, N, x_stride, grad_stride;      // strides of x and grad_spikes along T, in elements; 0 repeats one row
  int64_t channels, channel_stride;
  double reset, alpha;
  int32_t dtype, charge, soft, detach, decay_input, surrogate, threads;
};

namespace {

// Rows together larger than this do not stay in the caches of common processors until the next layer reads them.
constexpr int64_t kCached = int64_t(16) << 20;

// Below this many neuron-steps a second thread costs more than it saves.
constexpr int64_t kGrain = 1 << 14;

enum Constant { TAU, INVERSE_TAU, DECAY_FACTOR, THRESHOLD };

template <typename State, typename Number>
class Lif {
 public:
  typedef Vector<State> V;
  typedef Block<State> B;

  explicit Lif(const LifArguments& arguments) : a(arguments), reset(State(a.reset)), alpha(State(a.alpha)) {
    const Number* written = static_cast<const Number*>(a.grad_x ? a.grad_x : a.spikes);
    const bool aligned = reinterpret_cast<uintptr_t>(written) % 64 == 0 && a.N * sizeof(Number) % 64 == 0;
    stream = aligned && a.T * a.N * int64_t(sizeof(Number)) > kCached;
  }

  void forward() const {
    each_block([this](int64_t start, int64_t count, const B* constants, B*) {
      a.soft ? forward_block<true>(start, count, constants) : forward_block<false>(start, count, constants);
    });
  }

  void backward() const {
    each_block([this](int64_t start, int64_t count, const B* constants, B* h) {
      if (a.soft) {
        a.detach ? backward_block<true, true>(start, count, constants, h)
                 : backward_block<true, false>(start, count, constants, h);
      } else {
        a.detach ? backward_block<false, true>(start, count, constants, h)
                 : backward_block<false, false>(start, count, constants, h);
      }
    });
  }

 private:
  const LifArguments& a;
  const State reset, alpha;
  bool stream;  // whether rows are written past the cache

  // Calls action(start, count, constants[4], scratch[T]) for each block, each thread taking one run of neighbours.
  template <typename Action>
  void each_block(Action action) const {
    const int64_t blocks = (a.N + B::kSize - 1) / B::kSize;
    const int threads = int(std::clamp<int64_t>(a.T * a.N / kGrain, 1, a.threads));
#pragma omp parallel num_threads(threads)
    {
      std::vector<B> scratch(a.T);
      B constants[4];
      const State* values = static_cast<const State*>(a.constants);
      for (int i = 0; i < 4; ++i) constants[i] = filled(values[i * a.channels]);
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * B::kSize;
        if (a.channels > 1) fill_constants(constants, start);
        action(start, std::min<int64_t>(B::kSize, a.N - start), constants, scratch.data());
      }
      finish_streams();
    }
  }

  void fill_constants(B* constants, int64_t start) const {
    const State* values = static_cast<const State*>(a.constants);
    int64_t channel = start / a.channel_stride % a.channels, left = a.channel_stride - start % a.channel_stride;
    if (left >= B::kSize) {
      for (int i = 0; i < 4; ++i) constants[i] = filled(values[i * a.channels + channel]);
      return;
    }
    State rows[4][B::kSize];
    for (int lane = 0; lane < B::kSize; ++lane, --left) {
      if (left == 0) left = a.channel_stride, channel = channel + 1 == a.channels ? 0 : channel + 1;
      for (int i = 0; i < 4; ++i) rows[i][lane] = values[i * a.channels + channel];
    }
    for (int i = 0; i < 4; ++i) constants[i] = load_block<State>(rows[i], B::kSize);
  }

  B start_at_rest(int64_t start, int64_t count) const {
    return a.v_init ? load_block<State>(static_cast<const State*>(a.v_init) + start, count) : filled(reset);
  }

  B x_block(int64_t t, int64_t start, int64_t count) const {
    return load_block<State>(static_cast<const Number*>(a.x) + t * a.x_stride + start, count);
  }

  void store_state(void* to, const B& block, int64_t start, int64_t count) const {
    if (to) store_block(static_cast<State*>(to) + start, block, count, false);
  }

  template <int KIND>
  static SEAL_INLINE B charge_as(const B& v, const B& x, const B* constants, State reset) {
    B h;
    SEAL_EACH_PART(i) {
      h.part[i] = charge<KIND>(v.part[i], x.part[i], constants[TAU].part[i], constants[INVERSE_TAU].part[i],
                               constants[DECAY_FACTOR].part[i], reset);
    }
    return h;
  }

  SEAL_INLINE B charged(const B& v, const B& x, const B* constants) const {
    switch (a.charge) {
      case DECAY: return charge_as<DECAY>(v, x, constants, reset);
      case LEAK_DIVIDE: return charge_as<LEAK_DIVIDE>(v, x, constants, reset);
      case LEAK_MULTIPLY: return charge_as<LEAK_MULTIPLY>(v, x, constants, reset);
      case FILTER_DIVIDE: return charge_as<FILTER_DIVIDE>(v, x, constants, reset);
      default: return charge_as<FILTER_MULTIPLY>(v, x, constants, reset);
    }
  }

  SEAL_INLINE B fired(const B& h, const B* constants) const {
    B spikes;
    SEAL_EACH_PART(i) spikes.part[i] = fire(h.part[i], constants[THRESHOLD].part[i]);
    return spikes;
  }

  template <bool SOFT>
  SEAL_INLINE B after_reset(const B& h, const B& spikes, const B* constants) const {
    B v;
    SEAL_EACH_PART(i) {
      v.part[i] = reset_potential<SOFT>(h.part[i], spikes.part[i], constants[THRESHOLD].part[i], reset);
    }
    return v;
  }

  template <bool SOFT>
  SEAL_INLINE void forward_block(int64_t start, int64_t count, const B* constants) const {
    B v = start_at_rest(start, count);
    for (int64_t t = 0; t < a.T; ++t) {
      const B h = charged(v, x_block(t, start, count), constants);
      const B spikes = fired(h, constants);
      store_block(static_cast<Number*>(a.spikes) + t * a.N + start, spikes, count, stream);
      if (a.packed) pack_block(a.packed + t * ((a.N + 7) / 8) + start / 8, spikes, count);
      v = after_reset<SOFT>(h, spikes, constants);
    }
    store_state(a.v_last, v, start, count);
  }

  template <bool SOFT, bool DETACH>
  SEAL_INLINE void backward_block(int64_t start, int64_t count, const B* constants, B* h) const {
    B v = start_at_rest(start, count);
    for (int64_t t = 0; t < a.T; ++t) {
      h[t] = charged(v, x_block(t, start, count), constants);
      v = after_reset<SOFT>(h[t], fired(h[t], constants), constants);
    }
    B c = a.grad_v_last ? load_block<State>(static_cast<const State*>(a.grad_v_last) + start, count) : B{};
    B threshold_sum = {}, inverse_tau_sum = {};
    for (int64_t t = a.T - 1; t >= 0; --t) {
      const B upstream = load_block<State>(static_cast<const Number*>(a.grad_spikes) + t * a.grad_stride + start, count);
      const B g = derivative(h[t], constants), spikes = fired(h[t], constants);
      B dh, dx;
      SEAL_EACH_PART(i) {
        const V threshold = constants[THRESHOLD].part[i], own = h[t].part[i], spike = spikes.part[i];
        if (a.grad_threshold) {
          const V slope = reset_threshold_slope<SOFT, DETACH>(own, spike, g.part[i], threshold, reset);
          threshold_sum.part[i] += c.part[i] * slope - upstream.part[i] * g.part[i];
        }
        const V slope = reset_slope<SOFT, DETACH>(own, spike, g.part[i], threshold, reset);
        dh.part[i] = upstream.part[i] * g.part[i] + c.part[i] * slope;
        dx.part[i] = a.decay_input ? dh.part[i] * constants[INVERSE_TAU].part[i] : dh.part[i];
        c.part[i] = dh.part[i] * constants[DECAY_FACTOR].part[i];
      }
      store_block(static_cast<Number*>(a.grad_x) + t * a.N + start, dx, count, stream);
      if (a.grad_inverse_tau) {
        v = t ? after_reset<SOFT>(h[t - 1], fired(h[t - 1], constants), constants) : start_at_rest(start, count);
        const B x = x_block(t, start, count);
        SEAL_EACH_PART(i) {
          const V distance = v.part[i] - reset;
          inverse_tau_sum.part[i] += dh.part[i] * (a.decay_input ? x.part[i] - distance : -distance);
        }
      }
    }
    store_state(a.grad_v_init, c, start, count);
    store_state(a.grad_threshold, threshold_sum, start, count);
    store_state(a.grad_inverse_tau, inverse_tau_sum, start, count);
  }

  template <int KIND>
  SEAL_INLINE B derivative_of(const B& h, const B* constants) const {
    B g;
    SEAL_EACH_PART(i) g.part[i] = surrogate_derivative<KIND>(h.part[i] - constants[THRESHOLD].part[i], alpha);
    return g;
  }

  SEAL_INLINE B derivative(const B& h, const B* constants) const {
    switch (a.surrogate) {
      case SIGMOID: return derivative_of<SIGMOID>(h, constants);
      case ATAN: return derivative_of<ATAN>(h, constants);
      case PIECEWISE_QUADRATIC: return derivative_of<PIECEWISE_QUADRATIC>(h, constants);
      case PIECEWISE_EXP: return derivative_of<PIECEWISE_EXP>(h, constants);
      case SOFT_SIGN: return derivative_of<SOFT_SIGN>(h, constants);
      case SUPER_SPIKE: return derivative_of<SUPER_SPIKE>(h, constants);
      case ERF: return derivative_of<ERF>(h, constants);
      case TRIANGLE: return derivative_of<TRIANGLE>(h, constants);
      default: return derivative_of<RECTANGLE>(h, constants);
    }
  }
};

template <typename Action>
int with_types(const LifArguments& arguments, Action action) {
  switch (arguments.dtype) {
    case 0: action(Lif<float, float>(arguments)); return 0;
    case 1: action(Lif<float, bfloat16>(arguments)); return 0;
    case 2: action(Lif<float, float16>(arguments)); return 0;
    case 3: action(Lif<double, double>(arguments)); return 0;
    default: return 1;
  }
}

}  // namespace

SEAL_EXPORT(seal_lif_forward)(const LifArguments* arguments) {
  return with_types(*arguments, [](const auto& lif) { lif.forward(); });
}

SEAL_EXPORT(seal_lif_backward)(const LifArguments* arguments) {
  return with_types(*arguments, [](const auto& lif) { lif.backward(); });
}
