// How a call ends, and what may be thrown on the way.
#pragma once

#include "export.h"

#include <new>
#include <stdexcept>

SEAL_ENUM(Status, DONE, NO_CODE, NO_MEMORY)

namespace {  // of each instruction set's own code

// Thrown where a number among the arguments stands for nothing that was compiled.
struct NoCode {};

template <typename Action>
int status_of(Action action) {
  try {
    action();
    return DONE;
  } catch (const NoCode&) {
    return NO_CODE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  } catch (const std::length_error&) {  // a vector longer than any memory
    return NO_MEMORY;
  }
}

// Whether the threads of a parallel region got their memory. Nothing may be thrown out of a region, and all of its
// threads must come to its loop: one that failed takes part and does nothing.
class Memory {
 public:
  // Whether action(), which takes a thread's memory, got it.
  template <typename Action>
  bool got(Action action) {
    if (status_of(action) == DONE) return true;
#pragma omp atomic
    failed |= 1;
    return false;
  }

  // Throws after the region where a thread failed.
  void check() const {
    if (failed) throw std::bad_alloc();
  }

 private:
  int failed = 0;
};

}  // namespace
