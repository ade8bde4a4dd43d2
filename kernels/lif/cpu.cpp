// The multi-step LIF neuron on the CPU. x is T rows of N numbers, each row dense in memory, whatever its shape.
//
// A thread takes a block of neurons through all T steps in the first-level cache: forward reads x once and writes the
// spikes, backward reads x and the spikes' gradient and writes x's. Compiled once for each instruction set in ISA
// (setup.py).
#include "../launch/export.h"
#include "../launch/pages.h"
#include "../launch/parallel.h"
#include "../launch/types.h"
#include "../neuron/blocks.h"

// Null pointers stand for what is absent or not asked for.
SEAL_STRUCT(LifArguments,
  const void *x, *v_init;                   // [T, N], [N] in the state's type
  void *spikes, *v_last;                    // [T, N], [N] in the state's type
  uint8_t* packed;                          // [T, ceil(N/8)]
  const void *grad_spikes, *grad_v_last;    // [T, N], [N] in the state's type
  void *grad_x, *grad_v_init;               // [T, N], [N] in the state's type
  void *grad_threshold, *grad_inverse_tau;  // [N] in the state's type: the sum over T of each neuron's part
  int64_t T, N, x_stride, grad_stride;      // strides of x and grad_spikes along T, in elements; 0 repeats one row
  NeuronArguments neuron;
  int32_t dtype, threads;
)

namespace {

template <typename State, typename Number, bool PER_CHANNEL>
class Lif {
 public:
  explicit Lif(const LifArguments& arguments)
      : a(arguments), learned(a.grad_threshold || a.grad_inverse_tau), neurons(a.neuron, learned) {
    void* written = a.grad_x ? a.grad_x : a.spikes;
    if (written) prefer_large_pages(written, a.T * a.N * int64_t(sizeof(Number)));
    stream = streams<Number>(written, a.T, a.N);
  }

  void forward() const {
    each_block(1, [this](int64_t start, int64_t count, W& work) {
      alignas(64) Number room[kBlock];
      begin(start, count, work.v);
      for (int64_t t = 0; t < a.T; ++t) {
        neurons.charge_step(whole_block(row_of_x(t) + start, count, room), 0, work);
        if (a.spikes) {
          BlockWriter<Number> spikes(static_cast<Number*>(a.spikes) + t * a.N + start, count, stream);
          neurons.fire_step(0, work, spikes.block());
          spikes.finish();
        }
        if (a.packed) neurons.pack_step(0, work, count, a.packed + t * ((a.N + 7) / 8) + start / 8);
      }
      end(a.v_last, start, count, work.v);
    });
  }

  void backward() const {
    each_block(a.T, [this](int64_t start, int64_t count, W& work) {
      alignas(64) Number room[2][kBlock];
      begin(start, count, work.v);
      for (int64_t t = 0; t < a.T; ++t) {
        neurons.charge_step(whole_block(row_of_x(t) + start, count, room[0]), t, work);
        neurons.derive_step(row_of_gradient(t) + start, t, work);
      }
      neurons.begin_reverse(work);
      if (a.grad_v_last) copy(static_cast<const State*>(a.grad_v_last) + start, count, work.c);
      for (int64_t t = a.T - 1; t >= 0; --t) {
        BlockWriter<Number> grad_x(static_cast<Number*>(a.grad_x) + t * a.N + start, count, stream);
        neurons.reverse_step(whole_block(row_of_gradient(t) + start, count, room[0]),
                             learned ? whole_block(row_of_x(t) + start, count, room[1]) : nullptr, t, work,
                             grad_x.block());
        grad_x.finish();
      }
      end(a.grad_v_init, start, count, work.c);
      end(a.grad_threshold, start, count, work.threshold_sum);
      end(a.grad_inverse_tau, start, count, work.inverse_tau_sum);
    });
  }

 private:
  typedef Block<State> B;
  typedef NeuronWork<State> W;

  const LifArguments& a;
  const bool learned;  // whether the parameters' gradients are asked for
  const Neurons<State, Number, Number, PER_CHANNEL, true> neurons;
  bool stream;  // whether rows are written past the cache

  // Calls action(start, count, work), which keeps `kept` steps, for each block; a thread takes one run of neighbours.
  template <typename Action>
  void each_block(int64_t kept, Action action) const {
    const auto prepare = [&](W& work) { neurons.prepare(kept, work); };
    const auto enter = [&](int64_t start, int64_t count, W& work) {
      neurons.enter_block(start, work);
      action(start, count, work);
    };
    each_block_of<W>(a.N, a.T, a.threads, prepare, enter, [](W&) {});
  }

  const Number* row_of_gradient(int64_t t) const {
    return static_cast<const Number*>(a.grad_spikes) + t * a.grad_stride;
  }

  const Number* row_of_x(int64_t t) const { return static_cast<const Number*>(a.x) + t * a.x_stride; }

  void begin(int64_t start, int64_t count, B& v) const {
    a.v_init ? copy(static_cast<const State*>(a.v_init) + start, count, v) : v.fill(neurons.reset);
  }

  static void copy(const State* from, int64_t count, B& block) {
    std::memcpy(block.at, from, count * sizeof(State));
    std::memset(block.at + count, 0, (kBlock - count) * sizeof(State));
  }

  static void end(void* row, int64_t start, int64_t count, const B& block) {
    if (row) std::memcpy(static_cast<State*>(row) + start, block.at, count * sizeof(State));
  }
};

template <typename Action>
int with_kind(const LifArguments& a, Action action) {
  return with_types(a.dtype, [&](auto types) {
    typedef typename decltype(types)::State State;
    typedef typename decltype(types)::Number Number;
    a.neuron.channels > 1 ? action(Lif<State, Number, true>(a)) : action(Lif<State, Number, false>(a));
  });
}

}  // namespace

SEAL_EXPORT(seal_lif_forward)(const LifArguments* arguments) {
  return with_kind(*arguments, [](const auto& lif) { lif.forward(); });
}

SEAL_EXPORT(seal_lif_backward)(const LifArguments* arguments) {
  return with_kind(*arguments, [](const auto& lif) { lif.backward(); });
}
