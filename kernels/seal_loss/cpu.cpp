// The selective-alignment loss on the CPU; reference.py has its meaning and source. A thread takes a sample through all
// of it: the logits are read once, the gradient is written once, and what lies between stays in the caches.
//
// Rows of K numbers are padded to whole vectors with -inf, which adds nothing to any maximum, sum or divergence.
// Compiled once for each instruction set in ISA (setup.py).
#include "../launch/export.h"
#include "../launch/rows.h"
#include "../launch/types.h"
#include "gradient.h"
#include "softmax.h"

#include <optional>
#include <vector>

// Null pointers stand for what is not asked for.
SEAL_STRUCT(LossArguments,
  const void *logits, *teacher;    // [T, B, K]; [B, K] dense in the state's type
  const void* labels;              // [B] int64 or int32; null where the weights alone are asked for
  void* parts;                     // [4] in the state's type: loss, CE, ELA, STA
  void* grad;                      // [T, B, K] dense in the gradient's type
  void *weights, *confidence;      // [B, T, T], [T, B] in the state's type
  int64_t T, B, K, stride_t, stride_b;
  double alpha, beta, temperature;
  int32_t dtype, objective, wide_labels, threads;
  int32_t outside;                 // set where a label is none of the classes; nothing else is written then
)

SEAL_STRUCT(ScaleArguments,
  void* values;        // [count], multiplied in place unless there is
  const void* wide;    // [count] in the gradient's type, where that is another one
  const void* factor;  // one number in the state's type
  int64_t count;
  int32_t dtype;
)

SEAL_ENUM(Objective, SEAL, KD, TDKD)

namespace {

constexpr int64_t kIgnored = -100;
constexpr double kNormEps = 1e-12;

// Below this many logits a second thread costs more than it saves; a row costs as much as kFixed logits besides.
constexpr int64_t kGrain = 1 << 13, kFixed = 100;

template <typename State>
struct alignas(64) Line { State at[64 / sizeof(State)]; };

template <typename State, typename Number>
class Loss {
 public:
  typedef Vector<State> V;
  typedef Softmax<State> S;
  typedef GradientOf<State, Number> Gradient;
  static constexpr int64_t kLanes = VectorOf<State>::kLanes;

  explicit Loss(LossArguments& arguments)
      : a(arguments), length(padded(a.K)), log_k(std::log(double(a.K))), rate(State(1 / a.temperature)) {
    if (a.objective != SEAL && a.objective != KD && a.objective != TDKD) throw NoCode();
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t label = label_of(b);
      valid += label != kIgnored;
      arguments.outside |= label != kIgnored && (label < 0 || label >= a.K);
    }
    samples.resize(a.parts ? 3 * a.B : 0);
    aligned_over_time = a.weights || (a.objective == SEAL && a.T > 1);
  }

  void run() {
    if (a.outside) return;
    const int64_t enough = a.T * a.B * (a.K + kFixed) / kGrain;
    const int threads = int(std::clamp<int64_t>(enough, 1, std::min<int64_t>(a.threads, a.B)));
    Memory memory;
#pragma omp parallel num_threads(threads)
    {
      std::optional<Rows> rows;
      memory.got([&] { rows.emplace(*this); });
#pragma omp for schedule(static)
      for (int64_t b = 0; b < a.B; ++b) rows ? sample(b, *rows) : void();
    }
    memory.check();
    if (!a.parts) return;
    double sums[3] = {};
    for (int part = 0; part < 3; ++part) {
      for (int64_t b = 0; b < a.B; ++b) sums[part] += samples[part * a.B + b];
      sums[part] /= double(valid * a.T);
    }
    if (!has_target()) sums[2] = 0;  // and not 0/0
    double loss = sums[0];
    if (a.alpha != 0) loss += a.alpha * sums[1];  // 0 · inf would be NaN
    if (a.beta != 0) loss += a.beta * sums[2];
    State* parts = static_cast<State*>(a.parts);
    parts[0] = State(loss), parts[1] = State(sums[0]), parts[2] = State(sums[1]), parts[3] = State(sums[2]);
  }

