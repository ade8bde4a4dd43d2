// How much each of a sample's steps counts in the targets of the others.
#pragma once

#include "../launch/rows.h"

#include <cmath>
#include <vector>

namespace {  // of each instruction set's own code

// Dot products of all rows with each other, [steps, steps]. Rows are padded with zeros.
template <typename State>
void all_products(int64_t length, const State* const* rows, int64_t steps, double* result) {
  const auto set = [=](int64_t i, int64_t j, double value) { result[i * steps + j] = result[j * steps + i] = value; };
  for (int64_t j = 0; j < steps; ++j) {
    const int64_t tile = j / 4 * 4, behind = tile + 4;
    if (j == tile && behind <= steps) {  // four rows with each other
      const State *a = rows[j], *b = rows[j + 1], *c = rows[j + 2], *d = rows[j + 3];
      const auto sums = sums_over<State, 10>(length, [=](int64_t k, auto& parts) {
        const Vector<State> four[] = {load_vector(a + k), load_vector(b + k), load_vector(c + k), load_vector(d + k)};
        for (int i = 0, n = 0; i < 4; ++i) {
          for (int l = 0; l <= i; ++l, ++n) parts[n] = fused(four[i], four[l], parts[n]);
        }
      });
      for (int i = 0, n = 0; i < 4; ++i) {
        for (int l = 0; l <= i; ++l, ++n) set(tile + i, tile + l, sums[n]);
      }
    }
    const State* other = rows[j];
    in_fours(behind <= steps ? behind : j, steps, [&](auto n, int64_t first) {
      constexpr int N = decltype(n)::value;
      const State* some[N];
      std::copy_n(rows + first, N, some);
      const auto sums = sums_over<State, N>(length, [&](int64_t k, auto& parts) {
        const Vector<State> factor = load_vector(other + k);
        for (int i = 0; i < N; ++i) parts[i] = fused(load_vector(some[i] + k), factor, parts[i]);
      });
      for (int i = 0; i < N; ++i) set(first + i, j, sums[i]);
    });
  }
}

// Writes a row over its largest magnitude, whose squares lose no digits; returns 1 / max(‖row‖, 1e-12) in such units.
template <typename State>
double scale_row(const State* row, int64_t length, State* scaled) {
  constexpr double kNormEps = 1e-12;
  Vector<State> most = {};
  for (int64_t i = 0; i < length; i += VectorOf<State>::kLanes) {
    const Vector<State> magnitude = magnitude_of(load_vector(row + i));
    most = magnitude > most ? magnitude : most;
  }
  const State largest = max_of_lanes<State>(most), factor = largest > 0 ? 1 / largest : State(0);
  const double squares = sum_over<State>(length, [=](int64_t i) {
    const Vector<State> value = load_vector(row + i) * factor;
    store_vector(scaled + i, value);
    return value * value;
  });
  return largest / std::max(std::sqrt(squares) * largest, kNormEps);
}

// Weights [T, T]: softmax over j != i of confidence[j] · cos(rows i and j); 0 where T = 1.
//
// They are made in stages, for other work to lie between: a vector whose lanes were written one by one can be read only
// when these have come to the cache. Without that, the loss of [4, 128, 100] took 62 us instead of 59.
template <typename State>
class StepWeights {
 public:
  explicit StepWeights(int64_t steps)
      : confidence(steps), steps(steps), directions(steps), inverse_norms(steps), products(steps * steps),
        weights(whole_vectors<State>(steps * steps)) {}

  std::vector<double> confidence;  // to be known for score()

  const State* of(int64_t step) const { return weights.data() + step * steps; }

  // Takes rows that are padded with zeros; `spare` has room for as many.
  void multiply(const State* const* rows, int64_t length, State* spare) {
    all_products(length, rows, steps, products.data());
    bool scaled = false;
    for (int64_t t = 0; t < steps; ++t) {
      const double squares = products[t * (steps + 1)];
      const bool in_range = squares > 1e-20 && squares < 1e20;
      directions[t] = in_range ? rows[t] : spare + t * length;
      inverse_norms[t] = in_range ? 1 / std::sqrt(squares) : scale_row(rows[t], length, spare + t * length);
      scaled |= !in_range;
    }
    if (scaled) all_products(length, directions.data(), steps, products.data());
  }

