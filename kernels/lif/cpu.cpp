// The multi-step LIF neuron on the CPU. x is T rows of N numbers, each row dense in memory, whatever its shape.
//
// A thread takes a piece of a row through all T steps, so that potentials stay in the cache: forward reads x once and
// writes the spikes, backward reads x and the spikes' gradient and writes x's. Each stage of a step is a loop over the
// piece that compilers turn into vector instructions. This file is compiled once for each instruction set in ISA.
#include <algorithm>
#include <type_traits>
#include <vector>

#include "../launch/export.h"
#include "../surrogate/surrogate.cuh"
#include "neuron.cuh"

// As in cpu.py. Null pointers stand for what is absent or not asked for.
struct LifArguments {
  const void *x, *v_init;                       // [T, N], [N] in the state's type
  void *spikes, *v_last;                        // [T, N], [N] in the state's type
  const void *grad_spikes, *grad_v_last;        // [T, N], [N] in the state's type
  void *grad_x, *grad_v_init;                   // [T, N], [N] in the state's type
  void *grad_threshold, *grad_inverse_tau;      // [N] in the state's type: the sum over T of each neuron's part
  const double *tau, *threshold;                // [channels]
  int64_t T, N, x_stride, channels, channel_stride;  // strides in elements; x_stride is 0 where all rows are one
  double reset, alpha;
  int32_t dtype, decay_input, soft, detach, surrogate, threads;
};

namespace {

template <typename State>
bool exact_inverse(State tau) {
  int exponent;
  return std::frexp(tau, &exponent) == State(0.5);
}

// The constants of a piece's i-th neuron: one set for all, or one for each.
template <typename State>
struct Uniform {
  State tau_, inverse_tau_, decay_, threshold_;
  State tau(int64_t) const { return tau_; }
  State inverse_tau(int64_t) const { return inverse_tau_; }
  State decay(int64_t) const { return decay_; }
  State threshold(int64_t) const { return threshold_; }
};

template <typename State>
struct Varied {
  const State *tau_, *inverse_tau_, *decay_, *threshold_;
  State tau(int64_t i) const { return tau_[i]; }
  State inverse_tau(int64_t i) const { return inverse_tau_[i]; }
  State decay(int64_t i) const { return decay_[i]; }
  State threshold(int64_t i) const { return threshold_[i]; }
};

template <typename State>
struct Scratch {  // rows of one piece: potentials, inputs, gradients, constants, and T potentials before the reset
  std::vector<State> memory;
  State *v, *x, *a, *g, *c, *dh, *grad_threshold, *grad_inverse_tau, *tau, *inverse_tau, *decay, *threshold, *h;
  static constexpr int kRows = 12;

  Scratch(int64_t size, int64_t h_rows) : memory(size * (kRows + h_rows)) {
    State** rows[] = {&v, &x, &a, &g, &c, &dh, &grad_threshold, &grad_inverse_tau,
                      &tau, &inverse_tau, &decay, &threshold, &h};
    for (int i = 0; i <= kRows; ++i) *rows[i] = memory.data() + i * size;
  }
};

// A 16-bit or float row as the state's type: in place where it is one already.
template <typename State>
const State* loaded(const State* row, State*, int64_t) { return row; }

template <typename State, typename Number>
const State* loaded(const Number* row, State* buffer, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) buffer[i] = load(row[i]);
  return buffer;
}

template <int KIND, typename State, typename Each>
void charge_row(State* h, const State* v, const State* x, const Each each, State reset, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    h[i] = charge<KIND>(v[i], x[i], each.tau(i), each.inverse_tau(i), each.decay(i), reset);
  }
}

template <bool SOFT, typename State, typename Each>
void reset_row(State* v, const State* h, const Each each, State reset, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    v[i] = reset_potential<SOFT>(h[i], fire(h[i], each.threshold(i)), each.threshold(i), reset);
  }
}

template <typename State, typename Each>
void fire_row(State* spikes, const State* h, const Each each, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) spikes[i] = fire(h[i], each.threshold(i));
}

// The state's type is written in place; 16-bit numbers are made of a buffer, as compilers vectorise the two loops only.
template <typename State, typename Each>
void store_spikes(State* spikes, State*, const State* h, const Each each, int64_t count) {
  fire_row(spikes, h, each, count);
}

template <typename State, typename Number, typename Each>
void store_spikes(Number* spikes, State* buffer, const State* h, const Each each, int64_t count) {
  fire_row(buffer, h, each, count);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(spikes[i], buffer[i]);
}

template <int KIND, typename State, typename Each>
void derivative_row(State* g, const State* h, State alpha, const Each each, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) g[i] = surrogate_derivative<KIND>(h[i] - each.threshold(i), alpha);
}

// c holds ∂L/∂v_t; gives ∂L/∂h_t, and ∂L/∂v_{t-1} in its place.
template <bool SOFT, bool DETACH, typename State, typename Each>
void gradient_row(State* dh, State* c, const State* a, const State* g, const State* h, const Each each, State reset,
                  int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const State threshold = each.threshold(i), spike = fire(h[i], threshold);
    dh[i] = a[i] * g[i] + c[i] * reset_slope<SOFT, DETACH>(h[i], spike, g[i], threshold, reset);
    c[i] = dh[i] * each.decay(i);
  }
}