 private:
  const LossArguments& a;
  const int64_t length;  // of a padded row
  const double log_k;
  const State rate;      // 1/κ
  int64_t valid = 0;     // samples that are not ignored
  bool aligned_over_time;
  std::vector<double> samples;  // [3, B]: each sample's CE, ELA and STA

  // What a thread keeps of a sample.
  struct Rows {
    explicit Rows(const Loss& loss)
        : length(loss.length), steps(loss.a.T),
          memory((kOnce + kEach * steps) * length * sizeof(State) / 64 + 1),
          max(steps), sum(steps), soft_sum(steps), per_norm(steps), factors(padded(steps)), confidence(steps),
          similarity(steps * steps), weights(steps * steps), top(steps), taking_part(steps) {}

    enum { TEACHER, TEACHER_EXPS, TARGET, TARGET_EXPS, AGREED_EXPS, REPLACED_EXPS, GRADIENT, kOnce };
    enum { LOGITS, EXPS, SOFT_EXPS, DIRECTION, kEach };  // exponentials of z and of z/κ; what is parallel to z

    State* once(int row) { return memory.data()->at + row * length; }
    State* each(int row, int64_t t) { return memory.data()->at + (kOnce + row * steps + t) * length; }

    const int64_t length, steps;
    std::vector<Line<State>> memory;
    std::vector<State> max, sum, soft_sum, per_norm, factors;
    std::vector<double> confidence, similarity, weights;
    std::vector<int64_t> top;  // first index of the largest logit
    std::vector<int64_t> taking_part;
  };

