// Any processor: vectors of the compiler's own, and loops where it has none.
#include "ffn.h"

namespace smoe {
namespace {

typedef std::uint8_t Bytes __attribute__((vector_size(16)));
typedef std::int32_t Sums __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));
typedef std::uint32_t Words __attribute__((vector_size(16)));
constexpr std::size_t VECTOR = 16, OFFSET = 0, TOKENS = 4, VECTORS = 1;

inline Bytes bytes_at(const std::uint8_t* p) {
    Bytes v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline Bytes bytes_of(std::uint8_t b) { return Bytes{} + b; }
inline Bytes pick(Bytes m, Bytes a, Bytes b) { return (a & m) | (b & ~m); }
inline Bytes lower(Bytes v) { return v & 15; }
inline Bytes upper(Bytes v) { return v >> 4; }
inline Bytes table_of(const std::int8_t* t, std::uint8_t) {
    return bytes_at(reinterpret_cast<const std::uint8_t*>(t));
}
inline Bytes look_up(Bytes table, Bytes nibbles) { return __builtin_shuffle(table, nibbles); }
inline Bytes turned(Bytes v) { return v ^ 128; }
inline Bytes add(Bytes a, Bytes b) { return a + b; }
inline const std::int8_t* quad_at(const std::int8_t* p) { return p; }
inline Bytes codes_at(const std::int8_t* p) {
    return bytes_at(reinterpret_cast<const std::uint8_t*>(p));
}
inline Sums start(std::int32_t) { return Sums{}; }
inline Sums dot(Sums s, Bytes w, const std::int8_t* x) {
    // Columns apart: bytes of a column to 32 bits by shifting up and back down, which keeps the
    // sign.
    const Words words = reinterpret_cast<Words>(w);
    for (int c = 0; c < 4; ++c) {
        const Words low = (words >> (8 * c)) & 255u;
        const Sums value = reinterpret_cast<Sums>((low ^ 128u) - 128u);
        s += value * std::int32_t(x[c]);
    }
    return s;
}
inline Sums dot(Sums s, Bytes w, Bytes x) {
    const Words words = reinterpret_cast<Words>(w), others = reinterpret_cast<Words>(x);
    for (int c = 0; c < 4; ++c) {
        const Words low = (words >> (8 * c)) & 255u, other = (others >> (8 * c)) & 255u;
        s += reinterpret_cast<Sums>((low ^ 128u) - 128u) *
             reinterpret_cast<Sums>((other ^ 128u) - 128u);
    }
    return s;
}
inline Sums plus(Sums a, Sums b) { return a + b; }
inline Sums no_sums() { return Sums{}; }
inline Floats floats_at(const float* p) {
    Floats v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline Floats no_floats() { return Floats{}; }
inline void put(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }
inline Floats bf16_at(const std::uint16_t* p) {
    return reinterpret_cast<Floats>(Words{p[0], p[1], p[2], p[3]} << 16);
}
// Exact: exponent and mantissa move to where float32 has them and are multiplied by 2^112, which
// gives subnormal numbers their place too; what has the largest exponent is infinite or no number.
inline Floats f16_at(const std::uint16_t* p) {
    const Words w = {p[0], p[1], p[2], p[3]};
    const Floats scaled = reinterpret_cast<Floats>((w & 0x7FFFu) << 13) * 0x1p112f;
    const Words special = reinterpret_cast<Words>((w & 0x7C00u) == 0x7C00u) & 0x7F800000u;
    return reinterpret_cast<Floats>(reinterpret_cast<Words>(scaled) | special |
                                    (w & 0x8000u) << 16);
}
// To the nearest, ties to even. Below 2^-14 the numbers of float16 are as far apart as those of
// float32 around 1/2, to which the rounding of a sum leaves them.
inline void put_f16(std::uint16_t* p, Floats v) {
    for (int i = 0; i < 4; ++i) {
        std::uint32_t u = reinterpret_cast<Words>(v)[i];
        const std::uint32_t sign = u >> 16 & 0x8000u;
        u &= 0x7FFFFFFFu;
        std::uint32_t half;
        if (u > 0x7F800000u) {
            half = 0x7E00u | (u >> 13 & 0x3FFu);
        } else if (u >= 0x47800000u) {
            half = 0x7C00u;
        } else if (u < 0x38800000u) {
            float small;
            __builtin_memcpy(&small, &u, sizeof small);
            small += 0.5f;
            __builtin_memcpy(&half, &small, sizeof half);
            half -= 0x3F000000u;
        } else {
            half = (u - 0x38000000u + 0xFFFu + (u >> 13 & 1)) >> 13;
        }
        p[i] = std::uint16_t(sign | half);
    }
}
inline Floats int8_at(const std::int8_t* p) {
    return Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
}
inline Floats scaled(Floats y, Sums s, Floats scale, float step) {
    return y + (__builtin_convertvector(s, Floats) * scale) * step;
}

}  // namespace
}  // namespace smoe

#include "body.h"
#include "products_body.h"
#include "attention_body.h"

namespace smoe {
const Variant portable = {"portable", tile, quantise, gate, product_tiles, attend, join, to_f16};
}
