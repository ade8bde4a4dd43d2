// Batch norm + residual + LIF on the CPU: tensors.py says what y and residual are, norms.py what the table is.
//
// A thread takes a block of neurons through all T steps in the first-level cache, normalising on the way. Compiled once
// for each instruction set in ISA (setup.py).
#include "../launch/export.h"
#include "../launch/bits.h"
#include "../launch/pages.h"
#include "../launch/parallel.h"
#include "../launch/types.h"
#include "../neuron/blocks.h"
#include "norm.h"

// Null pointers stand for what is absent or not asked for.
SEAL_STRUCT(BnLifArguments,
  const void *y, *residual;                     // [T, N]
  const uint8_t* residual_bits;                 // [T, ceil(N/8)], in the residual's place where that is spikes
  void *spikes, *m;                             // [T, N]
  uint8_t* packed;                              // [T, ceil(N/8)]
  const void *grad_spikes, *grad_m;             // [T, N]
  void *grad_steps, *grad_total;                // [T, N], [N]
  void *grad_threshold, *grad_inverse_tau;      // [N] in the state's type: the sum over T of each neuron's part
  void* table;                                  // [4k, C] of k norms, in the state's type; forward reads its scales
  void *sums, *coefficients;                    // as in BackwardOutputs
  int64_t T, N, C, channel_stride;
  int64_t y_stride, residual_stride, m_stride;  // along T, in elements; 0 repeats one row; grad_m's is m's
  NormArguments norm, residual_norm;            // the layer fills in what it knows itself: see norm_of
  NeuronArguments neuron;
  int32_t dtype, normalised, fills_table, threads;  // normalised: the residual has a norm of its own, and k is 2
)

namespace {

template <typename State>
struct BnLifWork : NeuronWork<State> {
  ByChannel<State, 4> scales;
  ByChannel<State, 2> means;
  std::vector<Block<State>> m;        // membrane input of each step
  Block<State> dm, total, sums[3];
};

template <typename State, typename Number, bool PER_CHANNEL>
class BnLif {
 public:
  explicit BnLif(const BnLifArguments& arguments)
      : a(arguments),
        learned(a.grad_threshold || a.grad_inverse_tau),
        varies(a.y_stride || a.residual_stride),
        of{a.C, a.channel_stride},
        neurons(a.neuron, learned) {
    for (void* written : {a.spikes, a.m, a.grad_steps}) {
      if (written) prefer_large_pages(written, a.T * a.N * int64_t(sizeof(Number)));
    }
    stream = streams<Number>(a.grad_steps ? a.grad_steps : a.spikes, a.T, a.N);
    normalise = a.residual_bits ? &BnLif::normalise_as<BITS>
                : !a.residual   ? &BnLif::normalise_as<NONE>
                : a.normalised  ? &BnLif::normalise_as<NORMALISED>
                                : &BnLif::normalise_as<PLAIN>;
  }

  void forward() const {
    each_block(1, [this](int64_t start, int64_t count, W& work) {
      work.v.fill(neurons.reset);
      for (int64_t t = 0; t < a.T; ++t) {
        const B& m = membrane_input(start, count, t, work);
        if (a.m && (t == 0 || varies)) write(m, static_cast<Number*>(a.m) + t * a.m_stride, start, count, false);
        neurons.charge_step(m.at, 0, work);
        if (a.spikes) {
          BlockWriter<Number> spikes(static_cast<Number*>(a.spikes) + t * a.N + start, count, stream);
          neurons.fire_step(0, work, spikes.block());
          spikes.finish();
        }
        if (a.packed) neurons.pack_step(0, work, count, a.packed + t * ((a.N + 7) / 8) + start / 8);
      }
    });
  }

  void backward() const {
    std::vector<double> partials(a.threads * (norms() + 1) * a.C);
    each_block(a.T, [&](int64_t start, int64_t count, W& work) {
      alignas(64) Number room[kBlock];
      work.v.fill(neurons.reset);
      for (int64_t t = 0; t < a.T; ++t) {
        neurons.charge_step(membrane_input(start, count, t, work).at, t, work);
        neurons.derive_step(gradient(a.grad_spikes, t * a.N) + start, t, work);
      }
      neurons.begin_reverse(work);
      if (a.grad_total) work.total.fill(0);
      for (B& sum : work.sums) sum.fill(0);
      work.means.enter(table() + 2 * norms() * a.C, norms(), of, start);
      for (int64_t t = a.T - 1; t >= 0; --t) {
        neurons.reverse_step(whole_block(gradient(a.grad_spikes, t * a.N) + start, count, room), work.m[place(t)].at, t,
                             work, work.dm.at);
        if (a.grad_m && (t == 0 || varies)) {
          add(whole_block(gradient(a.grad_m, t * a.m_stride) + start, count, room), work.dm);
        }
        if (a.grad_steps) write(work.dm, static_cast<Number*>(a.grad_steps) + t * a.N, start, count, stream);
        if (a.grad_total) add(work.dm.at, work.total);
        add(work.dm.at, work.sums[0]);
        add_centred(a.y, t * a.y_stride, start, count, work, 0);
        if (a.normalised) add_centred(a.residual, t * a.residual_stride, start, count, work, 1);
      }
      double* const mine = partials.data() + thread_number() * (norms() + 1) * a.C;
      for (int i = 0; i <= norms(); ++i) of.add(work.sums[i], start, count, mine + i * a.C);
      if (a.grad_total) write(work.total, static_cast<Number*>(a.grad_total), start, count, false);
      end(a.grad_threshold, start, count, work.threshold_sum);
      end(a.grad_inverse_tau, start, count, work.inverse_tau_sum);
    });
    finish(partials.data());
  }

