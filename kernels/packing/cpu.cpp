// Packed spikes back to numbers, and how many there are, on the CPU. Compiled once for each instruction set in ISA
// (setup.py).
#include "../launch/export.h"
#include "../launch/bits.h"
#include "../launch/pages.h"
#include "../launch/parallel.h"
#include "../launch/types.h"
#include "../launch/vector.h"

SEAL_STRUCT(UnpackArguments,
  const uint8_t* packed;  // [T, ceil(N/8)]
  void* spikes;           // [T, N]
  int64_t T, N;
  int32_t dtype, threads;
)

SEAL_STRUCT(CountArguments,
  const uint8_t* packed;  // [bytes]
  int64_t* count;         // gets the number of bits that are set
  int64_t bytes;
  int32_t threads;
)

namespace {

template <typename Number>
struct Eight { Number at[8]; };

template <typename State, typename Number>
void unpack(Types<State, Number>, const UnpackArguments& a) {
  Number one;
  store(one, State(1));
  Eight<Number> of_byte[256];
  for (int byte = 0; byte < 256; ++byte) {
    for (int bit = 0; bit < 8; ++bit) of_byte[byte].at[bit] = byte >> bit & 1 ? one : Number{};
  }
  constexpr int64_t kBytes = 1 << 13;  // that a thread takes at a time
  const int64_t bytes = (a.N + 7) / 8, pieces = (bytes + kBytes - 1) / kBytes;
  Number* spikes = static_cast<Number*>(a.spikes);
  prefer_large_pages(spikes, a.T * a.N * int64_t(sizeof(Number)));
#pragma omp parallel for schedule(static) num_threads(a.T * pieces > 1 ? a.threads : 1)
  for (int64_t piece = 0; piece < a.T * pieces; ++piece) {
    const int64_t t = piece / pieces, first = piece % pieces * kBytes, last = std::min(bytes, first + kBytes);
    const uint8_t* from = a.packed + t * bytes;
    Number* row = spikes + t * a.N;
    for (int64_t byte = first; byte < last; ++byte) {
      const int64_t count = std::min<int64_t>(8, a.N - 8 * byte);
      if (count == 8) {
        std::memcpy(row + 8 * byte, of_byte[from[byte]].at, sizeof(Eight<Number>));
      } else {
        std::memcpy(row + 8 * byte, of_byte[from[byte]].at, count * sizeof(Number));
      }
    }
  }
}

int64_t count(const CountArguments& a) {
  const int64_t words = a.bytes / 8;
  int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total) num_threads(words > kGrain ? a.threads : 1)
  for (int64_t i = 0; i < words; ++i) {
    uint64_t word;
    std::memcpy(&word, a.packed + 8 * i, 8);
    total += bits_set(word);
  }
  uint64_t rest = 0;
  if (a.bytes % 8) std::memcpy(&rest, a.packed + 8 * words, a.bytes % 8);
  return total + bits_set(rest);
}

}  // namespace

SEAL_EXPORT(seal_count)(const CountArguments* arguments) {
  *arguments->count = count(*arguments);
  return DONE;
}

SEAL_EXPORT(seal_unpack)(const UnpackArguments* arguments) {
  return with_types(arguments->dtype, [&](auto types) { unpack(types, *arguments); });
}
