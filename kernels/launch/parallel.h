// How a call's blocks are shared out among threads, and whether what they write stays in the caches.
#pragma once

#include "status.h"

#include "vector.h"

namespace {  // of each instruction set's own code

// Below this many numbers a second thread costs more than it saves.
constexpr int64_t kGrain = 1 << 14;

// Rows together larger than this do not stay in the caches of common processors until the next layer reads them.
constexpr int64_t kCached = int64_t(16) << 20;

// Whether T rows of N numbers are to be written past the caches, as BlockWriter can.
template <typename Number>
bool streams(const void* to, int64_t T, int64_t N) {
  const bool aligned = reinterpret_cast<uintptr_t>(to) % 64 == 0 && N * sizeof(Number) % 64 == 0;
  return aligned && T * N * int64_t(sizeof(Number)) > kCached;
}

// Calls action(start, count, work) for each block of N numbers, each of which takes `steps` numbers' time. A thread
// takes one run of neighbours, with a Work of its own that `prepare` is called for first, which may throw where memory
// is short, and `finish` at last.
template <typename Work, typename Prepare, typename Action, typename Finish>
void each_block_of(int64_t N, int64_t steps, int threads, Prepare prepare, Action action, Finish finish) {
  const int64_t blocks = (N + kBlock - 1) / kBlock;
  threads = int(std::clamp<int64_t>(std::min(steps * N / kGrain, blocks), 1, threads));
  Memory memory;
#pragma omp parallel num_threads(threads)
  {
    Work work;
    const bool ready = memory.got([&] { prepare(work); });
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t start = block * kBlock;
      if (ready) action(start, std::min<int64_t>(kBlock, N - start), work);
    }
    if (ready) finish(work);
    finish_streams();
  }
  memory.check();
}

}  // namespace
