// CUDA C++ for the host's compiler: what a .cu file expects to find declared, and blocks whose threads take turns.
//
// cuda_host.py puts this before a .cu file's text and a table of kernels behind it. The threads of a block are fibers
// of one operating-system thread. A fiber runs one thread after another until a thread waits for others; then the next
// fiber takes over. So a kernel without barriers and shuffles is a plain loop. Threads that wait for what cannot come
// are an error, as are wrong alignment and indices beyond a local array, which the compiler's checks report.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
static constexpr int warpSize = 32;

namespace cuda_host {

constexpr size_t STACK = 256 << 10;

enum State { NEW, READY, AT_BARRIER, IN_WARP, DONE };

struct Thread {
  State state = NEW;
  const char* operation = "";  // for which it waits
  int line = 0;
  uint32_t mask = 0;
  uint64_t value = 0;  // what it gives to its warp, then what it has received
  int source = 0;      // lane that it receives from; or BALLOT
  jmp_buf resume;
};
constexpr int BALLOT = -1;
constexpr uint4 NOTHING = {~0u, ~0u, ~0u, ~0u};
constexpr size_t MARGIN = 256;  // of these behind the launch's shared memory, which nothing may write

static std::vector<Thread> threads;
static std::vector<std::unique_ptr<char[]>> stacks;
static std::vector<int> ready;
static int current, started, waiting_at_barrier, fibers;
static jmp_buf scheduler;
static void (*call)(const void* const*);
static const void* const* parameters;
static std::vector<std::pair<const void*, std::vector<uint4>>> shared_memory;  // the first is that of the launch
static std::string error;

[[noreturn]] static void fail(const std::string& message) {
  char place[96];
  std::snprintf(place, sizeof place, " (block %u,%u, thread %u,%u)", blockIdx.x, blockIdx.y, threadIdx.x, threadIdx.y);
  error = message + place;
  _longjmp(scheduler, 2);
}

// Memory of the block for the variable that `key` stands for: the same for all threads, and NaN in the beginning.
static void* shared(const void* key, size_t bytes) {
  for (auto& memory : shared_memory) {
    if (memory.first == key) return memory.second.data();
  }
  shared_memory.emplace_back(key, std::vector<uint4>((bytes + sizeof(uint4) - 1) / sizeof(uint4), NOTHING));
  return shared_memory.back().second.data();
}

static std::string where(const Thread& thread) {
  return std::string(thread.operation) + " in line " + std::to_string(thread.line);
}

static void become(int thread) {
  current = thread;
  threadIdx = {thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y)};
}

static void fiber() {
  while (started < static_cast<int>(threads.size())) {
    // Every other block begins with its last thread, so that a missing barrier shows in one order or the other.
    const int next = started++;
    become(blockIdx.x % 2 ? static_cast<int>(threads.size()) - 1 - next : next);
    call(parameters);
    threads[current].state = DONE;
  }
  _longjmp(scheduler, 1);
}

// Lets other threads run until one makes this one ready.
static void wait() {
  if (_setjmp(threads[current].resume) == 0) _longjmp(scheduler, 1);
}

static void make_ready(int thread) {
  threads[thread].state = READY;
  if (thread != current) ready.push_back(thread);
}

__attribute__((noinline)) static void barrier(int line) {
  Thread& self = threads[current];
  self.state = AT_BARRIER;
  self.operation = "__syncthreads";
  self.line = line;
  if (++waiting_at_barrier < static_cast<int>(threads.size())) return wait();
  for (const Thread& thread : threads) {
    if (thread.line != line) fail("some threads wait at " + where(self) + ", others at " + where(thread));
  }
  waiting_at_barrier = 0;
  for (size_t i = 0; i < threads.size(); ++i) make_ready(static_cast<int>(i));
}

// Gives `value` to the warp's threads in `mask` once all of them have come here, and returns the one of `source`.
__attribute__((noinline)) static uint64_t exchange(
    const char* operation, int line, uint32_t mask, uint64_t value, int source) {
  const int warp = current / warpSize * warpSize, lane = current % warpSize;
  Thread& self = threads[current];
  self.state = IN_WARP;
  self.operation = operation;
  self.line = line;
  self.mask = mask;
  self.value = value;
  self.source = source;
  if (!(mask >> lane & 1)) fail(where(self) + " is called by lane " + std::to_string(lane) + ", which its mask lacks");
  if (source != BALLOT && !(mask >> source & 1)) {
    fail(where(self) + " reads lane " + std::to_string(source) + ", which its mask lacks");
  }
  bool complete = true;
  for (int other = 0; other < warpSize; ++other) {
    if (!(mask >> other & 1)) continue;
    if (warp + other >= static_cast<int>(threads.size())) {
      fail(where(self) + " names lane " + std::to_string(other) + ", which the block does not have");
    }
    const Thread& thread = threads[warp + other];
    complete &= thread.state == IN_WARP && thread.line == line && thread.mask == mask && thread.operation == operation;
  }
  if (!complete) {
    wait();
    return self.value;
  }
  uint64_t given[warpSize] = {}, ballot = 0;
  for (int other = 0; other < warpSize; ++other) {
    if (!(mask >> other & 1)) continue;
    given[other] = threads[warp + other].value;
    ballot |= static_cast<uint64_t>(given[other] != 0) << other;
  }
  for (int other = 0; other < warpSize; ++other) {
    if (!(mask >> other & 1)) continue;
    Thread& thread = threads[warp + other];
    thread.value = thread.source == BALLOT ? ballot : given[thread.source];
    make_ready(warp + other);
  }
  return self.value;
}

