// One time step of a LIF neuron, for CUDA and native CPU code: the operations of lif/reference.py, in its order.
//
// Compiled without contraction to fused multiply-adds, so that spikes and potentials equal the reference bit for bit.
// State and Constant are a number or, in native code, a vector of them; Scalar is a number.
#pragma once

#include "../launch/numbers.h"

// How the potential is charged. MULTIPLY stands where 1/τ is a power of two and a product equals the quotient exactly.
SEAL_ENUM(ChargeKind,
  DECAY,             // h = d v + x                decay_input=False, v_reset = 0
  LEAK_DIVIDE,       // h = v - (v - r)/τ + x      decay_input=False
  LEAK_MULTIPLY,
  FILTER_DIVIDE,     // h = v + (x - (v - r))/τ    decay_input=True
  FILTER_MULTIPLY
)

template <int KIND, typename State, typename Constant, typename Scalar>
SEAL_FN State charge(State v, State x, Constant tau, Constant inverse_tau, Constant decay, Scalar reset) {
  const State distance = v - reset;
  if constexpr (KIND == DECAY) {
    return v * decay + x;
  } else if constexpr (KIND == LEAK_DIVIDE) {
    return v - distance / tau + x;
  } else if constexpr (KIND == LEAK_MULTIPLY) {
    return v - distance * inverse_tau + x;
  } else if constexpr (KIND == FILTER_DIVIDE) {
    return v + (x - distance) / tau;
  } else {
    static_assert(KIND == FILTER_MULTIPLY, "no such ChargeKind");
    return v + (x - distance) * inverse_tau;
  }
}

// 1 where the neuron fires, else 0; NaN does not fire.
template <typename State, typename Constant>
SEAL_FN State fire(State h, Constant threshold) {
  const State zero = {}, one = zero + 1;
  return h - threshold >= zero ? one : zero;
}

template <bool SOFT, typename State, typename Constant, typename Scalar>
SEAL_FN State reset_potential(State h, State spike, Constant threshold, Scalar reset) {
  if (SOFT) return h - spike * threshold;
  return fused(1 - spike, h, spike * reset);  // the product is exact
}

// ∂v/∂h across the reset; g is the surrogate derivative.
template <bool SOFT, bool DETACH, typename State, typename Constant, typename Scalar>
SEAL_FN State reset_slope(State h, State spike, State g, Constant threshold, Scalar reset) {
  const State one = State{} + 1;
  if (SOFT) return DETACH ? one : 1 - threshold * g;
  return DETACH ? 1 - spike : fused(reset - h, g, 1 - spike);
}

// ∂v/∂θ across the reset.
template <bool SOFT, bool DETACH, typename State, typename Constant, typename Scalar>
SEAL_FN State reset_threshold_slope(State h, State spike, State g, Constant threshold, Scalar reset) {
  if (SOFT) return DETACH ? -spike : threshold * g - spike;
  return DETACH ? State{} : -(reset - h) * g;
}