 private:
  typedef Vector<State> V;
  typedef Block<State> B;
  typedef BnLifWork<State> W;

  const BnLifArguments& a;
  const bool learned;  // whether the neurons' parameters' gradients are asked for
  const bool varies;   // whether the membrane input does, in time
  const Channels of;
  const Neurons<State, State, Number, PER_CHANNEL, false> neurons;
  bool stream;         // whether rows are written past the cache
  void (BnLif::*normalise)(const Number* y, const void* residual, const W& work, B& m) const;

  int norms() const { return a.normalised ? 2 : 1; }
  const State* table() const { return static_cast<const State*>(a.table); }

  // What follows from the sums of all threads [threads, k + 1, C]; norms.py has the formulas.
  void finish(const double* partials) const {
    State *sums = static_cast<State*>(a.sums), *coefficients = static_cast<State*>(a.coefficients);
    for (int64_t c = 0; c < a.C; ++c) {
      for (int i = 0; i <= norms(); ++i) {
        double sum = 0;
        for (int thread = 0; thread < a.threads; ++thread) sum += partials[(thread * (norms() + 1) + i) * a.C + c];
        sums[i * a.C + c] = static_cast<State>(sum);
      }
      for (int i = 0; i < norms(); ++i) {
        const State* row = table() + c;
        const State scale = row[2 * i * a.C], mean = row[(2 * norms() + i) * a.C];
        const State inverse_std = row[(3 * norms() + i) * a.C], total = sums[c], centred = sums[(1 + i) * a.C + c];
        const NormArguments& norm = i ? a.residual_norm : a.norm;
        const State negative = -static_cast<State>(norm.count);
        const bool fixed = negative == 0;
        const State of_y = fixed ? State(0) : scale * inverse_std * (inverse_std * centred) / negative;
        coefficients[3 * i * a.C + c] = scale;
        coefficients[(3 * i + 1) * a.C + c] = of_y;
        coefficients[(3 * i + 2) * a.C + c] = fixed ? State(0) : scale * total / negative - of_y * mean;
        if (norm.grad_weight) static_cast<State*>(norm.grad_weight)[c] = inverse_std * centred;
        if (norm.grad_bias) static_cast<State*>(norm.grad_bias)[c] = total;
      }
    }
  }

  // Calls action(start, count, work), which keeps `kept` steps, for each block.
  template <typename Action>
  void each_block(int64_t kept, Action action) const {
    const auto prepare = [&](W& work) {
      neurons.prepare(kept, work);
      work.m.resize(place(kept - 1) + 1);
    };
    const auto enter = [&](int64_t start, int64_t count, W& work) {
      neurons.enter_block(start, work);
      work.scales.enter(table(), 2 * norms(), of, start);
      action(start, count, work);
    };
    each_block_of<W>(a.N, a.T, a.threads, prepare, enter, [](W&) {});
  }

  // Where a step's membrane input is kept: reverse_step reads it only where parameters are learned.
  int64_t place(int64_t t) const { return learned && varies ? t : 0; }

  const B& membrane_input(int64_t start, int64_t count, int64_t t, W& work) const {
    alignas(64) Number room[2][kBlock];
    B& m = work.m[place(t)];
    if (t == 0 || varies) {
      const Number* y = static_cast<const Number*>(a.y) + t * a.y_stride + start;
      (this->*normalise)(whole_block(y, count, room[0]), residual(start, count, t, room[1]), work, m);
    }
    return m;
  }

  // A block of a step's residual, in `room` where it is cut short; null where there is none.
  const void* residual(int64_t start, int64_t count, int64_t t, Number* room) const {
    if (a.residual_bits) {
      const uint8_t* bits = a.residual_bits + t * ((a.N + 7) / 8) + start / 8;
      if (count == kBlock) return bits;
      std::memset(room, 0, kBlock / 8);
      return std::memcpy(room, bits, (count + 7) / 8);
    }
    if (!a.residual) return nullptr;
    return whole_block(static_cast<const Number*>(a.residual) + t * a.residual_stride + start, count, room);
  }

  // The kinds of residual: none, as it is, with a scale and shift of its own, or spikes as bits.
  enum { NONE, PLAIN, NORMALISED, BITS };

