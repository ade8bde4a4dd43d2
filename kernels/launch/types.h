// The types of a tensor's numbers and of the arithmetic on them, by dtype.
#pragma once

#include "status.h"

#include "numbers.h"

SEAL_ENUM(Dtype, FLOAT32, BFLOAT16, FLOAT16, FLOAT64)

namespace {  // of each instruction set's own code

template <typename StateType, typename NumberType>
struct Types {
  typedef StateType State;    // of the arithmetic
  typedef NumberType Number;  // in memory
};

// Calls action(Types<State, Number>{}) and returns how it ended.
template <typename Action>
int with_types(int32_t dtype, Action action) {
  return status_of([&] {
    switch (dtype) {
      case FLOAT32: return action(Types<float, float>{});
      case BFLOAT16: return action(Types<float, bfloat16>{});
      case FLOAT16: return action(Types<float, float16>{});
      case FLOAT64: return action(Types<double, double>{});
      default: throw NoCode();
    }
  });
}

}  // namespace
