// What comes between an expert's matrices, elementwise in float32: every operation below is rounded
// on its own, and none comes from the C library, so that every machine gives the bits of
// reference.py.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace smoe {

// By these names the manifest and the binding know them.
enum class Kind { gated, plain, clamped, bounded, softcapped };
constexpr const char* KINDS[] = {"gated", "plain", "clamped", "bounded", "softcapped"};
enum class Act { silu, gelu, gelu_tanh, relu, relu2, sigmoid, tanh, identity };
constexpr const char* ACTS[] = {"silu",  "gelu",    "gelu_tanh", "relu",
                                "relu2", "sigmoid", "tanh",      "identity"};

struct ExpertActivation {
    Kind kind;
    Act act;  // of gated, plain and bounded ones
    float alpha, limit;
};

}  // namespace smoe