  bool has_target() const { return a.objective == TDKD || (a.objective == SEAL && a.T > 1); }
  static int64_t padded(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

  int64_t label_of(int64_t b) const {
    if (!a.labels) return 0;
    return a.wide_labels ? static_cast<const int64_t*>(a.labels)[b] : static_cast<const int32_t*>(a.labels)[b];
  }

  template <typename From>
  void read_row(const From* from, State* row) const {
    int64_t i = 0;
    for (; i + kLanes <= a.K; i += kLanes) store_vector(row + i, load_vector(from + i));
    for (; i < a.K; ++i) row[i] = State(load(from[i]));
    for (; i < length; ++i) row[i] = -std::numeric_limits<State>::infinity();
  }

  // Where κ is 3, as published, e^-x is the cube of e^(-x/κ).
  template <bool cubed>
  void exponentials_of(int64_t t, Rows& rows) const {
    const State *z = rows.each(Rows::LOGITS, t), max = rows.max[t];
    State *exps = rows.each(Rows::EXPS, t), *soft = rows.each(Rows::SOFT_EXPS, t);
    double sum, soft_sum;
    sum_both<State>(length, sum, soft_sum, [&](int64_t i, V& part, V& soft_part) {
      const V below = max - load_vector(z + i), s = exp_negative(below, rate);
      V e;
      if constexpr (cubed) e = s * s * s;
      else e = exp_negative(below, State(1));
      store_vector(exps + i, e);
      store_vector(soft + i, s);
      part += e;
      soft_part += s;
    });
    rows.sum[t] = State(sum);
    rows.soft_sum[t] = State(soft_sum);
  }

  S softmax(const State* row, State max, State* exps) const {
    const double sum = sum_over<State>(length, [&](int64_t i) {
      const V e = exp_negative(max - load_vector(row + i), rate);
      store_vector(exps + i, e);
      return e;
    });
    return summed(row, exps, max, State(sum));
  }

  S summed(const State* row, const State* exps, State max, State sum) const {
    return {row, exps, max, rate, 1 / sum, std::log(sum)};
  }

  void sample(int64_t b, Rows& rows) {
    const int64_t label = label_of(b);
    const bool ignored = a.parts && label == kIgnored;
    if (ignored) {
      for (int part = 0; part < 3; ++part) samples[part * a.B + b] = 0;
      if (a.grad) {
        for (int64_t t = 0; t < a.T; ++t) std::memset(grad_row(t, b), 0, a.K * sizeof(Gradient));
      }
      return;
    }
    for (int64_t t = 0; t < a.T; ++t) {
      State* z = rows.each(Rows::LOGITS, t);
      read_row(static_cast<const Number*>(a.logits) + t * a.stride_t + b * a.stride_b, z);
      rows.max[t] = max_of_row(z, length);
      rows.top[t] = first_of_row(z, length, rows.max[t]);
      a.temperature == 3 ? exponentials_of<true>(t, rows) : exponentials_of<false>(t, rows);
    }
    if (aligned_over_time) weigh(b, rows);
    if (a.parts) compare(b, label, rows);
  }

  // Confidence of each step, and the weights of the other steps in its target.
  void weigh(int64_t b, Rows& rows) const {
    for (int64_t t = 0; t < a.T; ++t) {
      const State* z = rows.each(Rows::LOGITS, t);
      const double entropy = -negative_entropy(z, rows.each(Rows::EXPS, t), rows.max[t], rows.sum[t], length);
      rows.confidence[t] = (log_k - entropy) / log_k;
      if (a.confidence) static_cast<State*>(a.confidence)[t * a.B + b] = State(rows.confidence[t]);
      rows.per_norm[t] = direct(z, rows.each(Rows::DIRECTION, t));
    }
    for (int64_t i = 0; i < a.T; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        const State *left = rows.each(Rows::DIRECTION, i), *right = rows.each(Rows::DIRECTION, j);
        const double product =
            sum_over<State>(length, [&](int64_t k) { return load_vector(left + k) * load_vector(right + k); });
        rows.similarity[i * a.T + j] = rows.similarity[j * a.T + i] = product * rows.per_norm[i] * rows.per_norm[j];
      }
    }
    for (int64_t i = 0; i < a.T; ++i) weigh_step(i, rows);
    if (!a.weights) return;
    State* out = static_cast<State*>(a.weights) + b * a.T * a.T;
    for (int64_t i = 0; i < a.T * a.T; ++i) out[i] = State(rows.weights[i]);
  }

  // What z / max(‖z‖, 1e-12) is a multiple of, with zeros as padding; returns the factor that is missing.
  State direct(const State* z, State* direction) const {
    std::memcpy(direction, z, a.K * sizeof(State));
    std::fill(direction + a.K, direction + length, State(0));
    const State* values = direction;
    const auto square = [&](int64_t i) { return load_vector(values + i) * load_vector(values + i); };
    const double squares = sum_over<State>(length, square);
    if (squares > 1e-20 && squares < 1e20) return State(1 / std::sqrt(squares));
    // Squares of numbers so large or small lose digits: the largest becomes 1 first.
    V most = {};
    for (int64_t i = 0; i < length; i += kLanes) {
      const V magnitude = magnitude_of(load_vector(values + i));
      most = magnitude > most ? magnitude : most;
    }
    const State largest = max_of_lanes<State>(most), scale = largest > 0 ? 1 / largest : State(0);
    for (int64_t i = 0; i < length; i += kLanes) store_vector(direction + i, load_vector(values + i) * scale);
    const double norm = std::sqrt(sum_over<State>(length, square));
    return State(largest / std::max(norm * largest, kNormEps));
  }

