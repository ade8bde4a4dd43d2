// What the loss's kernels are made of: sums of exponentials that threads merge.
//
// Such a sum is relative to the largest of its exponents so far, and is scaled where a larger one comes.
#pragma once
#include "../launch/access.cuh"

constexpr int MAX_WARPS = 16;  // of a block; this and what shared memory holds as in cupy.py
constexpr int NOWHERE = 0x7fffffff;
constexpr float LOWEST = -3.402823466e38f;  // stands for -inf, whose distance to itself is no number
constexpr float LOG2_E = 1.44269504f;

template <int VECTOR, typename Number>
SEAL_FN Group<float, VECTOR> floats(const Number* from) {
  const Group<Number, VECTOR> numbers = read<VECTOR>(from);
  Group<float, VECTOR> wide;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) wide.at[i] = static_cast<float>(load(numbers.at[i]));
  return wide;
}

SEAL_FN float infinity() { return from_bits(0x7f800000u); }

// 2^x and log2(x) in one instruction each. What is below 2^-126 is 0 to them, where it is added to 1e-8 or more.
#ifdef __CUDACC__
SEAL_FN float power_of_two(float x) {  // right but for two units in the last place
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SEAL_FN float binary_logarithm(float x) {  // right but for 2^-22, of the number or where x is from 1/2 to 2
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
SEAL_FN float power_of_two(float x) { return exp2f(x); }
SEAL_FN float binary_logarithm(float x) { return log2f(x); }
#endif

// A row's largest logit, and sums of exp(z - next) and exp((z - next)/κ) over all classes but that one.
struct Peak {
  float top = -infinity();
  int at = NOWHERE;  // the first class that has it; NOWHERE if none does, as with NaN alone
  float next = LOWEST;  // the largest of the others
  float sum = 0.0f, soft_sum = 0.0f;

  SEAL_INLINE void add_other(float z, float more, float soft_more, float rate) {
    const float distance = z - next, down = -fabsf(distance);
    const bool higher = distance > 0.0f;
    const float scale = power_of_two(down * LOG2_E), soft_scale = power_of_two(down * rate);
    sum = __fmaf_rn(higher ? sum : more, scale, higher ? more : sum);
    soft_sum = __fmaf_rn(higher ? soft_sum : soft_more, soft_scale, higher ? soft_more : soft_sum);
    next = higher ? z : next;
  }
  SEAL_INLINE void add(float z, int k, float rate) {
    z = z < LOWEST ? LOWEST : z;
    const bool first = z > top;
    add_other(first ? top : z, 1.0f, 1.0f, rate);
    top = first ? z : top;
    at = first ? k : at;
  }
  SEAL_INLINE void merge(const Peak& other, float rate) {
    const bool beaten = other.top > top || (!(top > other.top) && other.at < at);
    const float loser = beaten ? top : other.top;
    top = beaten ? other.top : top;
    at = beaten ? other.at : at;
    add_other(other.next, other.sum, other.soft_sum, rate);
    add_other(loser, 1.0f, 1.0f, rate);
  }
};

// Towards KL(softmax(target/κ) ‖ softmax(student/κ)): the sums of e = exp((target - top)/κ) and
// e·(target - top - student).
struct Divergence {
  float top = LOWEST, sum = 0.0f, excess = 0.0f;

  SEAL_INLINE void add(float target, float student, float rate) {
    const float distance = target - top, scale = power_of_two(-fabsf(distance) * rate);
    const bool higher = distance > 0.0f;
    // A target of -inf has probability 0, and adds nothing even where the student's logit is -inf as well.
    const float more = target < LOWEST ? 0.0f : (higher ? 0.0f : distance) - student;
    excess = higher ? __fmaf_rn(__fmaf_rn(-sum, distance, excess), scale, more) : __fmaf_rn(scale, more, excess);
    sum = higher ? __fmaf_rn(sum, scale, 1.0f) : sum + scale;
    top = higher ? target : top;
  }
  SEAL_INLINE void merge(const Divergence& other, float rate) {
    const float distance = other.top - top, scale = power_of_two(-fabsf(distance) * rate);
    const bool higher = distance > 0.0f;
    const Divergence low = higher ? *this : other, high = higher ? other : *this;
    excess = __fmaf_rn(__fmaf_rn(-low.sum, fabsf(distance), low.excess), scale, high.excess);
    sum = __fmaf_rn(low.sum, scale, high.sum);
    top = high.top;
  }
};

template <int SIZE>
struct Sums {
  float at[SIZE] = {};

  SEAL_INLINE void merge(const Sums& other, float) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) at[i] += other.at[i];
  }
};

template <typename State>
SEAL_FN State of_lane(const State& mine, int lanes) {
  uint32_t words[sizeof(State) / 4];
  memcpy(words, &mine, sizeof words);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(State) / 4); ++i) {
    words[i] = __shfl_xor_sync(0xffffffffu, words[i], lanes);
  }
  State theirs;
  memcpy(&theirs, words, sizeof words);
  return theirs;
}

template <typename State>
SEAL_FN void merge_warp(State& state, float rate) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) state.merge(of_lane(state, lanes), rate);
}

constexpr int BOARD = 8;  // words for a state

// Merges the states of a team's threads; all get the same bits.
template <int TEAM>
struct Team {
  uint32_t* board;  // in shared memory, two places a warp: one is written while others read the other
  int warp, turn;

  template <typename State>
  SEAL_INLINE void merge(State& state, float rate) {
    merge_warp(state, rate);
    if (TEAM == 1) return;
    static_assert(sizeof(State) <= BOARD * 4, "the board is too small");
    uint32_t* places = board + turn * MAX_WARPS * BOARD;
    if (threadIdx.x % 32 == 0) memcpy(places + warp * BOARD, &state, sizeof state);
    __syncthreads();
    places += warp / TEAM * TEAM * BOARD;
    memcpy(&state, places, sizeof state);
#pragma unroll
    for (int member = 1; member < TEAM; ++member) {
      State other;
      memcpy(&other, places + member * BOARD, sizeof other);
      state.merge(other, rate);
    }
    turn ^= 1;
  }
};
