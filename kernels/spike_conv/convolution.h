// A two-dimensional convolution of spikes: its arguments, and which inputs meet which outputs.
#pragma once

#include "../launch/export.h"
#include "../launch/types.h"
#include "../launch/vector.h"

// Null pointers stand for what is absent. weight_* are strides of weight and grad_weight, in elements.
SEAL_STRUCT(SpikeConvArguments,
  const uint64_t* words;       // [P, H, W, ceil(C/64)]: bit c % 64 of word c / 64 is channel c; bits beyond C are 0
  const void *weight, *bias;   // [O, C, KH, KW], [O]
  void* out;                   // [P, OH, OW, O], or [P, O, OH, OW] where it is in planes
  const void* grad_out;        // [P, OH, OW, O]
  void* grad_weight;           // [O, C, KH, KW]
  int64_t P, H, W, C, O, OH, OW, weight_o, weight_c, weight_h, weight_w;
  int64_t KH, KW, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int32_t dtype, planes, threads;  // dtype: of all but words
)

namespace {  // of each instruction set's own code

// Along one axis: output i meets input i stride + offset at a tap, where that is inside.
struct Tap {
  int64_t stride, offset, first, last;  // outputs from first to last - 1 have their input inside

  Tap(int64_t inputs, int64_t outputs, int64_t stride, int64_t padding, int64_t dilation, int64_t tap)
      : stride(stride), offset(tap * dilation - padding) {
    first = std::min(outputs, offset < 0 ? (-offset + stride - 1) / stride : 0);
    last = offset >= inputs ? first : std::max(first, std::min(outputs, (inputs - 1 - offset) / stride + 1));
  }

  int64_t input(int64_t output) const { return output * stride + offset; }
};

}  // namespace