  void weigh_step(int64_t i, Rows& rows) const {
    double* weights = rows.weights.data() + i * a.T;
    double most = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int64_t j = 0; j < a.T; ++j) {
      weights[j] = rows.confidence[j] * rows.similarity[i * a.T + j];
      if (j != i) most = std::max(most, weights[j]);
    }
    State* factors = rows.factors.data();
    for (int64_t j = 0; j < a.T; ++j) factors[j] = j == i ? std::numeric_limits<State>::infinity() : State(most - weights[j]);
    for (int64_t j = 0; j < a.T; j += kLanes) {
      store_vector(factors + j, exp_negative(load_vector(static_cast<const State*>(factors) + j), State(1)));
    }
    for (int64_t j = 0; j < a.T; ++j) sum += weights[j] = factors[j];
    if (a.T > 1) {
      const double scale = 1 / sum;
      for (int64_t j = 0; j < a.T; ++j) weights[j] *= scale;
    }
  }

  // The parts of a sample's loss, and its gradient.
  void compare(int64_t b, int64_t label, Rows& rows) {
    double parts[3] = {};
    State* q = rows.once(Rows::TEACHER);
    read_row(static_cast<const State*>(a.teacher) + b * a.K, q);
    const S teacher = softmax(q, max_of_row(q, length), rows.once(Rows::TEACHER_EXPS));
    const bool sta = has_target();
    S target;
    if (a.objective == TDKD) target = mean_of_correct(label, rows);
    for (int64_t t = 0; t < a.T; ++t) {
      State *z = rows.each(Rows::LOGITS, t), *soft = rows.each(Rows::SOFT_EXPS, t), *g = rows.once(Rows::GRADIENT);
      const State* exps = rows.each(Rows::EXPS, t);
      const int64_t top = rows.top[t];
      parts[0] += std::log(rows.sum[t]) - (z[label] - rows.max[t]);
      if (a.objective == SEAL && sta) target = aligned(t, rows);
      const S student = summed(z, soft, rows.max[t], rows.soft_sum[t]);
      const State scale = 1 / rows.sum[t], step = State(1.0 / double(valid * a.T));
      const State ela = State(a.alpha * a.temperature), beta = State(a.beta * a.temperature);
      const auto temporal = [&](int64_t i, V& terms) {
        V sum = a.grad ? load_vector(exps + i) * scale : V{};
        if (!sta) return sum;
        terms += divergence(target, student, i);
        if (beta != 0) sum += beta * (student.probability(i) - target.probability(i));
        return sum;
      };
      const auto of_teacher = [&](const S& p, const S& s, int64_t i, V& terms) {
        terms += divergence(p, s, i);
        return ela * (s.probability(i) - p.probability(i));
      };
      double ela_part = 0, sta_part = 0;
      if (a.objective != SEAL || top == label) {
        sum_both<State>(length, ela_part, sta_part, [&](int64_t i, V& ela_terms, V& sta_terms) {
          const V sum = temporal(i, sta_terms), pull = of_teacher(teacher, student, i, ela_terms);
          if (a.grad) store_vector(g + i, (ela != 0 ? sum + pull : sum) * step);
        });
        if (a.grad) g[label] -= step;
      } else {
        double none;
        sum_both<State>(length, sta_part, none, [&](int64_t i, V& terms, V&) {
          const V sum = temporal(i, terms);
          if (a.grad) store_vector(g + i, sum);
        });
        // An erroneous step: the teacher's two entries agree, and the student's largest logit is the label's.
        State *teacher_exps = rows.once(Rows::TEACHER_EXPS), *places[] = {q, teacher_exps, z, soft};
        State kept[4][2];
        for (int row = 0; row < 4; ++row) {
          State &at_top = places[row][top], &at_label = places[row][label];
          kept[row][0] = at_top, kept[row][1] = at_label;
          if (row < 2) at_label = std::min(at_label, at_top);
          at_top = at_label;
        }
        const S p = changed(teacher, rows.once(Rows::AGREED_EXPS)), s = changed(student, rows.once(Rows::REPLACED_EXPS));
        sum_both<State>(length, ela_part, none, [&](int64_t i, V& terms, V&) {
          const V pull = of_teacher(p, s, i, terms);
          if (a.grad) {
            const V sum = load_vector(static_cast<const State*>(g) + i);
            store_vector(g + i, (ela != 0 ? sum + pull : sum) * step);
          }
        });
        if (a.grad) {
          g[label] -= step;
          if (ela != 0) {  // the gradient of the replaced logit goes to the label's
            const State moved = step * ela * (s.probability_of(top) - p.probability_of(top));
            g[top] -= moved;
            g[label] += moved;
          }
        }
        for (int row = 0; row < 4; ++row) places[row][top] = kept[row][0], places[row][label] = kept[row][1];
      }
      parts[1] += ela_part;
      parts[2] += sta_part;
      if (a.grad) write_row(g, grad_row(t, b));
    }
    const double squared = a.temperature * a.temperature;
    for (int part = 0; part < 3; ++part) samples[part * a.B + b] = parts[part] * (part ? squared : 1);
  }

  // Of a row in which a number was replaced: exponentials relative to what is no longer the maximum serve, unless that
  // was so far above the others that these vanished.
  S changed(const S& before, State* exps) const {
    const State sum = State(sum_over<State>(length, [&](int64_t i) { return load_vector(before.exps + i); }));
    if (sum < State(1e-20)) return softmax(before.row, max_of_row(before.row, length), exps);
    return summed(before.row, before.exps, before.max, sum);
  }

  S aligned(int64_t t, Rows& rows) const {
    return target([&](int64_t j) { return rows.weights[t * a.T + j]; }, rows);
  }

  S mean_of_correct(int64_t label, Rows& rows) const {
    const double correct = double(std::count(rows.top.begin(), rows.top.end(), label));
    return target([&](int64_t j) { return rows.top[j] == label ? 1 / correct : 0.0; }, rows);
  }

  // softmax of Σ_j weight(j) z_j; zeros where no step has a weight.
  template <typename Weight>
  S target(Weight weight, Rows& rows) const {
    State *row = rows.once(Rows::TARGET), *factors = rows.factors.data();
    int64_t count = 0;  // of steps that have a weight
    for (int64_t j = 0; j < a.T; ++j) {
      if (const State factor = State(weight(j)); factor != 0) factors[count] = factor, rows.taking_part[count++] = j;
    }
    const V none = V{} - std::numeric_limits<State>::infinity();
    V most = none;
    for (int64_t i = 0; i < length; i += kLanes) {
      V sum = {};
      for (int64_t j = 0; j < count; ++j) {
        const State* z = rows.each(Rows::LOGITS, rows.taking_part[j]);
        sum += factors[j] * load_vector(z + i);
      }
      store_vector(row + i, sum);
      most = sum > most ? sum : most;
    }
    if (count == 0) std::fill(row + a.K, row + length, -std::numeric_limits<State>::infinity());
    return softmax(row, max_of_lanes<State>(most), rows.once(Rows::TARGET_EXPS));
  }

  Gradient* grad_row(int64_t t, int64_t b) const { return static_cast<Gradient*>(a.grad) + (t * a.B + b) * a.K; }

  void write_row(const State* row, Gradient* to) const {
    int64_t i = 0;
    for (; i + kLanes <= a.K; i += kLanes) store_vector(to + i, load_vector(row + i));
    for (; i < a.K; ++i) store(to[i], row[i]);
  }
};

}  // namespace

SEAL_EXPORT(seal_scale)(const ScaleArguments* arguments) {
  return with_types(arguments->dtype, [&](auto types) {
    typedef typename decltype(types)::State State;
    auto* values = static_cast<typename decltype(types)::Number*>(arguments->values);
    scale(values, arguments->wide, *static_cast<const State*>(arguments->factor), arguments->count);
  });
}

SEAL_EXPORT(seal_loss)(LossArguments* arguments) {
  return with_types(arguments->dtype, [&](auto types) {
    Loss<typename decltype(types)::State, typename decltype(types)::Number>(*arguments).run();
  });
}