  template <int RESIDUAL>
  void normalise_as(const Number* y, const void* of_block, const W& work, B& m) const {
    const B* scales = work.scales.at;
    const Number* residual = static_cast<const Number*>(of_block);
    SEAL_EACH_VECTOR(State, i) {
      fetch_ahead(y + i);
      V value = load_vector(y + i) * scales[0][i] + scales[1][i];
      if (RESIDUAL == BITS) {
        value = value + ones_of_bits<State>(static_cast<const uint8_t*>(of_block), i);
      } else if (RESIDUAL != NONE) {
        fetch_ahead(residual + i);
        const V added = load_vector(residual + i);
        value = value + (RESIDUAL == NORMALISED ? added * scales[2][i] + scales[3][i] : added);
      }
      m.set(i, value);
    }
  }

  const Number* gradient(const void* rows, int64_t offset) const { return static_cast<const Number*>(rows) + offset; }

  template <typename Other>
  static void add(const Other* from, B& block) {
    SEAL_EACH_VECTOR(State, i) block.set(i, block[i] + load_vector(from + i));
  }

  // Σ dm (y - mean); `which` is 0 for y, 1 for the residual.
  void add_centred(const void* rows, int64_t offset, int64_t start, int64_t count, W& work, int which) const {
    alignas(64) Number room[kBlock];
    const Number* from = whole_block(gradient(rows, offset) + start, count, room);
    const B& mean = work.means.at[which];
    B& sum = work.sums[1 + which];
    SEAL_EACH_VECTOR(State, i) sum.set(i, fused(work.dm[i], load_vector(from + i) - mean[i], sum[i]));
  }

  static void write(const B& block, Number* row, int64_t start, int64_t count, bool stream) {
    BlockWriter<Number> writer(row + start, count, stream);
    Number* to = writer.block();
    SEAL_EACH_VECTOR(State, i) store_vector(to + i, block[i]);
    writer.finish();
  }

  static void end(void* row, int64_t start, int64_t count, const B& block) {
    if (row) std::memcpy(static_cast<State*>(row) + start, block.at, count * sizeof(State));
  }
};

// Norm i of the layer, as norm.h takes it.
NormArguments norm_of(const BnLifArguments& a, int i) {
  NormArguments norm = i ? a.residual_norm : a.norm;
  const bool varies = i ? a.residual_stride : a.y_stride;
  norm.y = i ? a.residual : a.y;
  norm.grad = varies ? a.grad_steps : a.grad_total;
  norm.total = varies ? a.T * a.N : a.N;
  norm.C = a.C, norm.channel_stride = a.channel_stride, norm.threads = a.threads;
  norm.table = a.table, norm.index = i, norm.norms = 1 + a.normalised;
  return norm;
}

template <typename State, typename Number, typename Action>
void with_layer(Types<State, Number>, const BnLifArguments& a, Action action) {
  a.neuron.channels > 1 ? action(BnLif<State, Number, true>(a)) : action(BnLif<State, Number, false>(a));
}

// The layer; before it, the table of its norms if it is to be filled.
template <typename State, typename Number>
void forward(Types<State, Number> types, BnLifArguments a) {
  std::vector<State> table(a.table ? 0 : 4 * (1 + a.normalised) * a.C);
  if (!a.table) a.table = table.data();
  for (int i = 0; i <= a.normalised && a.fills_table; ++i) fill_table(types, norm_of(a, i));
  with_layer(types, a, [](const auto& layer) { layer.forward(); });
}

// The gradient of the membrane input and what follows from its sums; then those of y and residual that are asked for.
template <typename State, typename Number>
void backward(Types<State, Number> types, BnLifArguments a) {
  std::vector<State> sums(a.sums ? 0 : (2 + a.normalised) * a.C);
  std::vector<State> coefficients(a.coefficients ? 0 : 3 * (1 + a.normalised) * a.C);
  if (!a.sums) a.sums = sums.data();
  if (!a.coefficients) a.coefficients = coefficients.data();
  with_layer(types, a, [](const auto& layer) { layer.backward(); });
  for (int i = 0; i <= a.normalised; ++i) {
    NormArguments norm = norm_of(a, i);
    norm.coefficients = static_cast<const State*>(a.coefficients) + 3 * i * a.C;
    if (norm.out) normalised_gradient(types, norm);
  }
}

}  // namespace

SEAL_EXPORT(seal_bn_lif_forward)(const BnLifArguments* arguments) {
  return with_types(arguments->dtype, [&](auto types) { forward(types, *arguments); });
}

SEAL_EXPORT(seal_bn_lif_backward)(const BnLifArguments* arguments) {
  return with_types(arguments->dtype, [&](auto types) { backward(types, *arguments); });
}

SEAL_EXPORT(seal_bn_fill_table)(const NormArguments* arguments) {
  return with_types(arguments->dtype, [&](auto types) { fill_table(types, *arguments); });
}

SEAL_EXPORT(seal_bn_normalised_gradient)(const NormArguments* arguments) {
  return with_types(arguments->dtype, [&](auto types) { normalised_gradient(types, *arguments); });
}
