// Floats by their bits.
#pragma once
#include <cstdint>

namespace smoe {
namespace {  // each file its own: they are compiled for different instruction sets

inline float bits_to_float(std::uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
inline std::uint32_t float_to_bits(float value) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline std::uint16_t bf16_of(float value) {  // nearest even; NaN stays NaN
    const std::uint32_t bits = float_to_bits(value);
    const std::uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return value != value ? 0x7FC0 : std::uint16_t(rounded);
}
inline float from_bf16(std::uint16_t bits) { return bits_to_float(std::uint32_t(bits) << 16); }

// float16 to nearest even: normal numbers by their bits; smaller ones by adding a number whose last
// bit is that of the smallest float16. From 0x7C00 on, without the sign, it is too large.
inline std::uint32_t f16_size_of(std::uint32_t size) {
    const std::uint32_t normal = (size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13;
    const std::uint32_t small = float_to_bits(bits_to_float(size) + 0.5f) - 0x3F000000;
    return size < 0x38800000 ? small : normal;
}

}  // namespace
}  // namespace smoe