template <typename Value>
static Value shuffle(const char* operation, int line, uint32_t mask, Value value, int source) {
  static_assert(sizeof(Value) == 4 || sizeof(Value) == 8, "shuffles move 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(operation, line, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

static int lane() { return current % warpSize; }

template <typename Value>
static Value shuffle_lane(int line, uint32_t mask, Value value, int source, int width = warpSize) {
  return shuffle("__shfl_sync", line, mask, value, (lane() & -width) | (source & (width - 1)));
}
template <typename Value>
static Value shuffle_up(int line, uint32_t mask, Value value, unsigned lanes, int width = warpSize) {
  const int source = lane() - static_cast<int>(lanes);
  return shuffle("__shfl_up_sync", line, mask, value, source < (lane() & -width) ? lane() : source);
}
template <typename Value>
static Value shuffle_down(int line, uint32_t mask, Value value, unsigned lanes, int width = warpSize) {
  const int source = lane() + static_cast<int>(lanes);
  return shuffle("__shfl_down_sync", line, mask, value, source > (lane() | (width - 1)) ? lane() : source);
}
template <typename Value>
static Value shuffle_xor(int line, uint32_t mask, Value value, int lanes, int width = warpSize) {
  const int source = lane() ^ lanes;
  return shuffle("__shfl_xor_sync", line, mask, value, source > (lane() | (width - 1)) ? lane() : source);
}
static uint32_t ballot(const char* operation, int line, uint32_t mask, bool predicate) {
  return static_cast<uint32_t>(exchange(operation, line, mask, predicate, BALLOT));
}

static std::string stuck() {
  const Thread* waiting = nullptr;
  int finished = 0;
  std::string others;
  for (const Thread& thread : threads) {
    if (thread.state == DONE) ++finished;
    else if (!waiting) waiting = &thread;
    else if (others.empty() && (thread.line != waiting->line || thread.mask != waiting->mask)) {
      others = ", others wait at " + where(thread);
    }
  }
  const std::string all = std::to_string(threads.size());
  if (finished) others += ", and " + std::to_string(finished) + " of " + all + " have finished";
  return "some threads wait at " + where(*waiting) + others;
}

static void run_block() {
  for (Thread& thread : threads) thread.state = NEW;
  ready.clear();
  started = waiting_at_barrier = fibers = 0;
  for (auto& memory : shared_memory) std::fill(memory.second.begin(), memory.second.end(), NOTHING);

  const int arrived = _setjmp(scheduler);  // here a fiber comes back that waits, has no thread left, or has failed
  if (arrived == 2) return;
  if (started < static_cast<int>(threads.size())) {
    if (fibers == static_cast<int>(stacks.size())) stacks.emplace_back(new char[STACK]);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[fibers++].get();
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, fiber, 0);
    setcontext(&context);
  }
  if (!ready.empty()) {
    const int next = ready.back();
    ready.pop_back();
    become(next);
    _longjmp(threads[next].resume, 1);
  }
  const std::vector<uint4>& memory = shared_memory[0].second;
  for (size_t i = memory.size() - MARGIN; i < memory.size(); ++i) {
    if (std::memcmp(&memory[i], &NOTHING, sizeof NOTHING)) error = "shared memory is written behind the launch's";
  }
  for (const Thread& thread : threads) {
    if (thread.state == DONE) continue;
    error = stuck() + " (block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + ")";
    return;
  }
}

static const char* launch(
    void (*kernel)(const void* const*), const unsigned* sizes, bool backwards, size_t shared_bytes,
    const void* const* given) {
  gridDim = {sizes[0], sizes[1], sizes[2]};
  blockDim = {sizes[3], sizes[4], sizes[5]};
  call = kernel;
  parameters = given;
  error.clear();
  threads.assign(blockDim.x * blockDim.y * blockDim.z, Thread());
  shared_memory.clear();
  shared(nullptr, shared_bytes + MARGIN * sizeof(uint4));
  for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx.x = backwards ? gridDim.x - 1 - x : x;
        run_block();
        if (!error.empty()) return error.c_str();
      }
    }
  }
  return nullptr;
}