// Adds this step's part of ∂L/∂θ; c holds ∂L/∂v_t.
template <bool SOFT, bool DETACH, typename State, typename Each>
void threshold_row(State* sum, const State* c, const State* a, const State* g, const State* h, const Each each,
                   State reset, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const State threshold = each.threshold(i), spike = fire(h[i], threshold);
    sum[i] += c[i] * reset_threshold_slope<SOFT, DETACH>(h[i], spike, g[i], threshold, reset) - a[i] * g[i];
  }
}

template <bool DECAY_INPUT, typename State, typename Number, typename Each>
void store_row(Number* grad_x, const State* dh, const Each each, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(grad_x[i], DECAY_INPUT ? dh[i] * each.inverse_tau(i) : dh[i]);
}

// Adds ∂L/∂h_t · ∂h_t/∂(1/τ).
template <bool DECAY_INPUT, typename State>
void time_constant_row(State* sum, const State* dh, const State* x, const State* v, State reset, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const State distance = v[i] - reset;
    sum[i] += dh[i] * (DECAY_INPUT ? x[i] - distance : -distance);
  }
}

template <typename State, typename Number, typename Each>
class Lif {
 public:
  explicit Lif(const LifArguments& arguments) : a(arguments) {
    // A piece's rows stay in the first-level cache.
    const int64_t rows = a.grad_x ? a.T + 8 : 4;
    piece = std::min<int64_t>(4096, std::max<int64_t>(64, (1 << 15) / int64_t(sizeof(State)) / rows / 64 * 64));
    pieces = (a.N + piece - 1) / piece;
    exact = true;
    for (int64_t channel = 0; channel < a.channels; ++channel) exact &= exact_inverse(State(a.tau[channel]));
  }

  void forward() const {
#pragma omp parallel num_threads(a.threads)
    {
      Scratch<State> scratch(piece, 1);
#pragma omp for schedule(static)
      for (int64_t index = 0; index < pieces; ++index) forward_piece(index, scratch);
    }
  }

  void backward() const {
#pragma omp parallel num_threads(a.threads)
    {
      Scratch<State> scratch(piece, a.T);
#pragma omp for schedule(static)
      for (int64_t index = 0; index < pieces; ++index) backward_piece(index, scratch);
    }
  }

 private:
  const LifArguments& a;
  int64_t piece, pieces;
  bool exact;  // whether multiplying by 1/τ equals dividing by τ

  struct Place { int64_t start, count; Each each; };

  Uniform<State> of_channel(int64_t channel) const {
    const double tau = a.tau[channel];
    // 1 - 1/τ is rounded once, from double.
    return {State(tau), State(1) / State(tau), State(1.0 - 1.0 / tau), State(a.threshold[channel])};
  }

  Place place(int64_t index, Scratch<State>& s) const {
    const int64_t start = index * piece, count = std::min(piece, a.N - start);
    if constexpr (std::is_same_v<Each, Uniform<State>>) {
      return {start, count, of_channel(0)};
    } else {
      for (int64_t i = 0; i < count; ++i) {
        const Uniform<State> own = of_channel((start + i) / a.channel_stride % a.channels);
        s.tau[i] = own.tau_, s.inverse_tau[i] = own.inverse_tau_, s.decay[i] = own.decay_;
        s.threshold[i] = own.threshold_;
      }
      return {start, count, {s.tau, s.inverse_tau, s.decay, s.threshold}};
    }
  }

  void start_at_rest(State* v, const Place& p) const {
    if (a.v_init) {
      std::copy_n(static_cast<const State*>(a.v_init) + p.start, p.count, v);
    } else {
      std::fill_n(v, p.count, State(a.reset));
    }
  }

  const State* x_row(int64_t t, Scratch<State>& s, const Place& p) const {
    return loaded(static_cast<const Number*>(a.x) + t * a.x_stride + p.start, s.x, p.count);
  }

  void charge_step(State* h, const State* v, const State* x, const Place& p) const {
    const State reset = State(a.reset);
    if (!a.decay_input && a.reset == 0) return charge_row<DECAY>(h, v, x, p.each, reset, p.count);
    if (a.decay_input) {
      return exact ? charge_row<FILTER_MULTIPLY>(h, v, x, p.each, reset, p.count)
                   : charge_row<FILTER_DIVIDE>(h, v, x, p.each, reset, p.count);
    }
    return exact ? charge_row<LEAK_MULTIPLY>(h, v, x, p.each, reset, p.count)
                 : charge_row<LEAK_DIVIDE>(h, v, x, p.each, reset, p.count);
  }

  void reset_step(State* v, const State* h, const Place& p) const {
    const State reset = State(a.reset);
    a.soft ? reset_row<true>(v, h, p.each, reset, p.count) : reset_row<false>(v, h, p.each, reset, p.count);
  }

