// The selective-alignment distillation loss (arXiv 2605.14252) and its gradient in CUDA C++, as reference.py has them.
//
// A block takes a sample, and a team of TEAM of its warps a row at a time: the K logits z of one time step. Sums of
// exponentials are taken in one sweep: where a larger number comes, the sum so far is scaled to it. Each row is swept
// 1. for its largest logit, and the exponentials of the others; 2. for its confidence, and its divergence from the
// teacher; 3. for its products with the other rows. Then all rows know all weights, and each is swept 4. for the
// divergence from its target, and 5. for the gradient. KEPT says what of the sample is in shared memory meanwhile. The
// last block to finish adds up the samples, in their order.
#include "gradient.cuh"
#include "sums.cuh"

SEAL_ENUM(Objective, SEAL, KD, TDKD, WEIGHTS)  // the last gives the weights of SEAL and no loss
// In shared memory: neither, so that the steps and their table are in a workspace; both of these; the logits as well.
SEAL_ENUM(Kept, NOTHING, TABLE, SAMPLE)
constexpr int PRODUCTS = 4;    // rows that a row is multiplied with at once
constexpr int IGNORED = -100;  // a label

struct alignas(16) Step {  // what the block knows of a time step
  float top, inverse_sum;            // softmax(z) is exp(z - top)·inverse_sum
  float centre;                      // the largest logit of ELA's student
  float student_scale, soft_scale;   // of exp((z - centre)/κ): to ELA's student, and to softmax(z/κ)
  float soft_top, soft_log;          // softmax(z/κ) of the largest logit, and -log of it
  float agreed;                      // the teacher's replaced logits
  float teacher_top, teacher_scale;  // the teacher is exp((q' - teacher_top)/κ)·teacher_scale
  float norm, confidence;
  int at, wrong;                     // the prediction; whether logits are replaced
};

// Offsets within memory: shared memory is small.
template <bool ON_CHIP>
struct IndexOf { typedef int type; };
template <>
struct IndexOf<false> { typedef int64_t type; };

// Of a block that is specialised for so many steps. 24 warps have 80 registers a thread, with which nothing spills.
template <int STEPS, int TEAM>
constexpr int WARPS = STEPS ? STEPS * TEAM : MAX_WARPS;
constexpr int RESIDENT = 24;

template <typename Number, typename Teacher, typename Label, int VECTOR, int TEAM, int STEPS, int KEPT,
          int OBJECTIVE, bool GRADIENT>
