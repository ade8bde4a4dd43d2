// The types of a tensor's numbers and of the arithmetic on them, by the number that cpu.py has for its dtype.
#pragma once

#include "numbers.h"

namespace {  // of each instruction set's own code

template <typename StateType, typename NumberType>
struct Types {
  typedef StateType State;    // of the arithmetic
  typedef NumberType Number;  // in memory
};

// Calls action(Types<State, Number>{}); returns 0, or 1 where there is no such dtype.
template <typename Action>
int with_types(int32_t dtype, Action action) {
  switch (dtype) {
    case 0: action(Types<float, float>{}); return 0;
    case 1: action(Types<float, bfloat16>{}); return 0;
    case 2: action(Types<float, float16>{}); return 0;
    case 3: action(Types<double, double>{}); return 0;
    default: return 1;
  }
}

}  // namespace
