// Rows of numbers for native CPU code: dense, aligned, and padded to whole vectors.
#pragma once

#include "vector.h"

// How many vectors are added up in one register before they go to a double.
constexpr int kRun = 16;

// Σ of two terms over a row, in an order that depends on its length alone; term(i, first, second) adds to both.
template <typename State, typename Term>
SEAL_FN void sum_both(int64_t length, double& first, double& second, Term term) {
  constexpr int64_t kLanes = VectorOf<State>::kLanes;
  first = second = 0;
  for (int64_t run = 0; run < length; run += kRun * kLanes) {
    Vector<State> first_part = {}, second_part = {};
    for (int64_t i = run; i < std::min(length, run + kRun * kLanes); i += kLanes) term(i, first_part, second_part);
    first += sum_of_lanes<State>(first_part);
    second += sum_of_lanes<State>(second_part);
  }
}

template <typename State, typename Term>
SEAL_FN double sum_over(int64_t length, Term term) {
  double sum, none;
  sum_both<State>(length, sum, none, [&](int64_t i, Vector<State>& part, Vector<State>&) { part += term(i); });
  return sum;
}

template <typename State>
SEAL_FN State max_of_row(const State* row, int64_t length) {
  Vector<State> most = load_vector(row);
  for (int64_t i = VectorOf<State>::kLanes; i < length; i += VectorOf<State>::kLanes) {
    const Vector<State> value = load_vector(row + i);
    most = value > most ? value : most;
  }
  return max_of_lanes<State>(most);
}

// The first place of `value`; 0 where it is nowhere, as NaN is.
template <typename State>
SEAL_FN int64_t first_of_row(const State* row, int64_t length, State value) {
  const Vector<State> zeros = {}, ones = zeros + 1, wanted = zeros + value;
  for (int64_t i = 0; i < length; i += VectorOf<State>::kLanes) {
    const uint32_t found = lanes_set<State>(load_vector(row + i) == wanted ? ones : zeros);
    for (int lane = 0; found >> lane; ++lane) {
      if (found >> lane & 1) return i + lane;
    }
  }
  return 0;
}