__global__ void __launch_bounds__((WARPS<STEPS, TEAM>) * 32, RESIDENT / (WARPS<STEPS, TEAM>)) seal_loss(
    const Number* __restrict__ logits,     // [T, B, K]
    const Teacher* __restrict__ teacher,   // [B, K]
    const Label* __restrict__ labels,      // [B]
    const int64_t* __restrict__ counted,   // how many samples are not ignored, or null: count them
    typename GradientOf<Number>::type* __restrict__ grad,  // with GRADIENT, [T, B, K] contiguous
    float* partials,                       // [3, B]: ce, ela and sta of each sample, summed over T
    int* counter,                          // blocks that have finished; 0 before and after
    float* __restrict__ parts,             // loss, ce, ela, sta
    float* __restrict__ weights,           // with WEIGHTS, [B, T, T]
    float* __restrict__ confidence,        // with WEIGHTS, [T, B]
    float* workspace,                      // with NOTHING kept, room for T Steps and a table for each sample
    int64_t steps,                         // T
    int64_t B,
    int64_t classes,                       // K
    int64_t step_stride,
    int64_t sample_stride,
    int64_t class_stride,                  // this and the teacher's are 1 where VECTOR is not
    int64_t teacher_stride,
    int64_t teacher_class_stride,
    int64_t label_stride,
    float alpha,
    float beta,
    float temperature,
    float log_classes) {
  static_assert(OBJECTIVE >= SEAL && OBJECTIVE <= WEIGHTS && KEPT >= NOTHING && KEPT <= SAMPLE, "no such enumerator");
  constexpr bool ON_CHIP = KEPT == SAMPLE;
  typedef typename IndexOf<ON_CHIP>::type Index;
  typedef typename IndexOf<KEPT != NOTHING>::type Entry;  // of the table
  constexpr int UNROLLED = STEPS ? STEPS : 4;
  constexpr bool SIMILAR = OBJECTIVE == SEAL || OBJECTIVE == WEIGHTS, LOSS = OBJECTIVE != WEIGHTS;
  const int T = STEPS ? STEPS : static_cast<int>(steps), K = static_cast<int>(classes);
  const bool targets = OBJECTIVE == TDKD || (OBJECTIVE == SEAL && T > 1);  // there is an sta
  const int64_t b = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int team = warp / TEAM, teams = warps / TEAM, member = warp % TEAM;
  const int begin = (member * 32 + lane) * VECTOR, stride = TEAM * 32 * VECTOR;  // of a thread's classes
  const bool leader = member == 0 && lane == 0;
  const float inverse_temperature = 1.0f / temperature, rate = LOG2_E * inverse_temperature;

  extern __shared__ uint4 memory[];
  uint32_t* board = reinterpret_cast<uint32_t*>(memory);
  float* totals = reinterpret_cast<float*>(board + 2 * MAX_WARPS * BOARD);  // [MAX_WARPS, 4]
  const Entry table_size = (static_cast<Entry>(T) * T + 3) / 4 * 4;
  const int64_t before = b * (T * static_cast<int64_t>(sizeof(Step) / 4) + table_size);  // samples in the workspace
  Step* of = reinterpret_cast<Step*>(KEPT == NOTHING ? workspace + before : totals + MAX_WARPS * 4);  // [T]
  float* table = reinterpret_cast<float*>(of + T);  // [T, T]: products of rows, then weights
  float* chip_teacher = table + table_size;         // with ON_CHIP, [K]
  Number* chip_logits = reinterpret_cast<Number*>(chip_teacher + (LOSS ? (K + 3) / 4 * 4 : 0));  // [T, chip_stride]
  const Index chip_stride = (K * sizeof(Number) + 15) / 16 * (16 / sizeof(Number));

  const int64_t label = LOSS ? static_cast<int64_t>(labels[b * label_stride]) : 0;
  const bool ignored = LOSS && label == IGNORED, known = label >= 0 && label < K;
  const int y = known ? static_cast<int>(label) : 0;
  if (LOSS && !counted) {
    int valid = 0;
    for (int64_t i = threadIdx.x; i - lane < B; i += blockDim.x) {
      valid += __popc(__ballot_sync(0xffffffffu, i < B && labels[(i < B ? i : 0) * label_stride] != IGNORED));
    }
    if (lane == 0) totals[warp * 4 + 3] = __int_as_float(valid);
  }
  logits += b * sample_stride;
  if (LOSS) teacher += b * teacher_stride;
  if (ON_CHIP && !ignored) {
    for (int t = team; t < T; t += teams) {
      const Number* row = logits + t * step_stride;
#pragma unroll 4
      for (int k = begin; k < K; k += stride) {
        write(chip_logits + t * chip_stride + k, read<VECTOR>(row + (VECTOR > 1 ? k : k * class_stride)));
      }
    }
#pragma unroll 4
    for (int k = threadIdx.x * VECTOR; LOSS && k < K; k += blockDim.x * VECTOR) {
      write(chip_teacher + k, floats<VECTOR>(teacher + (VECTOR > 1 ? k : k * teacher_class_stride)));
    }
  }
  __syncthreads();
  int64_t valid = 0;
  if (LOSS && counted) valid = *counted;
  for (int i = 0; LOSS && !counted && i < warps; ++i) valid += __float_as_int(totals[i * 4 + 3]);

  const Number* const rows = ON_CHIP ? chip_logits : logits;
  const Index row_stride = ON_CHIP ? chip_stride : step_stride;
  const Index next_class = ON_CHIP || VECTOR > 1 ? 1 : class_stride;
  const auto of_table = [&](int t) { return table + static_cast<Entry>(t) * T; };
  const auto logit = [&](int t, int k) { return load(rows[t * row_stride + k * next_class]); };
  const auto logits_from = [&](int t, int k) { return floats<VECTOR>(rows + t * row_stride + k * next_class); };
  const auto teacher_logit = [&](int k) {
    return ON_CHIP ? chip_teacher[k] : static_cast<float>(load(teacher[k * teacher_class_stride]));
  };
  const auto teacher_from = [&](int k) {
    return ON_CHIP ? floats<VECTOR>(chip_teacher + k)
                   : floats<VECTOR>(teacher + (VECTOR > 1 ? k : k * teacher_class_stride));
  };
  Team<TEAM> together = {board, warp, 0};
  float ce = 0.0f, ela = 0.0f, sta = 0.0f;

  for (int t = team; t < T && !ignored; t += teams) {
    Peak peak;
#pragma unroll 1
    for (int k = begin; k < K; k += stride) {
      const Group<float, VECTOR> z = logits_from(t, k);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) peak.add(z.at[i], k + i, rate);
    }
    together.merge(peak, rate);

    // A label out of range, which the host cannot see, makes the loss NaN.
    const float of_label = known ? logit(t, y) : from_bits(0x7fc00000u);
    const float others = power_of_two((peak.next - peak.top) * LOG2_E) * peak.sum;
    const float soft_next = power_of_two((peak.next - peak.top) * rate), soft_others = soft_next * peak.soft_sum;
    Step step;
    step.at = peak.at < K ? peak.at : 0;
    step.wrong = OBJECTIVE == SEAL && step.at != y;
    step.top = peak.top;
    step.inverse_sum = 1.0f / (1.0f + others);
    step.soft_top = 1.0f / (1.0f + soft_others);
    step.soft_log = log1pf(soft_others);
    step.soft_scale = step.wrong ? soft_next * step.soft_top : step.soft_top;
    step.centre = step.wrong ? peak.next : peak.top;
    const float student_sum =
        step.wrong ? peak.soft_sum + power_of_two((of_label - peak.next) * rate) : 1.0f + soft_others;
    step.student_scale = 1.0f / student_sum;
    step.agreed = 0.0f;
    if (step.wrong) {
      const float right = teacher_logit(y), predicted = teacher_logit(step.at);
      step.agreed = right < predicted || right != right ? right : predicted;
    }

    Divergence from_teacher;
    Sums<1> negative_entropy;
#pragma unroll 1
    for (int k = begin; k < K; k += stride) {
      const Group<float, VECTOR> z = logits_from(t, k);
#pragma unroll
      for (int i = 0; SIMILAR && i < VECTOR; ++i) {
        const float p = power_of_two((z.at[i] - step.top) * LOG2_E) * step.inverse_sum;
        negative_entropy.at[0] = __fmaf_rn(p, binary_logarithm(p + 1e-8f), negative_entropy.at[0]);
      }
      if (!LOSS) continue;
      const Group<float, VECTOR> q = teacher_from(k);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const bool predicted = step.wrong && k + i == step.at, replaced = predicted || (step.wrong && k + i == y);
        const float student = predicted ? of_label : z.at[i];
        from_teacher.add(replaced ? step.agreed : q.at[i], student - step.centre, rate);
      }
    }
    if (SIMILAR) together.merge(negative_entropy, rate);
    step.confidence = (log_classes + negative_entropy.at[0] / LOG2_E) / log_classes;
    if (LOSS) together.merge(from_teacher, rate);
    step.teacher_top = from_teacher.top;
    step.teacher_scale = 1.0f / from_teacher.sum;
    ce += (peak.top - of_label) + log1pf(others);
    ela += from_teacher.excess * inverse_temperature * step.teacher_scale + logf(student_sum) - logf(from_teacher.sum);

    step.norm = 0.0f;
    for (int first = 0; SIMILAR && first < T; first += PRODUCTS) {
      Sums<PRODUCTS> products;
#pragma unroll 1
      for (int k = begin; k < K; k += stride) {
        const Group<float, VECTOR> z = logits_from(t, k);
#pragma unroll
        for (int j = 0; j < PRODUCTS; ++j) {
          if (first + j >= T) break;
          const Group<float, VECTOR> other = logits_from(first + j, k);
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) products.at[j] = __fmaf_rn(z.at[i], other.at[i], products.at[j]);
        }
      }
      together.merge(products, rate);