  void score() { steps == 4 ? score(4) : score(steps); }
  void weigh() { steps == 4 ? weigh(4) : weigh(steps); }

 private:
  const int64_t steps;
  std::vector<const State*> directions;
  std::vector<double> inverse_norms, products;  // products become scores
  std::vector<State> weights;

  // Writes how far each score is below the largest of its i, with infinity for j = i. Inlined once for four steps, for
  // which the compiler unrolls the loops, and once for any number.
  SEAL_INLINE void score(int64_t T) {
    for (int64_t i = 0; i < T; ++i) {
      double *scores = products.data() + i * T, most = -std::numeric_limits<double>::infinity();
      for (int64_t j = 0; j < T; ++j) scores[j] *= inverse_norms[i] * (confidence[j] * inverse_norms[j]);
      scores[i] = most;
      for (int64_t j = 0; j < T; ++j) most = std::max(most, scores[j]);
      for (int64_t j = 0; j < T; ++j) weights[i * T + j] = State(most - scores[j]);
    }
  }

  SEAL_INLINE void weigh(int64_t T) {
    for (int64_t i = 0; i < T * T; i += VectorOf<State>::kLanes) {
      const State* below = weights.data() + i;
      store_vector(weights.data() + i, exp_negative(load_vector(below), State(1)));
    }
    for (int64_t i = 0; i < T; ++i) {
      State* row = weights.data() + i * T;
      double sum = 0;
      for (int64_t j = 0; j < T; ++j) sum += row[j];
      const double scale = 1 / sum;
      for (int64_t j = 0; j < T; ++j) row[j] = State(row[j] * scale);
    }
    if (T == 1) weights[0] = 0;
  }
};

// sums[i] = Σ_j factors[i, j] rows[j] for rows of `count` numbers, padded with -inf, one behind the other; zeros where
// there are no rows. most[i] becomes the largest number of each.
template <typename State>
void sums_of_rows(int64_t count, const State* const* rows, int64_t terms, const State* factors, int64_t sums, State* to,
                  State* most) {
  typedef Vector<State> V;
  constexpr int64_t kLanes = VectorOf<State>::kLanes;
  constexpr State kNone = -std::numeric_limits<State>::infinity();
  const int64_t length = whole_vectors<State>(count);
  for (int64_t i = 0; i < sums && terms == 0; ++i) {
    std::fill_n(to + i * length, length, State(0));
    pad_row(to + i * length, count, kNone);
    most[i] = 0;
  }
  in_fours(0, sums, [&](auto m, int64_t i) {
    in_fours(0, terms, [&](auto n, int64_t j) {
      constexpr int M = decltype(m)::value, N = decltype(n)::value;
      const State* from[N];
      V scales[M][N], largest[M];
      for (int y = 0; y < N; ++y) from[y] = rows[j + y];
      for (int x = 0; x < M; ++x) {
        for (int y = 0; y < N; ++y) scales[x][y] = V{} + factors[(i + x) * terms + j + y];
        largest[x] = V{} + kNone;
      }
      for (int64_t k = 0; k < count; k += kLanes) {
        V z[N];
        for (int y = 0; y < N; ++y) z[y] = load_vector(from[y] + k);
        for (int x = 0; x < M; ++x) {
          State* place = to + (i + x) * length + k;
          const State* before = place;
          V sum = j ? load_vector(before) : V{};
          for (int y = 0; y < N; ++y) sum = fused(scales[x][y], z[y], sum);
          if (k + kLanes > count) sum = padded(sum, count - k, kNone);
          store_vector(place, sum);
          largest[x] = sum > largest[x] ? sum : largest[x];
        }
      }
      for (int x = 0; x < M; ++x) most[i + x] = max_of_lanes<State>(largest[x]);
    });
  });
}

}  // namespace
