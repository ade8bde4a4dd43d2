// The selective-alignment loss on the CPU; reference.py has its meaning and source. A thread takes a sample through all
// of it: the logits are read once, the gradient is written once, and what lies between stays in the caches.
//
// Rows of K numbers are padded to whole vectors with -inf, which adds nothing to any maximum, sum or divergence; for
// products with zeros. A stage goes through all steps before the next one starts, so that what a short row's sums wait
// for is hidden behind the next row.
// Compiled once for each instruction set in ISA (setup.py).
#include "../launch/export.h"
#include "../launch/rows.h"
#include "../launch/types.h"
#include "alignment.h"
#include "gradient.h"
#include "softmax.h"

#include <memory>
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

// Below this many logits a second thread costs more than it saves; a row costs as much as kFixed logits besides.
constexpr int64_t kGrain = 1 << 13, kFixed = 100;

template <typename State>
struct alignas(64) Line { State at[64 / sizeof(State)]; };

// What is known of a step's logits z.
template <typename State>
struct Step {
  Row<State> logits;
  const State* exps;               // e^(z - max)
  double below;                    // Σ exps · (max - z)
  Softmax<State> student, target;  // of z, and of what it is aligned with
};

template <typename State, typename Number>
class Loss {
 public:
  typedef Vector<State> V;
  typedef GradientOf<State, Number> Gradient;
  static constexpr int64_t kLanes = VectorOf<State>::kLanes;