#pragma unroll
      for (int j = 0; j < PRODUCTS; ++j) {
        if (first + j >= T) break;
        if (leader) of_table(t)[first + j] = products.at[j];
        if (first + j == t) step.norm = fmaxf(sqrtf(products.at[j]), 1e-12f);
      }
    }
    if (leader) of[t] = step;
  }
  __syncthreads();

  for (int t = team; t < T && !ignored; t += teams) {
    const Step step = of[t];
    if (member == 0 && (targets || !LOSS)) {
      float* const weight = of_table(t);
      float largest = LOWEST;
#pragma unroll 1
      for (int j = lane; SIMILAR && j < T; j += 32) {
        const float score = of[j].confidence * (weight[j] / (step.norm * of[j].norm));
        weight[j] = j != t ? score : -infinity();
        largest = fmaxf(largest, weight[j]);
      }
#pragma unroll
      for (int lanes = 16; SIMILAR && lanes; lanes /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
      }
      Sums<1> sum;
#pragma unroll 1
      for (int j = lane; j < T; j += 32) {
        weight[j] = SIMILAR ? power_of_two((weight[j] - largest) * LOG2_E) : of[j].at == y ? 1.0f : 0.0f;
        sum.at[0] += weight[j];
      }
      merge_warp(sum, rate);
      if (sum.at[0] == 0.0f) sum.at[0] = 1.0f;  // no step is right, or there is no other
#pragma unroll 1
      for (int j = lane; j < T; j += 32) {
        weight[j] /= sum.at[0];
        if (!LOSS) weights[(b * T + t) * T + j] = weight[j];
      }
      if (!LOSS && lane == 0) confidence[t * B + b] = step.confidence;
    }
    if (!LOSS) continue;
    if (TEAM > 1) __syncthreads();
    else __syncwarp();

    const auto target_from = [&](int k) {
      Group<float, VECTOR> target = {};
#pragma unroll UNROLLED
      for (int j = 0; j < T; ++j) {
        const float weight = of_table(t)[j];
        const Group<float, VECTOR> z = logits_from(j, k);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          const float taken = OBJECTIVE == TDKD && weight == 0.0f ? 0.0f : z.at[i];  // 0·inf is NaN
          target.at[i] = __fmaf_rn(weight, taken, target.at[i]);
        }
      }
      return target;
    };
    Divergence from_target;
