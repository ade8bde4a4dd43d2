// Softmax of a row, as native code of the loss keeps it, and the divergence of two.
#pragma once

#include "../launch/rows.h"

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

}  // namespace
