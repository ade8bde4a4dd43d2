// The multi-step LIF neuron on the CPU. x is T rows of N numbers, each row dense in memory, whatever its shape.
//
// A thread takes a block of neurons through all T steps in the first-level cache: forward reads x once and writes the
// spikes, backward reads x and the spikes' gradient and writes x's. What varies between neurons' kinds is chosen once a
// call, outside of the loops over a block. Compiled once for each instruction set in ISA (setup.py).
#include "../launch/export.h"
#include "../launch/pages.h"
#include "../launch/vector.h"
#include "../surrogate/surrogate.cuh"
#include "../neuron/neuron.cuh"

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

enum ConstantName { TAU, INVERSE_TAU, DECAY_FACTOR, THRESHOLD };

// A constant of a block's neurons: a block of its own where it differs between channels, else one vector.
template <typename State, bool PER_CHANNEL>
class Constant {
 public:
  explicit Constant(const Block<State>& block) : value(block[0]), block(block) {}
  SEAL_INLINE Vector<State> operator[](int i) const { return PER_CHANNEL ? block[i] : value; }

 private:
  const Vector<State> value;
  const Block<State>& block;
};

// What a thread keeps while it takes a block through time.
template <typename State>
struct Work {
  typedef Block<State> B;

  explicit Work(int64_t steps) : h(steps), g(steps), before(steps) {}

  B constants[4];
  B v, c;                               // potential and its gradient
  B threshold_sum, inverse_tau_sum;
  std::vector<B> h, g, before;          // of each step: potential before the reset, σ', potential before the charge
};

template <typename State, typename Number, bool PER_CHANNEL>
class Lif {
 public:
  explicit Lif(const LifArguments& arguments) : a(arguments), reset(State(a.reset)), alpha(State(a.alpha)) {
    void* written = a.grad_x ? a.grad_x : a.spikes;
    prefer_large_pages(written, a.T * a.N * int64_t(sizeof(Number)));
    const bool aligned = reinterpret_cast<uintptr_t>(written) % 64 == 0 && a.N * sizeof(Number) % 64 == 0;
    stream = aligned && a.T * a.N * int64_t(sizeof(Number)) > kCached;
    learned = a.grad_threshold || a.grad_inverse_tau;
    choose_charge();
    choose_derivative();
    choose_reverse();
  }

  void forward() const {
    each_block([this](int64_t start, int64_t count, W& work) {
      const C threshold(work.constants[THRESHOLD]);
      begin(start, count, work.v);
      for (int64_t t = 0; t < a.T; ++t) {
        B& h = work.h[t];
        charge_step(row_of_x(t) + start, count, work, h);
        BlockWriter<Number> spikes(static_cast<Number*>(a.spikes) + t * a.N + start, count, stream);
        fire_block(h, threshold, spikes.block());
        spikes.finish();
        if (a.packed) pack_block(h, threshold, a.packed + t * ((a.N + 7) / 8) + start / 8, count);
      }
      end(a.v_last, start, count, work.v);
    });
  }

  void backward() const {
    each_block([this](int64_t start, int64_t count, W& work) {
      const C threshold(work.constants[THRESHOLD]);
      begin(start, count, work.v);
      for (int64_t t = 0; t < a.T; ++t) {
        if (learned) work.before[t] = work.v;
        charge_step(row_of_x(t) + start, count, work, work.h[t]);
        derivative(work.h[t], threshold, alpha, row_of_gradient(t) + start, work.g[t]);
      }
      work.c.fill(0);
      if (a.grad_v_last) copy(static_cast<const State*>(a.grad_v_last) + start, count, work.c);
      if (learned) work.threshold_sum.fill(0), work.inverse_tau_sum.fill(0);
      for (int64_t t = a.T - 1; t >= 0; --t) {
        alignas(64) Number room[2][kBlock];
        BlockWriter<Number> grad_x(static_cast<Number*>(a.grad_x) + t * a.N + start, count, stream);
        (this->*reverse)(whole_block(row_of_gradient(t) + start, count, room[0]),
                         learned ? whole_block(row_of_x(t) + start, count, room[1]) : nullptr, t, work, grad_x.block());
        grad_x.finish();
      }
      end(a.grad_v_init, start, count, work.c);
      end(a.grad_threshold, start, count, work.threshold_sum);
      end(a.grad_inverse_tau, start, count, work.inverse_tau_sum);
    });
  }

 private:
  typedef Vector<State> V;
  typedef Block<State> B;
  typedef Work<State> W;
  typedef Constant<State, PER_CHANNEL> C;

