// Whether this processor runs the instruction set that this file was compiled for, and what the library was built from.
#include "export.h"

#include <cstdint>

SEAL_EXPORT(seal_cpu_runs)() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

// The digest of sources.py.
SEAL_EXPORT(seal_cpu_sources)(uint64_t* digest) {
  *digest = SEAL_SOURCES;
  return 0;
}
