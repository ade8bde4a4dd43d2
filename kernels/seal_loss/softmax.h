// Softmax of a row, as native code of the loss keeps it, and the divergence of two.
#pragma once

#include "../launch/rows.h"

#include <cmath>
#include <limits>

namespace {  // of each instruction set's own code

// softmax(row / κ) and its logarithm, which is (row - max)/κ - log_sum; `exps` times `scale` is the softmax.
template <typename State>
struct Softmax {
  const State *row, *exps;
  State max, rate, scale, log_sum;

  SEAL_INLINE Vector<State> probability(int64_t i) const { return load_vector(exps + i) * scale; }
  SEAL_INLINE Vector<State> log_probability(int64_t i) const { return (load_vector(row + i) - max) * rate - log_sum; }
  State probability_of(int64_t k) const { return exps[k] * scale; }
};

// One term of Σ p (ln p - ln q), to which a class of probability p = 0 adds nothing.
template <typename State>
SEAL_INLINE Vector<State> divergence(const Softmax<State>& p, const Softmax<State>& q, int64_t i) {
  const Vector<State> none = Vector<State>{} - std::numeric_limits<State>::infinity(), zero = {};
  const Vector<State> log_p = p.log_probability(i);
  const Vector<State> term = p.probability(i) * (log_p - q.log_probability(i));
  return log_p == none ? zero : term;
}

// Σ p ln(p + 1e-8) over a row whose softmax p is exps / sum. In float32 from ln p, which needs no logarithm, and
// p ln(1 + ε/p) = ε p/(p + ε/2) within 0.07 ε.
template <typename State>
SEAL_FN double negative_entropy(const State* row, const State* exps, State max, State sum, int64_t length) {
  typedef Vector<State> V;
  const State scale = 1 / sum, eps = State(1e-8);
  if constexpr (sizeof(State) == sizeof(float)) {
    const V least = V{} - State(200);  // so far below the largest number, p is 0
    const double of_logarithms = sum_over<State>(length, [&](int64_t i) {
      const V p = load_vector(exps + i) * scale, below = load_vector(row + i) - max;
      return p * (below > least ? below : least) + divide_by_moderate(eps * p, p + eps / 2);
    });
    return of_logarithms - std::log(double(sum));
  } else {
    return sum_over<State>(length, [&](int64_t i) {
      const V p = load_vector(exps + i) * scale;
      return p * log_positive(p + eps);
    });
  }
}

}  // namespace