  const LifArguments& a;
  const State reset, alpha;
  bool stream;   // whether rows are written past the cache
  bool learned;  // whether the parameters' gradients are asked for
  void (*charge_rows)(const Number* x, State reset, W& work, B& h);
  void (*derivative)(const B& h, const C& threshold, State alpha, const Number* upstream, B& g);
  void (Lif::*reverse)(const Number* upstream, const Number* x, int64_t t, W& work, Number* grad_x) const;

  // Calls action(start, count, work) for each block, each thread taking one run of neighbours.
  template <typename Action>
  void each_block(Action action) const {
    const int64_t blocks = (a.N + kBlock - 1) / kBlock;
    const int threads = int(std::clamp<int64_t>(a.T * a.N / kGrain, 1, a.threads));
#pragma omp parallel num_threads(threads)
    {
      W work(a.T);
      const State* values = static_cast<const State*>(a.constants);
      for (int i = 0; i < 4; ++i) work.constants[i].fill(values[i * a.channels]);
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t start = block * kBlock;
        if (PER_CHANNEL) fill_constants(work.constants, start);
        action(start, std::min<int64_t>(kBlock, a.N - start), work);
      }
      finish_streams();
    }
  }

  void fill_constants(B* constants, int64_t start) const {
    const State* values = static_cast<const State*>(a.constants);
    int64_t channel = start / a.channel_stride % a.channels, left = a.channel_stride - start % a.channel_stride;
    for (int n = 0; n < kBlock; ++n, --left) {
      if (left == 0) left = a.channel_stride, channel = channel + 1 == a.channels ? 0 : channel + 1;
      for (int i = 0; i < 4; ++i) constants[i].at[n] = values[i * a.channels + channel];
    }
  }

  const Number* row_of_gradient(int64_t t) const {
    return static_cast<const Number*>(a.grad_spikes) + t * a.grad_stride;
  }

  const Number* row_of_x(int64_t t) const { return static_cast<const Number*>(a.x) + t * a.x_stride; }

  void begin(int64_t start, int64_t count, B& v) const {
    a.v_init ? copy(static_cast<const State*>(a.v_init) + start, count, v) : v.fill(reset);
  }

  static void copy(const State* from, int64_t count, B& block) {
    std::memcpy(block.at, from, count * sizeof(State));
    std::memset(block.at + count, 0, (kBlock - count) * sizeof(State));
  }

  static void end(void* row, int64_t start, int64_t count, const B& block) {
    if (row) std::memcpy(static_cast<State*>(row) + start, block.at, count * sizeof(State));
  }

  // Charges v with x to h, and resets it.
  void charge_step(const Number* x, int64_t count, W& work, B& h) const {
    alignas(64) Number room[kBlock];
    charge_rows(whole_block(x, count, room), reset, work, h);
  }

  template <int CHARGE, bool SOFT>
  static void charge_rows_as(const Number* x, State reset, W& work, B& h) {
    const C tau(work.constants[TAU]), inverse_tau(work.constants[INVERSE_TAU]);
    const C decay(work.constants[DECAY_FACTOR]), threshold(work.constants[THRESHOLD]);
    SEAL_EACH_VECTOR(State, i) {
      fetch_ahead(x + i);
      const V charged = charge<CHARGE>(work.v[i], load_vector(x + i), tau[i], inverse_tau[i], decay[i], reset);
      h.set(i, charged);
      work.v.set(i, reset_potential<SOFT>(charged, fire(charged, threshold[i]), threshold[i], reset));
    }
  }

  static void fire_block(const B& h, const C& threshold, Number* spikes) {
    SEAL_EACH_VECTOR(State, i) store_ones(spikes + i, fire(h[i], threshold[i]));
  }

  static void pack_block(const B& h, const C& threshold, uint8_t* packed, int64_t count) {
    uint8_t bytes[kBlock / 8] = {};
    SEAL_EACH_VECTOR(State, i) {
      const uint32_t bits = lanes_set<State>(fire(h[i], threshold[i])) << (i % 8);
      for (int byte = 0; 8 * byte < VectorOf<State>::kLanes; ++byte) bytes[i / 8 + byte] |= uint8_t(bits >> (8 * byte));
    }
    if (count % 8) bytes[count / 8] &= (1 << (count % 8)) - 1;
    std::memcpy(packed, bytes, (count + 7) / 8);
  }

  template <int SURROGATE>
  static void derivative_as(const B& h, const C& threshold, State alpha, const Number* upstream, B& g) {
    SEAL_EACH_VECTOR(State, i) {
      fetch_ahead(upstream + i);
      g.set(i, surrogate_derivative<SURROGATE>(h[i] - threshold[i], alpha));
    }
  }

  // ∂L/∂x_t from the gradients of s_t and v_t, and that of v_{t-1} in the place of v_t's.
  template <bool SOFT, bool DETACH, bool LEARNED>
  void reverse_as(const Number* upstream, const Number* x, int64_t t, W& work, Number* grad_x) const {
    const C threshold(work.constants[THRESHOLD]), inverse_tau(work.constants[INVERSE_TAU]);
    const C decay(work.constants[DECAY_FACTOR]);
    const bool decay_input = a.decay_input;
    B &v_gradient = work.c, &threshold_sum = work.threshold_sum, &inverse_tau_sum = work.inverse_tau_sum;
    const B &potential = work.h[t], &derivatives = work.g[t], &before = work.before[t];
    SEAL_EACH_VECTOR(State, i) {
      const V h = potential[i], g = derivatives[i], c = v_gradient[i], spike = fire(h, threshold[i]);
      const V through_spike = load_vector(upstream + i) * g;
      const V dh = fused(c, reset_slope<SOFT, DETACH>(h, spike, g, threshold[i], reset), through_spike);
      if (LEARNED) {
        const V slope = reset_threshold_slope<SOFT, DETACH>(h, spike, g, threshold[i], reset);
        threshold_sum.set(i, threshold_sum[i] + (c * slope - through_spike));
        const V distance = before[i] - reset;
        inverse_tau_sum.set(i, inverse_tau_sum[i] + dh * (decay_input ? load_vector(x + i) - distance : -distance));
      }
      store_vector(grad_x + i, decay_input ? dh * inverse_tau[i] : dh);
      v_gradient.set(i, dh * decay[i]);
    }
  }

  void choose_charge() {
    switch (a.charge) {
      case DECAY: return choose_charge_as<DECAY>();
      case LEAK_DIVIDE: return choose_charge_as<LEAK_DIVIDE>();
      case LEAK_MULTIPLY: return choose_charge_as<LEAK_MULTIPLY>();
      case FILTER_DIVIDE: return choose_charge_as<FILTER_DIVIDE>();
      default: return choose_charge_as<FILTER_MULTIPLY>();
    }
  }

  template <int CHARGE>
  void choose_charge_as() { charge_rows = a.soft ? charge_rows_as<CHARGE, true> : charge_rows_as<CHARGE, false>; }

  void choose_derivative() {
    switch (a.surrogate) {
      case SIGMOID: derivative = derivative_as<SIGMOID>; break;
      case ATAN: derivative = derivative_as<ATAN>; break;
      case PIECEWISE_QUADRATIC: derivative = derivative_as<PIECEWISE_QUADRATIC>; break;
      case PIECEWISE_EXP: derivative = derivative_as<PIECEWISE_EXP>; break;
      case SOFT_SIGN: derivative = derivative_as<SOFT_SIGN>; break;
      case SUPER_SPIKE: derivative = derivative_as<SUPER_SPIKE>; break;
      case ERF: derivative = derivative_as<ERF>; break;
      case TRIANGLE: derivative = derivative_as<TRIANGLE>; break;
      default: derivative = derivative_as<RECTANGLE>;
    }
  }

  void choose_reverse() {
    if (a.soft) {
      a.detach ? choose_reverse_as<true, true>() : choose_reverse_as<true, false>();
    } else {
      a.detach ? choose_reverse_as<false, true>() : choose_reverse_as<false, false>();
    }
  }

  template <bool SOFT, bool DETACH>
  void choose_reverse_as() {
    reverse = learned ? &Lif::template reverse_as<SOFT, DETACH, true> : &Lif::template reverse_as<SOFT, DETACH, false>;
  }
};

template <typename State, typename Number, typename Action>
void with_constants(const LifArguments& arguments, Action action) {
  arguments.channels > 1 ? action(Lif<State, Number, true>(arguments)) : action(Lif<State, Number, false>(arguments));
}

template <typename Action>
int with_types(const LifArguments& arguments, Action action) {
  switch (arguments.dtype) {
    case 0: with_constants<float, float>(arguments, action); return 0;
    case 1: with_constants<float, bfloat16>(arguments, action); return 0;
    case 2: with_constants<float, float16>(arguments, action); return 0;
    case 3: with_constants<double, double>(arguments, action); return 0;
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
