// LIF neurons in CUDA C++: a thread takes VECTOR neighbouring ones through all T steps in registers.
//
// Forward reads what drives them once and writes the spikes; backward reads it and the spikes' gradient once, goes
// through the steps again, then back. All loads of up to STEPS steps are issued before the first is used. Where T is
// more (LONG), steps go in chunks of STEPS, and backward keeps the potentials between chunks in memory.
//
// A kernel's Input is what drives the neurons: fetch<ORDERED>(t) reads a Step of it, as `read` does, and of this
// current(step, i) makes the current of neuron i. Pointers are those of lif_forward and lif_backward; n is the first of
// the thread's neurons. `of` are their Constants.
#pragma once

#include "../launch/access.cuh"
#include "../surrogate/surrogate.cuh"
#include "constants.cuh"
#include "neuron.cuh"

// v are the potentials before the first step, then those after the last. The currents are written to `currents`, rows
// currents_stride apart, 0 where one stands for all; or null: not asked for. Threads that are not inside lend a hand in
// packing.
template <typename Number, int VECTOR, int STEPS, bool LONG, int CHARGE, bool SOFT, bool PACK, typename Input,
          typename Of>
SEAL_FN void steps_forward(const Input& input, const Of& of, Group<State<Number>, VECTOR>& v, Number* spikes,
                           uint8_t* packed, Number* currents, int64_t currents_stride, int64_t T, int64_t N, int64_t n,
                           bool inside, State<Number> reset) {
  typedef State<Number> Real;
  const int64_t steps = LONG ? T : STEPS;
  for (int64_t first = 0; first < steps; first += STEPS) {
    typename Input::Step rows[STEPS] = {};
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      if (!inside || (LONG && first + t >= T)) break;
      rows[t] = input.template fetch<false>(first + t);
    }
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      if (LONG && first + t >= T) break;
      Group<Number, VECTOR> fired, driven;
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const Real current = input.current(rows[t], i);
        const Real h = charge<CHARGE>(v.at[i], current, of.tau(i), of.inverse_tau(i), of.decay(i), reset);
        const Real spike = fire(h, of.threshold(i));
        v.at[i] = reset_potential<SOFT>(h, spike, of.threshold(i), reset);
        store(fired.at[i], spike);
        store(driven.at[i], current);
        bits |= (inside && spike != 0 ? 1u : 0u) << i;
      }
      if (inside) write<true>(spikes + (first + t) * N + n, fired);
      if (inside && currents && (currents_stride || first + t == 0)) {
        write<true>(currents + (first + t) * currents_stride + n, driven);
      }
      if (PACK) write_bits<VECTOR>(packed + (first + t) * ((N + 7) / 8), bits, n, inside);
    }
  }
}

// c is the gradient of the potentials after the last step, then that of v_init. From the last step to the first,
// take(step, i, gradient) gets the gradient of neuron i's current, and returns what `gradients` are to hold, [T, N]; or
// null: not asked for.
template <typename Number, int VECTOR, int STEPS, bool LONG, int CHARGE, bool SOFT, bool DETACH, int SURROGATE,
          bool PARAMETERS, typename Input, typename Of, typename Take>
SEAL_FN void steps_backward(const Input& input, const Of& of, const State<Number>* v_init,
                            Group<State<Number>, VECTOR>& c, const Number* grad_spikes, int64_t grad_stride,
                            Number* gradients, State<Number>* grad_threshold, State<Number>* grad_inverse_tau,
                            State<Number>* checkpoints, int64_t T, int64_t N, int64_t n, State<Number> reset,
                            State<Number> alpha, const Take& take) {
  typedef State<Number> Real;
  constexpr bool ORDERED = !LONG;  // else the chunks' addresses leave too few registers
  constexpr bool DECAY_INPUT = CHARGE == FILTER_DIVIDE || CHARGE == FILTER_MULTIPLY;
  const auto charged = [&](int i, Real v, const typename Input::Step& step) {
    return charge<CHARGE>(v, input.current(step, i), of.tau(i), of.inverse_tau(i), of.decay(i), reset);
  };
  const auto after = [&](int i, Real h) {
    return reset_potential<SOFT>(h, fire(h, of.threshold(i)), of.threshold(i), reset);
  };

  Group<Real, VECTOR> v = row_or<VECTOR>(v_init, n, reset);
  const int64_t last = LONG ? (T - 1) / STEPS : 0;  // chunk
  for (int64_t chunk = 0; chunk < last; ++chunk) {
    typename Input::Step rows[STEPS];
#pragma unroll
    for (int t = 0; t < STEPS; ++t) rows[t] = input.template fetch<false>(chunk * STEPS + t);
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) v.at[i] = after(i, charged(i, v.at[i], rows[t]));
    }
    write<true>(checkpoints + chunk * N + n, v);
  }

  Group<Real, VECTOR> threshold_sum = {}, inverse_tau_sum = {};
  for (int64_t chunk = last; chunk >= 0; --chunk) {
    if (LONG && chunk < last) {
      v = chunk ? read<VECTOR>(checkpoints + (chunk - 1) * N + n) : row_or<VECTOR>(v_init, n, reset);
    }
    const Group<Real, VECTOR> before = v;
    const int64_t first = chunk * STEPS;
    typename Input::Step rows[STEPS];
    Group<Number, VECTOR> upstream[STEPS];
    Real h[STEPS][VECTOR];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
      const int t = ORDERED ? STEPS - 1 - i : i;
      if (LONG && first + t >= T) break;
      upstream[t] = read<VECTOR, ORDERED>(grad_spikes + (first + t) * grad_stride + n);
      rows[t] = input.template fetch<ORDERED>(first + t);
    }
#pragma unroll
    for (int t = 0; t < STEPS; ++t) {
      if (LONG && first + t >= T) break;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        h[t][i] = charged(i, v.at[i], rows[t]);
        v.at[i] = after(i, h[t][i]);
      }
    }
#pragma unroll
    for (int t = STEPS - 1; t >= 0; --t) {
      if (LONG && first + t >= T) continue;
      Group<Number, VECTOR> gradient;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const Real level = of.threshold(i), spike = fire(h[t][i], level);
        const Real g = surrogate_derivative<SURROGATE>(h[t][i] - level, alpha);
        const Real through_spike = load(upstream[t].at[i]) * g;
        const Real slope = reset_slope<SOFT, DETACH>(h[t][i], spike, g, level, reset);
        const Real dh = multiply_add(c.at[i], slope, through_spike);
        if (PARAMETERS) {
          const Real of_level = reset_threshold_slope<SOFT, DETACH>(h[t][i], spike, g, level, reset);
          threshold_sum.at[i] += c.at[i] * of_level - through_spike;
          const Real distance = (t ? after(i, h[t ? t - 1 : 0][i]) : before.at[i]) - reset;
          inverse_tau_sum.at[i] += dh * (DECAY_INPUT ? input.current(rows[t], i) - distance : -distance);
        }
        c.at[i] = dh * of.decay(i);
        store(gradient.at[i], take(rows[t], i, DECAY_INPUT ? dh * of.inverse_tau(i) : dh));
      }
      if (gradients) write<true>(gradients + (first + t) * N + n, gradient);
    }
  }
  if (PARAMETERS) {
    write<true>(grad_threshold + n, threshold_sum);
    write<true>(grad_inverse_tau + n, inverse_tau_sum);
  }
}
