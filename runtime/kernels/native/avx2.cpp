// AVX2: half a block in a vector. Products of unsigned and signed bytes are added in pairs with 16
// bits: magnitudes of weights (up to 128) times activations with the weights' signs (up to 127)
// stay below 2^15.
#include "ffn.h"

#include <immintrin.h>

namespace smoe {
namespace {

typedef __m256i Bytes;
typedef __m256i Sums;
typedef __m256 Floats;
constexpr std::size_t VECTOR = 32, OFFSET = 0, TOKENS = 4, VECTORS = 1;

inline Bytes bytes_at(const std::uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Bytes bytes_of(std::uint8_t b) { return _mm256_set1_epi8(char(b)); }
inline Bytes pick(Bytes m, Bytes a, Bytes b) {
    return _mm256_xor_si256(b, _mm256_and_si256(m, _mm256_xor_si256(a, b)));
}
inline Bytes lower(Bytes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Bytes upper(Bytes v) { return lower(_mm256_srli_epi16(v, 4)); }
inline Bytes table_of(const std::int8_t* t, std::uint8_t) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(t)));
}
inline Bytes look_up(Bytes table, Bytes nibbles) { return _mm256_shuffle_epi8(table, nibbles); }
inline Bytes turned(Bytes v) { return _mm256_xor_si256(v, bytes_of(128)); }
inline Bytes add(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
inline __m256i quad_at(const std::int8_t* p) {
    std::int32_t quad;
    __builtin_memcpy(&quad, p, sizeof quad);
    return _mm256_set1_epi32(quad);
}
inline __m256i codes_at(const std::int8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Sums start(std::int32_t) { return _mm256_setzero_si256(); }
inline Sums dot(Sums s, Bytes w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    s = _mm256_add_epi32(s, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    // Left alone, the compiler collects many products before it adds them, and runs out of
    // registers.
    __asm__("" : "+x"(s));
    return s;
}
inline Sums plus(Sums a, Sums b) { return _mm256_add_epi32(a, b); }
inline Sums no_sums() { return _mm256_setzero_si256(); }
inline Floats floats_at(const float* p) { return _mm256_loadu_ps(p); }
inline Floats no_floats() { return _mm256_setzero_ps(); }
inline void put(float* p, Floats v) { _mm256_storeu_ps(p, v); }
inline Floats bf16_at(const std::uint16_t* p) {
    const __m256i wide =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Floats f16_at(const std::uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void put_f16(std::uint16_t* p, Floats v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
}
inline Floats int8_at(const std::int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline Floats scaled(Floats y, Sums s, Floats scale, float step) {
    return _mm256_add_ps(
        y, _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(s), scale), _mm256_set1_ps(step)));
}

}  // namespace
}  // namespace smoe

#include "body.h"
#include "products_body.h"
#include "attention_body.h"

namespace smoe {
const Variant avx2 = {"avx2", tile, quantise, gate, product_tiles, attend, join, to_f16};
}
