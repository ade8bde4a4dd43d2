// The type of the loss's gradient between the forward and the backward pass, and what the latter does with it.
#pragma once

#include "../launch/vector.h"

#include <type_traits>

namespace {  // of each instruction set's own code

// As gradient_dtype in reference.py, which says why.
template <typename State, typename Number>
using GradientOf = std::conditional_t<std::is_same_v<Number, float16>, State, Number>;

// values = wide · factor, rounded once, where the gradient is wider than the logits' numbers; else values *= factor.
template <typename State, typename Number>
void scale(Number* values, const void* wide, State factor, int64_t count) {
  if constexpr (!std::is_same_v<GradientOf<State, Number>, Number>) {
    constexpr int64_t kLanes = VectorOf<State>::kLanes;
    const State* gradient = static_cast<const State*>(wide);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store_vector(values + i, load_vector(gradient + i) * factor);
    for (; i < count; ++i) store(values[i], gradient[i] * factor);
  } else {
    for (int64_t i = 0; i < count; ++i) store(values[i], State(load(values[i])) * factor);
  }
}

}  // namespace
