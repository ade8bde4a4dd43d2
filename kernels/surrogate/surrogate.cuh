// Surrogate derivatives σ'(u) for CUDA and native CPU code; reference.py has the formulas' names and sources.
#pragma once

#include "../launch/numbers.h"

// The names of SURROGATES in reference.py.
SEAL_ENUM(SurrogateKind,
  SIGMOID, ATAN, PIECEWISE_QUADRATIC, PIECEWISE_EXP, SOFT_SIGN, SUPER_SPIKE, ERF, TRIANGLE, RECTANGLE
)

// State is a number or, in native code, a vector of them; Scalar is a number.
template <int KIND, typename State, typename Scalar>
SEAL_FN State surrogate_derivative(State u, Scalar alpha) {
  const State zero = {}, magnitude = magnitude_of(u);
  const Scalar half = Scalar(0.5);
  if constexpr (KIND == SIGMOID) {
    // p(1-p) = e/(1+e)^2 with e = exp(-α|u|): no cancellation where p is near 1.
    const State e = exp_negative(magnitude, alpha), sum = 1 + e;
    return divide_by_moderate(alpha * e, sum * sum);
  } else if constexpr (KIND == ATAN) {
    const State scaled = u * (Scalar(1.5707963267948966) * alpha);
    return (half * alpha) / (1 + scaled * scaled);
  } else if constexpr (KIND == PIECEWISE_QUADRATIC) {
    const State value = alpha - (alpha * alpha) * magnitude;
    return value < zero ? zero : value;
  } else if constexpr (KIND == PIECEWISE_EXP) {
    return (half * alpha) * exp_negative(magnitude, alpha);
  } else if constexpr (KIND == SOFT_SIGN) {
    const State width = Scalar(1) / alpha + magnitude;
    return half / (alpha * width * width);
  } else if constexpr (KIND == SUPER_SPIKE) {
    const State width = 1 + magnitude;
    return alpha / (width * width);
  } else if constexpr (KIND == ERF) {
    const State scaled = u * alpha;
    return (alpha * Scalar(0.5641895835477563)) * exp_negative(scaled * scaled, Scalar(1));  // 1/√π
  } else if constexpr (KIND == TRIANGLE) {
    const State value = 1 - magnitude;
    return value < zero ? zero : alpha * value;
  } else {
    static_assert(KIND == RECTANGLE, "no such SurrogateKind");
    const State inside = zero + alpha;
    return magnitude < zero + half / alpha ? inside : zero;
  }
}
