// AVX-512 with VNNI: a whole block in one vector. The dot product wants unsigned weights, so they
// carry 128 more.
#include "ffn.h"

#include <immintrin.h>

namespace smoe {
namespace {

typedef __m512i Bytes;
typedef __m512i Sums;
typedef __m512 Floats;
constexpr std::size_t VECTOR = 64, OFFSET = 128, TOKENS = 12, VECTORS = 2;

inline Bytes bytes_at(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes bytes_of(std::uint8_t b) { return _mm512_set1_epi8(char(b)); }
inline Bytes pick(Bytes m, Bytes a, Bytes b) { return _mm512_ternarylogic_epi32(m, a, b, 0xCA); }
inline Bytes lower(Bytes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Bytes upper(Bytes v) { return lower(_mm512_srli_epi16(v, 4)); }
inline Bytes turned(Bytes v) { return v; }
inline Bytes add(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
inline Bytes table_of(const std::int8_t* t, std::uint8_t offset) {
    const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i*>(t));
    return add(_mm512_maskz_broadcast_i32x4(0xFFFF, table), bytes_of(offset));
}
inline Bytes look_up(Bytes table, Bytes nibbles) { return _mm512_shuffle_epi8(table, nibbles); }
inline __m512i quad_at(const std::int8_t* p) {
    std::int32_t quad;
    __builtin_memcpy(&quad, p, sizeof quad);
    return _mm512_set1_epi32(quad);
}
inline __m512i codes_at(const std::int8_t* p) { return _mm512_loadu_si512(p); }
inline Sums start(std::int32_t sum) { return _mm512_set1_epi32(sum); }
inline Sums dot(Sums s, Bytes w, __m512i x) { return _mm512_dpbusd_epi32(s, w, x); }
inline Sums plus(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
inline Sums no_sums() { return _mm512_setzero_si512(); }
inline Floats floats_at(const float* p) { return _mm512_loadu_ps(p); }
inline Floats no_floats() { return _mm512_setzero_ps(); }
inline void put(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats bf16_at(const std::uint16_t* p) {
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(
        _mm512_maskz_slli_epi32(0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, narrow), 16));
}
inline Floats f16_at(const std::uint16_t* p) {
    return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void put_f16(std::uint16_t* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_maskz_cvtps_ph(0xFFFF, v, 0));
}
inline Floats int8_at(const std::int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_maskz_cvtepi8_epi32(0xFFFF, bytes));
}
inline Floats scaled(Floats y, Sums s, Floats scale, float step) {
    const Floats exact = __builtin_convertvector(reinterpret_cast<__v16si>(s), Floats);
    return _mm512_add_ps(y, _mm512_mul_ps(_mm512_mul_ps(exact, scale), _mm512_set1_ps(step)));
}

}  // namespace
}  // namespace smoe

#include "body.h"
#include "products_body.h"
#include "attention_body.h"

namespace smoe {
const Variant avx512vnni = {"avx512vnni",  tile,   quantise, gate,
                            product_tiles, attend, join,     to_f16};
}
