// The loops with whatever the compiler's target has; see CMakeLists.txt for its flags.
#define FEDMOE_ISA portable
#define FEDMOE_TABLE kPortable
#define FEDMOE_NAME "portable"
#include "loops.inl"
