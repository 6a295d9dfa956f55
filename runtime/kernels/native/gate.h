// What comes between an expert's matrices, elementwise in float32: every operation below is rounded on its own, and none
// comes from the C library, so that every machine gives the bits of reference.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace smoe {

// Codes are those of reference.py's order: KINDS and the keys of ACTIVATIONS.
enum class Kind { gated, plain, clamped, bounded, softcapped };
enum class Act { silu, gelu, gelu_tanh, relu, relu2, sigmoid, tanh, identity };

struct Gate {
    Kind kind;
    Act act;
    float alpha, limit;
};

}  // namespace smoe
