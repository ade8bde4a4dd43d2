// Convolutions of spikes on the CPU, which add weights where spikes are and skip the rest. Compiled once for each
// instruction set in ISA (setup.py).
#include "../launch/export.h"
#include "convolution.h"
#include "forward.h"
#include "weight_gradient.h"
#include "words.h"

namespace {

// Calls action(Number) for the types that have code.
template <typename Action>
int with_numbers(const SpikeConvArguments& a, Action action) {
  return status_of([&] {
    switch (a.dtype) {
      case FLOAT32: return action(float{});
      case BFLOAT16: return action(bfloat16{});
      default: throw NoCode();
    }
  });
}

}  // namespace

SEAL_EXPORT(seal_spike_words)(const SpikeWordsArguments* arguments) {
  spike_words(*arguments);
  return DONE;
}

SEAL_EXPORT(seal_spike_conv)(const SpikeConvArguments* arguments) {
  return with_numbers(*arguments, [&](auto number) { convolve<decltype(number)>(*arguments); });
}

SEAL_EXPORT(seal_spike_conv_weight_gradient)(const SpikeConvArguments* arguments) {
  return with_numbers(*arguments, [&](auto number) { weight_gradient<decltype(number)>(*arguments); });
}