// A kernel's parameters: their types in words, and their values from an array of pointers.
template <typename T>
struct Name {
  static std::string text() { return "other"; }
};
template <typename T>
struct Name<T*> {
  static std::string text() { return Name<T>::text() + "*"; }
};
template <typename T>
struct Name<const T> {
  static std::string text() { return "const " + Name<T>::text(); }
};

template <auto KERNEL>
struct Kernel;
template <typename... Parameters, void (*KERNEL)(Parameters...)>
struct Kernel<KERNEL> {
  template <size_t... AT>
  static void apply(const void* const* given, std::index_sequence<AT...>) {
    KERNEL(*static_cast<const Parameters*>(given[AT])...);
  }
  static void call(const void* const* given) { apply(given, std::index_sequence_for<Parameters...>()); }
  static const char* signature() {
    static std::string text;
    text.clear();
    ((text += Name<Parameters>::text() + ","), ...);
    return text.c_str();
  }
};

}  // namespace cuda_host

struct bfloat16;
struct float16;

#define CUDA_HOST_NAME(type, name)         \
  template <>                              \
  struct cuda_host::Name<type> {           \
    static std::string text() { return name; } \
  };
CUDA_HOST_NAME(float, "float32")
CUDA_HOST_NAME(double, "float64")
CUDA_HOST_NAME(bfloat16, "bfloat16")
CUDA_HOST_NAME(float16, "float16")
CUDA_HOST_NAME(uint8_t, "uint8")
CUDA_HOST_NAME(int8_t, "int8")
CUDA_HOST_NAME(bool, "bool")
CUDA_HOST_NAME(int32_t, "int32")
CUDA_HOST_NAME(uint32_t, "uint32")
CUDA_HOST_NAME(int64_t, "int64")
CUDA_HOST_NAME(uint64_t, "uint64")

// What -fsanitize=alignment,null,bounds calls. Both kinds of data begin with the place in the source.
struct CudaHostPlace { const char* file; uint32_t line, column; };
extern "C" void __ubsan_handle_type_mismatch_v1(CudaHostPlace* place, uintptr_t pointer) {
  const char* what = pointer ? "access to a misaligned address" : "access through a null pointer";
  cuda_host::fail(what + std::string(" in line ") + std::to_string(place->line));
}
extern "C" void __ubsan_handle_out_of_bounds(CudaHostPlace* place, uintptr_t index) {
  cuda_host::fail("index " + std::to_string(index) + " is outside of its array in line " + std::to_string(place->line));
}

#define __syncthreads() cuda_host::barrier(__LINE__)
#define __syncwarp(...) cuda_host::ballot("__syncwarp", __LINE__, cuda_host_mask(__VA_ARGS__), false)
#define __shfl_sync(...) cuda_host::shuffle_lane(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) cuda_host::shuffle_up(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) cuda_host::shuffle_down(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) cuda_host::shuffle_xor(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, predicate) cuda_host::ballot("__ballot_sync", __LINE__, mask, predicate)
#define __any_sync(mask, predicate) (cuda_host::ballot("__any_sync", __LINE__, mask, predicate) != 0)
#define __all_sync(mask, predicate) (cuda_host::ballot("__all_sync", __LINE__, mask, predicate) == (mask))
static inline uint32_t cuda_host_mask(uint32_t mask = 0xffffffffu) { return mask; }
static inline void __threadfence() {}
static inline void __threadfence_block() {}

template <typename T>
static inline T __ldg(const T* from) { return *from; }
template <typename T>
static inline T __ldcg(const T* from) { return *from; }
template <typename T>
static inline T __ldcs(const T* from) { return *from; }
template <typename T>
static inline void __stwb(T* to, T value) { *to = value; }
template <typename T>
static inline void __stcg(T* to, T value) { *to = value; }
template <typename T>
static inline void __stcs(T* to, T value) { *to = value; }
template <typename T>
static inline T atomicAdd(T* to, std::common_type_t<T> value) { const T old = *to; *to = old + value; return old; }

static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fsqrt_rn(float a) { return std::sqrt(a); }
static inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
#define __expf(a) std::exp(static_cast<float>(a))  // functions of these names are in glibc
#define __logf(a) std::log(static_cast<float>(a))
static inline uint32_t __float_as_uint(float a) { uint32_t bits; std::memcpy(&bits, &a, 4); return bits; }
static inline int __float_as_int(float a) { int bits; std::memcpy(&bits, &a, 4); return bits; }
static inline float __uint_as_float(uint32_t a) { float value; std::memcpy(&value, &a, 4); return value; }
static inline float __int_as_float(int a) { float value; std::memcpy(&value, &a, 4); return value; }
static inline int __popc(uint32_t a) { return __builtin_popcount(a); }
static inline int __ffs(int a) { return __builtin_ffs(a); }
static inline int __clz(int a) { return a ? __builtin_clz(a) : 32; }
using std::max;
using std::min;
