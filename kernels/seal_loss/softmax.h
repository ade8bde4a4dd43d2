// Softmax of a row, as native code of the loss keeps it, and the divergence of two.
#pragma once

#include "../launch/rows.h"

#include <cmath>

namespace {  // of each instruction set's own code

// softmax(row / κ), which is `exps` over their sum: exps are e^((row - max) / κ).
template <typename State>
struct Softmax {
  const State *row, *exps;
  State max;
  double sum, inverse;  // of exps, and 1 / sum
};

template <typename State>
SEAL_FN Softmax<State> softmax(const State* row, State max, State rate, State* exps, int64_t length) {
  const double sum = sum_over<State>(length, [=](int64_t i) {
    const Vector<State> e = exp_negative(max - load_vector(row + i), rate);
    store_vector(exps + i, e);
    return e;
  });
  return {row, exps, max, sum, 1 / sum};
}

// Adds to `sum` what a class adds to Σ p (ln p - ln q) but for factors that all classes share, by p's exponential and
// how far its logit and q's are below the largest; a class that p cannot take adds nothing.
template <typename Float>
SEAL_INLINE Float add_difference(Float sum, Float exp, Float below, Float q_below) {
  return below == Float{} + std::numeric_limits<float>::infinity() ? sum : fused(exp, q_below - below, sum);
}

// ln x by a vector's code: 35 instructions, where the standard library takes 115.
SEAL_FN double log_of(double x) {
  const Vector<double> all = log_positive(Vector<double>{} + x);
  double first;
  std::memcpy(&first, &all, sizeof first);
  return first;
}

// Σ p (ln p - ln q) of pairs of softmaxes with the same κ. The logarithms of the sums' ratios are those of products of
// them, as far as these stay in the range of doubles.
class Divergences {
 public:
  // `differences` of the classes.
  template <typename State>
  void add(const Softmax<State>& p, const Softmax<State>& q, double differences) {
    sum += differences * p.inverse;
    product *= q.sum * p.inverse;
    if (product > 1e-100 && product < 1e100) return;
    logarithms += log_of(product);
    product = 1;
  }

  double value(double rate) const { return sum * rate + (logarithms + log_of(product)); }

 private:
  double sum = 0, product = 1, logarithms = 0;
};

// Σ p ln(p + 1e-8) over a row whose softmax p is exps / sum. In float32 from Σ p ln p, by the sum of exps times how far
// the row is below its largest number, and from p ln(1 + ε/p) = ε p/(p + ε/2) within 0.07 ε.
template <typename State>
SEAL_FN double negative_entropy(const State* exps, double sum, double log_sum, double below, int64_t length) {
  typedef Vector<State> V;
  constexpr double kEps = 1e-8;
  if constexpr (sizeof(State) == sizeof(float)) {
    const State half = State(kEps / 2 * sum);
    const double shares = sum_over<State>(length, [=](int64_t i) {
      const V e = load_vector(exps + i);
      return divide_roughly(e, e + half);
    });
    return kEps * shares - below / sum - log_sum;
  } else {
    const State scale = 1 / sum;
    return sum_over<State>(length, [=](int64_t i) {
      const V p = load_vector(exps + i) * scale;
      return p * log_positive(p + kEps);
    });
  }
}

}  // namespace