#pragma unroll 1
    for (int k = begin; targets && k < K; k += stride) {
      const Group<float, VECTOR> z = logits_from(t, k), target = target_from(k);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) from_target.add(target.at[i], z.at[i] - step.top, rate);
    }
    if (targets) together.merge(from_target, rate);
    const float target_scale = 1.0f / from_target.sum;
    if (targets) {
      sta += from_target.excess * inverse_temperature * target_scale + step.soft_log - logf(from_target.sum);
    }
    if (!GRADIENT) continue;

    const float each = 1.0f / (static_cast<float>(T) * static_cast<float>(valid));
    const float of_ela = alpha * temperature * each, of_sta = targets ? beta * temperature * each : 0.0f;
    const float of_p = each * step.inverse_sum, of_teacher = of_ela * step.teacher_scale;
    const float of_student = of_ela * step.student_scale, of_soft = of_sta * step.soft_scale;
    const float of_target = of_sta * target_scale, at_top = of_sta * step.soft_top;
    for (int k = begin; k < K; k += stride) {
      const Group<float, VECTOR> z = logits_from(t, k);
      float gradient[VECTOR], soft[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        soft[i] = power_of_two((z.at[i] - step.centre) * rate);
        const float p = power_of_two((z.at[i] - step.top) * LOG2_E);
        gradient[i] = __fmaf_rn(p, of_p, k + i == y ? -each : 0.0f);
      }
      if (of_ela != 0.0f) {  // 0·inf is NaN
        const Group<float, VECTOR> q = teacher_from(k);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          const bool right = step.wrong && k + i == y;
          const float logit = right ? step.agreed : q.at[i];
          const float taught = power_of_two((logit - step.teacher_top) * rate);
          const float difference = __fmaf_rn(taught, -of_teacher, soft[i] * of_student);
          // The gradient of the label's logit where it stands for the prediction's.
          gradient[i] += step.wrong && k + i == step.at ? 0.0f : right ? 2.0f * difference : difference;
        }
      }
      if (of_sta != 0.0f) {
        const Group<float, VECTOR> target = target_from(k);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          gradient[i] += step.wrong && k + i == step.at ? at_top : soft[i] * of_soft;
          gradient[i] = __fmaf_rn(power_of_two((target.at[i] - from_target.top) * rate), -of_target, gradient[i]);
        }
      }
      Group<typename GradientOf<Number>::type, VECTOR> out;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) store(out.at[i], gradient[i]);
      write(grad + (t * B + b) * K + k, out);
    }
  }
  if (!LOSS) return;
  if (GRADIENT && ignored) {
    Group<typename GradientOf<Number>::type, VECTOR> none;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) store(none.at[i], 0.0f);
    for (int t = team; t < T; t += teams) {
#pragma unroll 1
      for (int k = begin; k < K; k += stride) write(grad + (t * B + b) * K + k, none);
    }
  }

  if (leader) {
    totals[team * 4] = ce;
    totals[team * 4 + 1] = temperature * temperature * ela;
    totals[team * 4 + 2] = temperature * temperature * sta;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int part = 0; part < 3; ++part) {
      float total = 0.0f;
      for (int i = 0; i < teams; ++i) total += totals[i * 4 + part];
      partials[part * B + b] = total;
    }
    __threadfence();
    board[0] = atomicAdd(counter, 1) == static_cast<int>(B - 1);
  }
  __syncthreads();
  if (!board[0]) return;
  __threadfence();
  Sums<3> sums;
  for (int64_t i = threadIdx.x; i < B; i += blockDim.x) {
#pragma unroll
    for (int part = 0; part < 3; ++part) sums.at[part] += __ldcg(partials + part * B + i);
  }
  merge_warp(sums, rate);
  if (lane == 0) memcpy(totals + warp * 4, sums.at, sizeof sums);
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < warps; ++i) {
    for (int part = 0; part < 3; ++part) sums.at[part] += totals[i * 4 + part];
  }
  const float number = static_cast<float>(T) * static_cast<float>(valid);
  ce = sums.at[0] / number;
  ela = sums.at[1] / number;
  sta = targets ? sums.at[2] / number : 0.0f;
  parts[0] = ce + (alpha != 0.0f ? alpha * ela : 0.0f) + (beta != 0.0f ? beta * sta : 0.0f);
  parts[1] = ce;
  parts[2] = ela;
  parts[3] = sta;
  *counter = 0;
}
