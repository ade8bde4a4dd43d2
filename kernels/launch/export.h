// Names that the library exports: each function once for each instruction set, as name_isa.
#pragma once

#define SEAL_JOIN_(name, isa) name##_##isa
#define SEAL_JOIN(name, isa) SEAL_JOIN_(name, isa)
#ifdef _WIN32
#define SEAL_EXPORT(name) extern "C" __declspec(dllexport) int SEAL_JOIN(name, SEAL_ISA)
#else
#define SEAL_EXPORT(name) extern "C" __attribute__((visibility("default"))) int SEAL_JOIN(name, SEAL_ISA)
#endif
