// NEON: four rows of a block in a vector. Compiled twice; where the compiler may use the dot
// product it does (neondot.cpp), else products of bytes are added in pairs with 16 bits, of which 2
// * 128 * 127 is the most.
#include "ffn.h"

#include <arm_neon.h>

namespace smoe {
namespace {

typedef uint8x16_t Bytes;
typedef int32x4_t Sums;
typedef float32x4_t Floats;
constexpr std::size_t VECTOR = 16, OFFSET = 0, TOKENS = 8, VECTORS = 2;

inline Bytes bytes_at(const std::uint8_t* p) { return vld1q_u8(p); }
inline Bytes bytes_of(std::uint8_t b) { return vdupq_n_u8(b); }
inline Bytes pick(Bytes m, Bytes a, Bytes b) { return vbslq_u8(m, a, b); }
inline Bytes lower(Bytes v) { return vandq_u8(v, vdupq_n_u8(15)); }
inline Bytes upper(Bytes v) { return vshrq_n_u8(v, 4); }
inline Bytes table_of(const std::int8_t* t, std::uint8_t) {
    return vreinterpretq_u8_s8(vld1q_s8(t));
}
inline Bytes look_up(Bytes table, Bytes nibbles) { return vqtbl1q_u8(table, nibbles); }
inline Bytes turned(Bytes v) { return veorq_u8(v, bytes_of(128)); }
inline Bytes add(Bytes a, Bytes b) { return vaddq_u8(a, b); }
inline int8x16_t quad_at(const std::int8_t* p) {
    std::int32_t quad;
    __builtin_memcpy(&quad, p, sizeof quad);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}
inline int8x16_t codes_at(const std::int8_t* p) { return vld1q_s8(p); }
inline Sums start(std::int32_t) { return vdupq_n_s32(0); }
inline Sums dot(Sums s, Bytes w, int8x16_t x) {
    const int8x16_t v = vreinterpretq_s8_u8(w);
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(s, v, x);
#else
    const int16x8_t low = vmull_s8(vget_low_s8(v), vget_low_s8(x)), high = vmull_high_s8(v, x);
    return vpadalq_s16(s, vpaddq_s16(low, high));
#endif
}
inline Sums plus(Sums a, Sums b) { return vaddq_s32(a, b); }
inline Sums no_sums() { return vdupq_n_s32(0); }
inline Floats floats_at(const float* p) { return vld1q_f32(p); }
inline Floats no_floats() { return vdupq_n_f32(0); }
inline void put(float* p, Floats v) { vst1q_f32(p, v); }
inline Floats bf16_at(const std::uint16_t* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
inline Floats f16_at(const std::uint16_t* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
inline void put_f16(std::uint16_t* p, Floats v) {
    vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v)));
}
inline Floats int8_at(const std::int8_t* p) {
    std::int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
inline Floats scaled(Floats y, Sums s, Floats scale, float step) {
    return vaddq_f32(y, vmulq_n_f32(vmulq_f32(vcvtq_f32_s32(s), scale), step));
}

}  // namespace
}  // namespace smoe

#include "body.h"
#include "products_body.h"
#include "attention_body.h"

namespace smoe {
#if defined(__ARM_FEATURE_DOTPROD)
const Variant neondot = {"neondot", tile, quantise, gate, product_tiles, attend, join, to_f16};
#else
const Variant neon = {"neon", tile, quantise, gate, product_tiles, attend, join, to_f16};
#endif
}  // namespace smoe
