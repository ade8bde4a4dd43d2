// A batch norm alone on the CPU: its rows of the table in norms.py, and the gradient that passes it.
#pragma once

#include "../launch/pages.h"
#include "../launch/parallel.h"
#include "../launch/types.h"
#include "../neuron/blocks.h"

#include <cmath>

#if defined(_OPENMP)
#include <omp.h>
#endif

// A norm's rows of the table, and the gradient that passes it. A null pointer stands for what is absent or not asked for.
SEAL_STRUCT(NormArguments,
  const void *y, *grad;               // [total]
  void* out;                          // [total]
  const void* coefficients;           // [3, C], this and all that follows in the state's type
  void *means, *variances;            // [C], biased
  const void *weight, *bias;          // [C]
  void *running_mean, *running_var;   // [C]
  int64_t* batches;                   // that these have seen; null where they see no more
  void *grad_weight, *grad_bias;      // [C]
  void* table;                        // [4 norms, C]
  double momentum, correction, eps;   // correction: of the running variance
  int64_t count;                      // elements per channel that statistics are taken of; 0 where they are fixed
  int64_t total, C, channel_stride, index, norms;
  int32_t dtype, threads;
)

namespace {  // of each instruction set's own code

inline int thread_number() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// Blocks of numbers by channel, filled anew only where the channels of the block's numbers are others.
template <typename State, int COUNT>
struct ByChannel {
  Block<State> at[COUNT];
  int64_t phase = -1;

