// The same with the dot product of ARMv8.2, which CMakeLists.txt allows in this file alone.
#include "neon.cpp"