  void forward_piece(int64_t index, Scratch<State>& s) const {
    const Place p = place(index, s);
    start_at_rest(s.v, p);
    for (int64_t t = 0; t < a.T; ++t) {
      charge_step(s.h, s.v, x_row(t, s, p), p);
      store_spikes(static_cast<Number*>(a.spikes) + t * a.N + p.start, s.x, s.h, p.each, p.count);
      reset_step(s.v, s.h, p);
    }
    if (a.v_last) std::copy_n(s.v, p.count, static_cast<State*>(a.v_last) + p.start);
  }

  void backward_piece(int64_t index, Scratch<State>& s) const {
    const Place p = place(index, s);
    start_at_rest(s.v, p);
    for (int64_t t = 0; t < a.T; ++t) {
      State* h = s.h + t * piece;
      charge_step(h, s.v, x_row(t, s, p), p);
      reset_step(s.v, h, p);
    }
    if (a.grad_v_last) {
      std::copy_n(static_cast<const State*>(a.grad_v_last) + p.start, p.count, s.c);
    } else {
      std::fill_n(s.c, p.count, State(0));
    }
    std::fill_n(s.grad_threshold, p.count, State(0));
    std::fill_n(s.grad_inverse_tau, p.count, State(0));
    for (int64_t t = a.T - 1; t >= 0; --t) step_back(t, s, p);
    if (a.grad_v_init) std::copy_n(s.c, p.count, static_cast<State*>(a.grad_v_init) + p.start);
    if (a.grad_threshold) std::copy_n(s.grad_threshold, p.count, static_cast<State*>(a.grad_threshold) + p.start);
    if (a.grad_inverse_tau) {
      std::copy_n(s.grad_inverse_tau, p.count, static_cast<State*>(a.grad_inverse_tau) + p.start);
    }
  }

  void step_back(int64_t t, Scratch<State>& s, const Place& p) const {
    const State* h = s.h + t * piece;
    const int64_t offset = t * a.N + p.start;
    derivative_step(s.g, h, p);
    gradient_step(s, loaded(static_cast<const Number*>(a.grad_spikes) + offset, s.a, p.count), h, p);
    Number* grad_x = static_cast<Number*>(a.grad_x) + offset;
    a.decay_input ? store_row<true>(grad_x, s.dh, p.each, p.count) : store_row<false>(grad_x, s.dh, p.each, p.count);
    if (!a.grad_inverse_tau) return;
    if (t > 0) {
      reset_step(s.v, s.h + (t - 1) * piece, p);
    } else {
      start_at_rest(s.v, p);
    }
    const auto add = a.decay_input ? time_constant_row<true, State> : time_constant_row<false, State>;
    add(s.grad_inverse_tau, s.dh, x_row(t, s, p), s.v, State(a.reset), p.count);
  }

  void derivative_step(State* g, const State* h, const Place& p) const {
    const State alpha = State(a.alpha);
    switch (a.surrogate) {
      case SIGMOID: return derivative_row<SIGMOID>(g, h, alpha, p.each, p.count);
      case ATAN: return derivative_row<ATAN>(g, h, alpha, p.each, p.count);
      case PIECEWISE_QUADRATIC: return derivative_row<PIECEWISE_QUADRATIC>(g, h, alpha, p.each, p.count);
      case PIECEWISE_EXP: return derivative_row<PIECEWISE_EXP>(g, h, alpha, p.each, p.count);
      case SOFT_SIGN: return derivative_row<SOFT_SIGN>(g, h, alpha, p.each, p.count);
      case SUPER_SPIKE: return derivative_row<SUPER_SPIKE>(g, h, alpha, p.each, p.count);
      case ERF: return derivative_row<ERF>(g, h, alpha, p.each, p.count);
      case TRIANGLE: return derivative_row<TRIANGLE>(g, h, alpha, p.each, p.count);
      default: return derivative_row<RECTANGLE>(g, h, alpha, p.each, p.count);
    }
  }

  void gradient_step(Scratch<State>& s, const State* upstream, const State* h, const Place& p) const {
    if (a.soft) {
      a.detach ? gradient_of<true, true>(s, upstream, h, p) : gradient_of<true, false>(s, upstream, h, p);
    } else {
      a.detach ? gradient_of<false, true>(s, upstream, h, p) : gradient_of<false, false>(s, upstream, h, p);
    }
  }

  template <bool SOFT, bool DETACH>
  void gradient_of(Scratch<State>& s, const State* upstream, const State* h, const Place& p) const {
    const State reset = State(a.reset);
    if (a.grad_threshold) {
      threshold_row<SOFT, DETACH>(s.grad_threshold, s.c, upstream, s.g, h, p.each, reset, p.count);
    }
    gradient_row<SOFT, DETACH>(s.dh, s.c, upstream, s.g, h, p.each, reset, p.count);
  }
};

template <typename State, typename Number, typename Action>
void with_constants(const LifArguments& arguments, Action action) {
  if (arguments.channels == 1) {
    action(Lif<State, Number, Uniform<State>>(arguments));
  } else {
    action(Lif<State, Number, Varied<State>>(arguments));
  }
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
