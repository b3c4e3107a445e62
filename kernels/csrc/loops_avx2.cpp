// The loops with AVX2; see CMakeLists.txt for its flags.
#if defined(__x86_64__)
#define FEDMOE_ISA avx2
#define FEDMOE_TABLE kAvx2
#define FEDMOE_NAME "AVX2"
#include "loops.inl"
#endif