  explicit Loss(LossArguments& arguments)
      : a(arguments), length(whole_vectors<State>(a.K)), log_k(std::log(double(a.K))), rate(State(1 / a.temperature)) {
    if (a.objective != SEAL && a.objective != KD && a.objective != TDKD) throw NoCode();
    for (int64_t b = 0; b < a.B; ++b) {
      const int64_t label = label_of(b);
      valid += label != kIgnored;
      arguments.outside |= label != kIgnored && (label < 0 || label >= a.K);
    }
    each = 1.0 / double(valid * a.T);
    ela = a.alpha * a.temperature * each;
    sta = a.beta * a.temperature * each;
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
  int64_t valid = 0;            // samples that are not ignored
  double each, ela, sta;        // what a step counts for in the loss; and its ELA and STA, over κ, in the gradient
  bool aligned_over_time;       // whether the steps' weights are asked for
  std::vector<double> samples;  // [3, B]: each sample's CE, ELA and STA

  // What a thread keeps of a sample.
  struct Rows {
    explicit Rows(const Loss& loss)
        : length(loss.length), count(loss.a.T),
          memory(new Line<State>[(kOnce + kEach * count) * length * sizeof(State) / 64 + 1]),
          steps(count), logits(count), correct(count), shares(count), largest(count),
          sums(whole_vectors<double>(count)), log_sums(sums.size()), weights(count) {
      for (int64_t t = 0; t < count; ++t) logits[t] = each(LOGITS, t);
    }

    enum { TEACHER, TEACHER_EXPS, AGREED, AGREED_EXPS, REPLACED, REPLACED_EXPS, kOnce };
    enum { LOGITS, EXPS, SOFT_EXPS, TARGET, TARGET_EXPS, kEach };

    State* once(int row) { return memory[0].at + row * length; }
    State* each(int row, int64_t t) { return memory[0].at + (kOnce + row * count + t) * length; }

    const int64_t length, count;
    std::unique_ptr<Line<State>[]> memory;
    std::vector<Step<State>> steps;
    std::vector<const State*> logits, correct;  // rows of all steps, and of the correct ones
    std::vector<State> shares;                  // of the correct ones in their mean
    std::vector<State> largest;                 // of the targets
    std::vector<double> sums, log_sums;         // of Step::exps
    StepWeights<State> weights;
    Softmax<State> teacher;
  };

  bool has_target() const { return a.objective == TDKD || (a.objective == SEAL && a.T > 1); }

  int64_t label_of(int64_t b) const {
    if (!a.labels) return 0;
    return a.wide_labels ? static_cast<const int64_t*>(a.labels)[b] : static_cast<const int32_t*>(a.labels)[b];
  }

  // Where κ is 3, as published, e^-x is the cube of e^(-x/κ).
  template <bool cubed>
  void exponentials_of(int64_t t, Rows& rows) const {
    Step<State>& step = rows.steps[t];
    const State *z = step.logits.at, max = step.logits.max, rate = this->rate;
    State *exps = rows.each(Rows::EXPS, t), *soft = rows.each(Rows::SOFT_EXPS, t);
    const V most = V{} + State(200);  // times what is so far below the largest number, an exponential is 0
    const auto sums = sums_over<State, 3>(length, [=](int64_t i, auto& parts) {
      const V below = max - load_vector(z + i), s = exp_negative(below, rate);
      V e;
      if constexpr (cubed) e = s * s * s;
      else e = exp_negative(below, State(1));
      store_vector(exps + i, e);
      store_vector(soft + i, s);
      parts[0] += e;
      parts[1] = fused(e, most < below ? most : below, parts[1]);
      parts[2] += s;
    });
    step.exps = exps;
    step.below = sums[1], rows.sums[t] = sums[0];
    step.student = {z, soft, max, sums[2], 1 / sums[2]};
  }

  void sample(int64_t b, Rows& rows) {
    const int64_t label = label_of(b);
    if (a.parts && label == kIgnored) return ignore(b);
    for (int64_t t = 0; t < a.T; ++t) {
      const Number* z = static_cast<const Number*>(a.logits) + t * a.stride_t + b * a.stride_b;
      rows.steps[t].logits = read_row<State>(z, a.K, rows.each(Rows::LOGITS, t));
    }
    for (int64_t t = 0; t < a.T; ++t) {
      a.temperature == 3 ? exponentials_of<true>(t, rows) : exponentials_of<false>(t, rows);
      if (aligned_over_time) pad_row(rows.each(Rows::LOGITS, t), a.K, State(0));
    }
    if (aligned_over_time) rows.weights.multiply(rows.logits.data(), length, rows.each(Rows::TARGET, 0));
    for (int64_t t = 0; t < a.T; t += VectorOf<double>::kLanes) {
      const double* sums = rows.sums.data() + t;
      store_vector(rows.log_sums.data() + t, log_positive(load_vector(sums)));
    }
    if (aligned_over_time) measure_confidence(b, rows);
    // The teacher's row and its exponentials are what lies between stages of the weights.
    Row<State> q = {};
    if (a.parts) q = read_row<State>(static_cast<const State*>(a.teacher) + b * a.K, a.K, rows.once(Rows::TEACHER));
    if (aligned_over_time) rows.weights.score();
    if (a.parts) rows.teacher = softmax<State>(q.at, q.max, rate, rows.once(Rows::TEACHER_EXPS), length);
    if (aligned_over_time) rows.weights.weigh();
    if (a.weights) std::copy_n(rows.weights.of(0), a.T * a.T, static_cast<State*>(a.weights) + b * a.T * a.T);
    if (!a.parts) return;
    aim(label, rows);
    compare(b, label, rows);
  }

  void ignore(int64_t b) {
    for (int part = 0; part < 3; ++part) samples[part * a.B + b] = 0;
    for (int64_t t = 0; t < a.T && a.grad; ++t) std::memset(grad_row(t, b), 0, a.K * sizeof(Gradient));
  }

  void measure_confidence(int64_t b, Rows& rows) const {
    for (int64_t t = 0; t < a.T; ++t) {
      const Step<State>& step = rows.steps[t];
      const double entropy = -negative_entropy(step.exps, rows.sums[t], rows.log_sums[t], step.below, length);
      const double confidence = rows.weights.confidence[t] = (log_k - entropy) / log_k;
      if (a.confidence) static_cast<State*>(a.confidence)[t * a.B + b] = State(confidence);
    }
  }

  // What the steps are aligned with: one target each, or the mean of the correct steps for all of them; where there is
  // none, each step itself.
  void aim(int64_t label, Rows& rows) const {
    const bool mean = a.objective == TDKD;
    const int64_t targets = !has_target() ? 0 : mean ? 1 : a.T, mixed = mean ? take_correct(label, rows) : a.T;
    const State* const* mixed_rows = (mean ? rows.correct : rows.logits).data();
    const State* weights = mean ? rows.shares.data() : rows.weights.of(0);
    State* to = rows.each(Rows::TARGET, 0);
    sums_of_rows(a.K, mixed_rows, mixed, weights, targets, to, rows.largest.data());
    for (int64_t t = 0; t < a.T; ++t) {
      Softmax<State>& target = rows.steps[t].target;
      if (t >= targets) target = targets ? rows.steps[0].target : rows.steps[t].student;
      else target = softmax<State>(to + t * length, rows.largest[t], rate, rows.each(Rows::TARGET_EXPS, t), length);
    }
  }

  // Takes the correct steps' logits and their share in the mean of them; returns how many there are.
  int64_t take_correct(int64_t label, Rows& rows) const {
    int64_t count = 0;
    for (const Step<State>& step : rows.steps) {
      if (step.logits.top == label) rows.correct[count++] = step.logits.at;
    }
    std::fill_n(rows.shares.begin(), count, State(1.0 / double(count)));
    return count;
  }

  // The parts of a sample's loss, and its gradient.
  void compare(int64_t b, int64_t label, Rows& rows) {
    double ce = 0;
    Divergences of_ela, of_sta;
    for (int64_t t = 0; t < a.T; ++t) {
      const Step<State>& step = rows.steps[t];
      const int64_t top = step.logits.top;
      const bool erroneous = a.objective == SEAL && top != label;
      const Pair pair = erroneous ? agreeing(step, label, rows) : Pair{rows.teacher, step.student, 0, 0};
      const Factors by = factors_of(step, rows.sums[t], pair);
      Gradient* grad = a.grad ? grad_row(t, b) : nullptr;
      const bool all = a.alpha != 0 && a.beta != 0 && has_target();
      const auto sums = !grad ? differences<false, false>(step, pair, by, grad)
                        : all ? differences<true, true>(step, pair, by, grad)
                              : differences<true, false>(step, pair, by, grad);
      ce += rows.log_sums[t] + (step.logits.max - step.logits.at[label]);
      of_ela.add(pair.teacher, pair.student, sums[0] + pair.difference);
      of_sta.add(step.target, step.student, sums[1]);
      if (!grad) continue;
      const auto pull_at = [&](int64_t k) {
        return pull_of<false>(step.exps, step.student, step.target, by, [=](const State* row) { return row[k]; });
      };
      State pull = pull_at(label);
      if (a.alpha != 0) {
        const State agreed = erroneous ? pair.agreed : pair.teacher.exps[label];
        const State to_ela = difference<State>(0, pair.student.exps[label], by.pair_student, agreed, by.pair_teacher);
        pull += erroneous ? 2 * to_ela : to_ela;  // the gradient of the replaced logit goes to the label's
      }
      store(grad[label], pull - State(each));
      if (erroneous) store(grad[top], pull_at(top));
    }
    const double squared = a.temperature * a.temperature;
    const double parts[] = {ce, squared * of_ela.value(rate), has_target() ? squared * of_sta.value(rate) : 0};
    for (int part = 0; part < 3; ++part) samples[part * a.B + b] = parts[part];
  }

  // What ELA compares. Of an erroneous step, the teacher's exponentials of two classes are 0 here, and `agreed` in
  // truth; these classes add `difference` to the sum of differences.
  struct Pair {
    Softmax<State> teacher, student;
    State agreed;
    double difference;
  };

  // Of an erroneous step: the teacher's two entries agree, and the student's largest logit is the label's.
  Pair agreeing(const Step<State>& step, int64_t label, Rows& rows) const {
    typedef typename VectorOf<State>::Index Index;
    const int64_t top = step.logits.top;
    const State *from = rows.teacher.exps, *student = step.student.exps, *q = rows.teacher.row;
    State* exps = rows.once(Rows::AGREED_EXPS);
    Indices<State> places = lane_numbers<State>();
    // Entries are left out: subtracting one from a sum would leave no digits where it is far above the others.
    const auto sums = sums_over<State, 2>(length, [=](int64_t i, auto& parts) mutable {
      const V zero = {}, others = places == Index(top) ? zero : load_vector(student + i);
      const V both = places == Index(top) ? zero : places == Index(label) ? zero : load_vector(from + i);
      store_vector(exps + i, both);
      parts[0] += both;
      parts[1] += others;
      places += Index(kLanes);
    });
    State agreed = std::min(from[top], from[label]);
    Softmax<State> p = {q, exps, rows.teacher.max, sums[0] + 2 * agreed}, s = step.student;
    s.sum = sums[1] + student[label];
    // Exponentials relative to what is no longer the maximum serve, unless that was so far above the others that these
    // vanished.
    if (p.sum < 1e-20) {
      const bool lower = q[top] < q[label];
      p = replaced(p, lower ? label : top, lower ? top : label, rows.once(Rows::AGREED), exps);
      agreed = exps[top];
      exps[top] = exps[label] = 0;
    }
    if (s.sum < 1e-20) s = replaced(s, top, label, rows.once(Rows::REPLACED), rows.once(Rows::REPLACED_EXPS));
    p.inverse = 1 / p.sum, s.inverse = 1 / s.sum;
    const State below = p.max - std::min(q[top], q[label]);
    return {p, s, agreed, add_difference<double>(0, 2 * agreed, below, s.max - s.row[label])};
  }

  // What exponentials count for in a gradient.
  struct Factors { State step, student, target, pair_student, pair_teacher; };

  Factors factors_of(const Step<State>& step, double sum, const Pair& pair) const {
    return {State(each / sum), State(sta * step.student.inverse), State(sta * step.target.inverse),
            State(ela * pair.student.inverse), State(ela * pair.teacher.inverse)};
  }

  // sum + a·by_a - b·by_b.
  template <typename Float>
  static SEAL_INLINE Float difference(Float sum, Float a, State by_a, Float b, State by_b) {
    return fused(b, Float{} - by_b, fused(a, Float{} + by_a, sum));
  }

  // A gradient but for that of ELA, by what takes a number or a vector of a row.
  template <bool aligned, typename At>
  SEAL_INLINE auto pull_of(const State* exps, const Softmax<State>& student, const Softmax<State>& target,
                           const Factors& by, At at) const {
    const auto sum = at(exps) * by.step;
    if (!aligned && (a.beta == 0 || !has_target())) return sum;
    return difference(sum, at(student.exps), by.student, at(target.exps), by.target);
  }

  // Sums of differences for ELA and STA; and the gradient where there is one, of all terms or of those that count. What
  // the loop needs is copied first, as for the compiler the gradient might lie over it.
  template <bool graded, bool all>
  std::array<double, 2> differences(const Step<State>& step, const Pair& pair, Factors by, Gradient* grad) const {
    const int64_t count = a.K;
    const State* exps = step.exps;
    const Softmax<State> student = step.student, target = step.target, p = pair.teacher, s = pair.student;
    return sums_over<State, 2>(length, [=](int64_t i, auto& terms) {
      const auto at = [=](const State* row) { return load_vector(row + i); };
      const auto compared = [=](V sum, const Softmax<State>& p, const Softmax<State>& q) {
        return add_difference<V>(sum, at(p.exps), p.max - at(p.row), q.max - at(q.row));
      };
      terms[0] = compared(terms[0], p, s);
      terms[1] = compared(terms[1], target, student);
      if constexpr (graded) {
        V sum = pull_of<all>(exps, student, target, by, at);
        if (all || a.alpha != 0) sum = difference(sum, at(s.exps), by.pair_student, at(p.exps), by.pair_teacher);
        if (i + kLanes <= count) store_vector(grad + i, sum);
        else store_part(grad + i, count - i, sum);
      }
    });
  }

  // Of a row whose number at `at` is replaced by the one at `from`.
  Softmax<State> replaced(const Softmax<State>& before, int64_t at, int64_t from, State* row, State* exps) const {
    std::copy_n(before.row, length, row);
    pad_row(row, a.K, -std::numeric_limits<State>::infinity());
    row[at] = row[from];
    return softmax<State>(row, max_of_row<State>(row, length), rate, exps, length);
  }

  Gradient* grad_row(int64_t t, int64_t b) const { return static_cast<Gradient*>(a.grad) + (t * a.B + b) * a.K; }
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
