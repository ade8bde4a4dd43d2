// Surrogate derivatives σ'(u) for CUDA and native CPU code; reference.py has the formulas' names and sources.
#pragma once

#include "../launch/numbers.h"

// In the order of SURROGATES in reference.py.
enum SurrogateKind {
  SIGMOID, ATAN, PIECEWISE_QUADRATIC, PIECEWISE_EXP, SOFT_SIGN, SUPER_SPIKE, ERF, TRIANGLE, RECTANGLE
};

template <int KIND, typename State>
SEAL_FN State surrogate_derivative(State u, State alpha) {
  const State one = 1, two = 2;
  const State magnitude = u < 0 ? -u : u;
  if (KIND == SIGMOID) {
    // p(1-p) = e/(1+e)^2 with e = exp(-α|u|): no cancellation where p is near 1.
    const State e = exp_negative(-alpha * magnitude);
    return alpha * e / ((one + e) * (one + e));
  }
  if (KIND == ATAN) {
    const State scaled = u * (static_cast<State>(1.5707963267948966) * alpha);
    return (alpha / two) / (one + scaled * scaled);
  }
  if (KIND == PIECEWISE_QUADRATIC) {
    const State value = alpha - alpha * alpha * magnitude;
    return value < 0 ? State(0) : value;
  }
  if (KIND == PIECEWISE_EXP) return (alpha / two) * exp_negative(-alpha * magnitude);
  if (KIND == SOFT_SIGN) {
    const State width = one / alpha + magnitude;
    return one / (two * alpha * width * width);
  }
  if (KIND == SUPER_SPIKE) {
    const State width = one + magnitude;
    return alpha / (width * width);
  }
  if (KIND == ERF) {
    const State scaled = u * alpha;
    return alpha * static_cast<State>(0.5641895835477563) * exp_negative(-scaled * scaled);  // 1/√π
  }
  if (KIND == TRIANGLE) {
    const State value = one - magnitude;
    return value < 0 ? State(0) : alpha * value;
  }
  return magnitude < static_cast<State>(0.5) / alpha ? alpha : State(0);  // RECTANGLE
}