  void enter(const State* values, int count, const Channels& of, int64_t start) {
    const int64_t period = of.channels * of.stride;
    if (start % period == phase) return;
    phase = start % period;
    for (int i = 0; i < count; ++i) of.fill(values + i * of.channels, start, at[i]);
  }
};

// The mean of a channel's first elements, at most 16: distances from it keep their digits where the mean is far from 0.
// It is rounded once, so that a constant channel has no distance; and 0 where an element is Inf or NaN.
template <typename State, typename Number>
State pivot(const NormArguments& a, int64_t channel) {
  const int64_t inner = a.C > 1 ? a.channel_stride : a.total, outer = a.total ? a.total / (a.C * inner) : 0;
  const int64_t across = std::clamp<int64_t>(inner, 1, 4), along = std::min(outer, 16 / across);
  double sum = 0;
  for (int64_t row = 0; row < along; ++row) {
    const Number* y = static_cast<const Number*>(a.y) + (row * a.C + channel) * inner;
    for (int64_t i = 0; i < across; ++i) sum += load(y[i]);
  }
  return std::isfinite(sum) ? static_cast<State>(sum / double(along * across)) : State(0);
}

// Adds Σ (y - pivot) and Σ (y - pivot)² of each channel to sums [threads, 2, C]. Blocks whose elements have the same
// channels are added up first.
template <typename State, typename Number>
void sum_up(const NormArguments& a, const State* pivots, double* sums) {
  struct Work {
    ByChannel<State, 1> pivots;
    Block<State> sums[2];
    int64_t start = -1, count = 0, blocks = 0;
  };
  constexpr int64_t kMost = 32;  // blocks that are added up in one number of the state's type
  const Channels of{a.C, a.channel_stride};
  const auto finish = [&](Work& work) {
    if (work.blocks == 0) return;
    double* mine = sums + thread_number() * 2 * a.C;
    for (int i = 0; i < 2; ++i) of.add(work.sums[i], work.start, work.count, mine + i * a.C);
    work.blocks = 0;
  };
  const auto action = [&](int64_t start, int64_t count, Work& work) {
    const int64_t period = a.C * a.channel_stride;
    if (work.blocks == kMost || start % period != work.pivots.phase || count != work.count) finish(work);
    work.pivots.enter(pivots, 1, of, start);
    if (work.blocks++ == 0) {
      work.start = start, work.count = count;
      for (auto& sum : work.sums) sum.fill(0);
    }
    alignas(64) Number room[kBlock];
    const Number* y = whole_block(static_cast<const Number*>(a.y) + start, count, room);
    SEAL_EACH_VECTOR(State, i) {
      fetch_ahead(y + i);
      const Vector<State> distance = load_vector(y + i) - work.pivots.at[0][i];
      work.sums[0].set(i, work.sums[0][i] + distance);
      work.sums[1].set(i, fused(distance, distance, work.sums[1][i]));
    }
  };
  each_block_of<Work>(a.total, 1, a.threads, [](Work&) {}, action, finish);
}

// `old` moved towards `next` by the momentum, as torch.lerp rounds it.
template <typename State>
State moved(State old, State next, State momentum) {
  return momentum < State(0.5) ? old + momentum * (next - old) : next - (next - old) * (1 - momentum);
}

// Mean and variance of y by channel, or the running ones where they are fixed; and what norms.py makes of them.
template <typename State, typename Number>
void fill_table(Types<State, Number>, const NormArguments& a) {
  if (a.C == 0) return;
  std::vector<State> pivots(a.C);
  std::vector<double> sums(a.threads * 2 * a.C);
  if (a.count) {
    for (int64_t c = 0; c < a.C; ++c) pivots[c] = pivot<State, Number>(a, c);
    sum_up<State, Number>(a, pivots.data(), sums.data());
  }
  State *running_mean = static_cast<State*>(a.running_mean), *running_var = static_cast<State*>(a.running_var);
  const double count = static_cast<double>(a.count);
  for (int64_t c = 0; c < a.C; ++c) {
    State mean, variance;
    if (a.count) {
      double distance = 0, square = 0;
      for (int thread = 0; thread < a.threads; ++thread) {
        distance += sums[thread * 2 * a.C + c], square += sums[(thread * 2 + 1) * a.C + c];
      }
      distance /= count, square = square / count - distance * distance;
      mean = static_cast<State>(pivots[c] + distance);
      variance = static_cast<State>(square < 0 ? 0 : square);  // NaN stays
    } else {
      mean = running_mean[c], variance = running_var[c];
    }
    if (a.means) static_cast<State*>(a.means)[c] = mean, static_cast<State*>(a.variances)[c] = variance;
    if (a.batches) {
      const State momentum = static_cast<State>(a.momentum);
      running_mean[c] = moved(running_mean[c], mean, momentum);
      running_var[c] = moved(running_var[c], variance * static_cast<State>(a.correction), momentum);
    }
    if (!a.table) continue;
    State* column = static_cast<State*>(a.table) + c;
    const State inverse_std = 1 / std::sqrt(variance + static_cast<State>(a.eps));
    const State scale = a.weight ? inverse_std * static_cast<const State*>(a.weight)[c] : inverse_std;
    const State shift = -(mean * scale);
    column[2 * a.index * a.C] = scale;
    column[(2 * a.index + 1) * a.C] = a.bias ? static_cast<const State*>(a.bias)[c] + shift : shift;
    column[(2 * a.norms + a.index) * a.C] = mean;
    column[(3 * a.norms + a.index) * a.C] = inverse_std;
  }
  if (a.batches) ++*a.batches;
}

// c0 grad + c1 y + c2, or c0 grad where the statistics are fixed.
template <typename State, typename Number>
void normalised_gradient(Types<State, Number>, const NormArguments& a) {
  struct Work {
    ByChannel<State, 3> coefficients;
  };
  const Channels of{a.C, a.channel_stride};
  prefer_large_pages(a.out, a.total * int64_t(sizeof(Number)));
  const bool stream = a.out != a.grad && streams<Number>(a.out, 1, a.total);
  const auto action = [&](int64_t start, int64_t count, Work& work) {
    alignas(64) Number room[2][kBlock];
    work.coefficients.enter(static_cast<const State*>(a.coefficients), 3, of, start);
    const Block<State>* c = work.coefficients.at;
    const Number* grad = whole_block(static_cast<const Number*>(a.grad) + start, count, room[0]);
    BlockWriter<Number> writer(static_cast<Number*>(a.out) + start, count, stream);
    Number* out = writer.block();
    if (a.count) {
      const Number* y = whole_block(static_cast<const Number*>(a.y) + start, count, room[1]);
      SEAL_EACH_VECTOR(State, i) {
        fetch_ahead(grad + i);
        fetch_ahead(y + i);
        store_vector(out + i, fused(c[0][i], load_vector(grad + i), fused(c[1][i], load_vector(y + i), c[2][i])));
      }
    } else {
      SEAL_EACH_VECTOR(State, i) {
        fetch_ahead(grad + i);
        store_vector(out + i, c[0][i] * load_vector(grad + i));
      }
    }
    writer.finish();
  };
  each_block_of<Work>(a.total, 1, a.threads, [](Work&) {}, action, [](Work&) {});
}

}  // namespace
