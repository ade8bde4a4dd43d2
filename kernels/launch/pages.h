// Pages of fresh memory.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

// Asks for pages of 2 MB where a large output may be fresh from the system. Linux clears and maps each page at its first
// touch, and in pages of 4 KB that takes several times as long as a kernel does.
inline void prefer_large_pages(void* start, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLarge = uintptr_t(2) << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(start) + kLarge - 1) / kLarge * kLarge;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + bytes) / kLarge * kLarge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}
