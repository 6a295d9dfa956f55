// Any processor: vectors of the compiler's own, and loops where it has none.
#include "ffn.h"

namespace smoe {
namespace {

typedef std::uint8_t Bytes __attribute__((vector_size(16)));
typedef std::int32_t Sums __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));
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
inline Sums start(std::int32_t) { return Sums{}; }
inline Sums dot(Sums s, Bytes w, const std::int8_t* x) {
    // Columns apart: bytes of a column to 32 bits by shifting up and back down, which keeps the
    // sign.
    typedef std::uint32_t Words __attribute__((vector_size(16)));
    const Words words = reinterpret_cast<Words>(w);
    for (int c = 0; c < 4; ++c) {
        const Words low = (words >> (8 * c)) & 255u;
        const Sums value = reinterpret_cast<Sums>((low ^ 128u) - 128u);
        s += value * std::int32_t(x[c]);
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
inline Floats scales_at(const float* p) { return floats_at(p); }
inline Floats scales_at(const std::uint16_t* p) {
    typedef std::uint32_t Words __attribute__((vector_size(16)));
    return reinterpret_cast<Floats>(Words{p[0], p[1], p[2], p[3]} << 16);
}
inline Floats scaled(Floats y, Sums s, Floats scale, float step) {
    return y + (__builtin_convertvector(s, Floats) * scale) * step;
}

}  // namespace
}  // namespace smoe

#include "body.h"

namespace smoe {
const Variant portable = {"portable", tile, quantise, gate};
}
