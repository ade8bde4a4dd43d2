// What the library exports: each name once for each instruction set, as name_isa.
//
// Structs and enumerations that calls pass are written once, in C++. The library tells their text, by which
// launch/cpu.py lays out what it passes and numbers what it names.
#pragma once

#ifdef SEAL_ENUM
#error "export.h comes before the headers that it exports enumerations of"
#endif

#define SEAL_JOIN_(name, isa) name##_##isa
#define SEAL_JOIN(name, isa) SEAL_JOIN_(name, isa)
#ifdef _WIN32
#define SEAL_VISIBLE extern "C" __declspec(dllexport)
#else
#define SEAL_VISIBLE extern "C" __attribute__((visibility("default"), used))
#endif
#define SEAL_EXPORT(name) SEAL_VISIBLE int SEAL_JOIN(name, SEAL_ISA)

// Exports `words` and a size as of `name`; files that include the same header share one copy.
#define SEAL_TEXT(name, size, words)                                          \
  SEAL_VISIBLE inline int SEAL_JOIN(seal_text_##name, SEAL_ISA)(const char** text) { \
    *text = words;                                                            \
    return int(size);                                                         \
  }

// A struct of pointers, int64_t, double, int32_t and such structs: SEAL_STRUCT(Name, type a, *b; type c;).
#define SEAL_STRUCT(name, ...)  \
  struct name { __VA_ARGS__ }; \
  SEAL_TEXT(name, sizeof(name), #__VA_ARGS__)

// An enumeration that counts from 0: SEAL_ENUM(Name, FIRST, SECOND). Python has the same names in lower case.
#define SEAL_ENUM(name, ...)    \
  enum name { __VA_ARGS__ };   \
  SEAL_TEXT(name, sizeof(int), #__VA_ARGS__)
