// LIF neurons in native CPU code: a block of them goes through all time steps in the first-level cache.
//
// What varies between kinds of neurons is chosen once a call, outside of the loops over a block.
#pragma once

#include "../launch/export.h"
#include "../launch/channels.h"
#include "../launch/status.h"
#include "../surrogate/surrogate.cuh"
#include "neuron.cuh"

#include <vector>

SEAL_STRUCT(NeuronArguments,
  const void* constants;  // [4, channels] in the state's type: τ, 1/τ, 1 - 1/τ and threshold
  int64_t channels, channel_stride;
  double reset, alpha;
  int32_t charge, soft, detach, decay_input, surrogate;  // charge is a ChargeKind, surrogate a SurrogateKind
)

namespace {  // of each instruction set's own code

// What a thread keeps while it takes a block through time.
template <typename State>
struct NeuronWork {
  typedef Block<State> B;

  B constants[4];
  B v, c;                               // potential and its gradient
  B threshold_sum, inverse_tau_sum;
  // Of each step that the way back needs: potential before the reset, σ', and, where parameters are learned, potential
  // before the charge.
  std::vector<B> h, g, before;
};

// Input is the type of x and its gradient, Upstream that of the spikes' gradient. FETCH asks for the next block of x
// while this one is charged, where x is in memory.
template <typename State, typename Input, typename Upstream, bool PER_CHANNEL, bool FETCH>
class Neurons {
 public:
  typedef NeuronWork<State> W;
  typedef Block<State> B;

  Neurons(const NeuronArguments& arguments, bool learned)
      : reset(State(arguments.reset)), a(arguments), alpha(State(arguments.alpha)), learned(learned) {
    choose_charge();
    choose_derivative();
    choose_reverse();
  }

  const State reset;

  // Room for so many steps, 1 where there is no way back; and the constants where they do not differ between neurons.
  void prepare(int64_t steps, W& work) const {
    work.h.resize(steps);
    work.g.resize(steps);
    work.before.resize(learned ? steps : 1);
    for (int i = 0; i < 4; ++i) work.constants[i].fill(values()[i * a.channels]);
  }

  void enter_block(int64_t start, W& work) const {
    if (!PER_CHANNEL) return;
    const Channels of{a.channels, a.channel_stride};
    for (int i = 0; i < 4; ++i) of.fill(values() + i * a.channels, start, work.constants[i]);
  }

  // Charges v with x_t to h_t, and resets it.
  void charge_step(const Input* x, int64_t t, W& work) const {
    if (learned) work.before[t] = work.v;
    charge_rows(x, reset, work, work.h[t]);
  }

  template <typename Number>
  void fire_step(int64_t t, const W& work, Number* spikes) const {
    const C threshold(work.constants[THRESHOLD]);
    const B& h = work.h[t];
    SEAL_EACH_VECTOR(State, i) store_ones(spikes + i, fire(h[i], threshold[i]));
  }

  void pack_step(int64_t t, const W& work, int64_t count, uint8_t* packed) const {
    const C threshold(work.constants[THRESHOLD]);
    const B& h = work.h[t];
    uint8_t bytes[kBlock / 8] = {};
    SEAL_EACH_VECTOR(State, i) {
      const uint32_t bits = lanes_set<State>(fire(h[i], threshold[i])) << (i % 8);
      for (int byte = 0; 8 * byte < VectorOf<State>::kLanes; ++byte) bytes[i / 8 + byte] |= uint8_t(bits >> (8 * byte));
    }
    if (count % 8) bytes[count / 8] &= (1 << (count % 8)) - 1;
    std::memcpy(packed, bytes, (count + 7) / 8);
  }

  // σ'(h_t - θ); `upstream` is where this block of the spikes' gradient is in memory.
  void derive_step(const Upstream* upstream, int64_t t, W& work) const {
    derivative(work.h[t], C(work.constants[THRESHOLD]), alpha, upstream, work.g[t]);
  }

  void begin_reverse(W& work) const {
    work.c.fill(0);
    if (learned) work.threshold_sum.fill(0), work.inverse_tau_sum.fill(0);
  }

  // ∂L/∂x_t from the gradients of s_t and v_t, and that of v_{t-1} in the place of v_t's.
  void reverse_step(const Upstream* upstream, const Input* x, int64_t t, W& work, Input* grad_x) const {
    (this->*reverse)(upstream, x, t, work, grad_x);
  }

 private:
  enum ConstantName { TAU, INVERSE_TAU, DECAY_FACTOR, THRESHOLD };

  // A constant of a block's neurons: a block of its own where it differs between channels, else one vector.
  class C {
   public:
    explicit C(const B& block) : value(block[0]), block(block) {}
    SEAL_INLINE Vector<State> operator[](int i) const { return PER_CHANNEL ? block[i] : value; }

   private:
    const Vector<State> value;
    const B& block;
  };

  typedef Vector<State> V;

  const NeuronArguments& a;
  const State alpha;
  const bool learned;  // whether the parameters' gradients are asked for
  void (*charge_rows)(const Input* x, State reset, W& work, B& h);
  void (*derivative)(const B& h, const C& threshold, State alpha, const Upstream* upstream, B& g);
  void (Neurons::*reverse)(const Upstream* upstream, const Input* x, int64_t t, W& work, Input* grad_x) const;

  const State* values() const { return static_cast<const State*>(a.constants); }

  template <int CHARGE, bool SOFT>
  static void charge_rows_as(const Input* x, State reset, W& work, B& h) {
    const C tau(work.constants[TAU]), inverse_tau(work.constants[INVERSE_TAU]);
    const C decay(work.constants[DECAY_FACTOR]), threshold(work.constants[THRESHOLD]);
    SEAL_EACH_VECTOR(State, i) {
      if (FETCH) fetch_ahead(x + i);
      const V charged = charge<CHARGE>(work.v[i], load_vector(x + i), tau[i], inverse_tau[i], decay[i], reset);
      h.set(i, charged);
      work.v.set(i, reset_potential<SOFT>(charged, fire(charged, threshold[i]), threshold[i], reset));
    }
  }

  template <int SURROGATE>
  static void derivative_as(const B& h, const C& threshold, State alpha, const Upstream* upstream, B& g) {
    SEAL_EACH_VECTOR(State, i) {
      fetch_ahead(upstream + i);
      g.set(i, surrogate_derivative<SURROGATE>(h[i] - threshold[i], alpha));
    }
  }

  template <bool SOFT, bool DETACH, bool LEARNED>
  void reverse_as(const Upstream* upstream, const Input* x, int64_t t, W& work, Input* grad_x) const {
    const C threshold(work.constants[THRESHOLD]), inverse_tau(work.constants[INVERSE_TAU]);
    const C decay(work.constants[DECAY_FACTOR]);
    const bool decay_input = a.decay_input;
    B &v_gradient = work.c, &threshold_sum = work.threshold_sum, &inverse_tau_sum = work.inverse_tau_sum;
    const B &potential = work.h[t], &derivatives = work.g[t], &before = work.before[LEARNED ? t : 0];
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
      case FILTER_MULTIPLY: return choose_charge_as<FILTER_MULTIPLY>();
      default: throw NoCode();
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
      case RECTANGLE: derivative = derivative_as<RECTANGLE>; break;
      default: throw NoCode();
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
    reverse = learned ? &Neurons::template reverse_as<SOFT, DETACH, true>
                      : &Neurons::template reverse_as<SOFT, DETACH, false>;
  }
};

}  // namespace
