// The loops with AVX-512 (F, BW, DQ, VL); see CMakeLists.txt for its flags.
#if defined(__x86_64__)
#define FEDMOE_ISA avx512
#define FEDMOE_TABLE kAvx512
#define FEDMOE_NAME "AVX-512"
#include "loops.inl"
#endif
