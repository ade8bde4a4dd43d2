// Rows of numbers for native CPU code: dense, aligned, and padded to whole vectors.
#pragma once

#include "vector.h"

#include <array>
#include <limits>

// The length of a row of `count` numbers with its padding.
template <typename State>
SEAL_FN int64_t whole_vectors(int64_t count) {
  constexpr int64_t kLanes = VectorOf<State>::kLanes;
  return (count + kLanes - 1) / kLanes * kLanes;
}

// How many vectors are added up in one register before they go to a double.
constexpr int kRun = 16;

// Σ of each of N terms over a row, in an order that depends on its length alone; term(i, parts) adds to N vectors.
template <typename State, int N, typename Term>
SEAL_FN std::array<double, N> sums_over(const int64_t length, Term term) {
  constexpr int64_t kLanes = VectorOf<State>::kLanes;
  std::array<double, N> sums = {};
  for (int64_t run = 0; run < length; run += kRun * kLanes) {
    Vector<State> parts[N] = {};
    for (int64_t i = run; i < std::min(length, run + kRun * kLanes); i += kLanes) term(i, parts);
    add_lanes<State>(parts, sums);
  }
  return sums;
}

template <typename State, typename Term>
SEAL_FN double sum_over(int64_t length, Term term) {
  return sums_over<State, 1>(length, [&](int64_t i, auto& parts) { parts[0] += term(i); })[0];
}

// Calls action(N, first) for runs of N rows from `first` to `count`, N an integral_constant of at most 4: sums for so
// many rows at once fit into the registers of any instruction set.
template <typename Action>
SEAL_FN void in_fours(int64_t first, int64_t count, Action action) {
  for (; first + 4 <= count; first += 4) action(std::integral_constant<int, 4>(), first);
  switch (count - first) {
    case 3: return action(std::integral_constant<int, 3>(), first);
    case 2: return action(std::integral_constant<int, 2>(), first);
    case 1: return action(std::integral_constant<int, 1>(), first);
  }
}

// 0, 1, 2 ...
template <typename State>
SEAL_FN Indices<State> lane_numbers() {
  typename VectorOf<State>::Index numbers[VectorOf<State>::kLanes];
  for (int lane = 0; lane < VectorOf<State>::kLanes; ++lane) numbers[lane] = lane;
  Indices<State> result;
  std::memcpy(&result, numbers, sizeof result);
  return result;
}

// A vector with `padding` in all lanes but the first `count`.
template <typename State>
SEAL_FN Vector<State> padded(Vector<State> value, int64_t count, State padding) {
  const Indices<State> end = Indices<State>{} + typename VectorOf<State>::Index(count);
  return lane_numbers<State>() < end ? value : Vector<State>{} + padding;
}

// Makes `value` the padding of a row of `count` numbers.
template <typename State>
SEAL_FN void pad_row(State* row, int64_t count, State value) {
  State* last = row + count / VectorOf<State>::kLanes * VectorOf<State>::kLanes;
  const State* from = last;
  if (last < row + count) store_vector(last, padded(load_vector(from), row + count - last, value));
}

// A row and its largest number, whose first place is `top`; that is any place where there are only NaN.
template <typename State>
struct Row {
  State* at;
  State max;
  int64_t top;
};

// `count` numbers as a row, padded with -inf.
template <typename State, typename Number>
SEAL_FN Row<State> read_row(const Number* from, int64_t count, State* row) {
  typedef Vector<State> V;
  typedef typename VectorOf<State>::Index Index;
  constexpr int64_t kLanes = VectorOf<State>::kLanes;
  const V none = V{} - std::numeric_limits<State>::infinity();
  const Indices<State> lanes = lane_numbers<State>();
  Indices<State> places = lanes, where = lanes;
  V most = none;
  const auto take = [&](int64_t i, V value) {
    store_vector(row + i, value);
    const auto above = value > most;
    most = above ? value : most;
    where = above ? places : where;
    places += Index(kLanes);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) take(i, load_vector(from + i));
  if (i < count) take(i, padded(load_part(from + i, count - i), count - i, -std::numeric_limits<State>::infinity()));
  const State max = max_of_lanes<State>(most);
  const Indices<State> nowhere = Indices<State>{} + std::numeric_limits<Index>::max();
  return {row, max, min_of_lanes<State>(most == V{} + max ? where : nowhere)};
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
