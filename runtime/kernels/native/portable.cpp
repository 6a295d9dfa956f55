// Any processor: vectors of the compiler's own, and loops where it has none.
#include "ffn.h"

namespace smoe {
namespace {

typedef std::uint8_t Bytes __attribute__((vector_size(16)));
typedef std::int32_t Sums __attribute__((vector_size(16)));
constexpr std::size_t VECTOR = 16, OFFSET = 0, TOKENS = 4;

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
inline void scaled(Sums s, const std::uint16_t* scales, float step, float* y) {
    for (int r = 0; r < 4; ++r) {
        const std::uint32_t wide = std::uint32_t(scales[r]) << 16;
        float scale;
        __builtin_memcpy(&scale, &wide, sizeof scale);
        y[r] += (float(s[r]) * scale) * step;
    }
}

}  // namespace
}  // namespace smoe

#include "body.h"

namespace smoe {
const Variant portable = {"portable", tile, quantise, gate};
}
