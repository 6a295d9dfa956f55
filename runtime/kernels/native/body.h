// The kernels, written once. Each file of an instruction set (portable.cpp, avx2.cpp, ...) defines
// a few operations on its vectors and includes this; the arithmetic is that of ffn.h and gate.h, so
// the files differ in registers and never in results. What is included before must be
//
//   Bytes              VECTOR bytes, a power of two up to 64: VECTOR/4 rows x 4 columns of a block
//   Sums, Floats       VECTOR/4 int32 or float32, one per row
//   bytes_at(p)        load
//   pick(m, a, b)      bits of a where m has ones, else of b
//   lower(v), upper(v) nibbles
//   look_up(t, v)      16 bytes (table_of: those at a place plus an offset), indexed by nibbles
//   add(a, b)          bytes
//   dot(s, w, x)       s + sum over 4 columns of w * x, exactly; x = quad_at(p): 4 activations for
//                      every row. OFFSET says whether w is w + 128; turned(w) takes 128 off (where
//                      OFFSET is 0)
//   codes_at(p)        VECTOR activations, as `dot` takes them for VECTOR weights of one row: the
//                      lanes of its sums are then for every 4 columns
//   start(sum)         the sums to begin with, `sum` as `quantise` leaves it
//   plus(a, b)         sums
//   floats_at(p), put(p, v), no_floats()    load, store, zeros
//   bf16_at(p), f16_at(p), int8_at(p)       as floats, exactly; put_f16(p, v) rounds, ties to even
//   scaled(y, s, scale, step)               y + (float32(s) * scale) * step
//   TOKENS, VECTORS    how many products of a vector of rows and a token have sums in registers,
//   and
//                      of how many vectors they are; VECTORS divides TOKENS
//
// Codes that are bytes already are in tiles_body.h, dense weights in dense.h.
#include <cstring>

#include "dense.h"
#include "functions.h"
#include "tiles_body.h"

namespace smoe {
namespace {

// ---- nested: codes from slices
// --------------------------------------------------------------------------------------

// A byte's bits where slice t holds the codes of quads 2m and 2m+1 (FORMAT.md, "nested").
constexpr std::uint8_t place(std::size_t t, std::size_t m) {
    return std::uint8_t(0x11u << ((t + m) % 4));
}

// For m of 4: bytes whose nibbles are the first `bits` bits (1 to 4) of quads 2m (low) and 2m+1
// (high), bit t at (t + m) % 4. Whatever is in the places of bits that were not read does not
// matter.
template <std::size_t BITS>
SMOE_INLINE void nibbles(const Bytes* s, Bytes* out) {
    const Bytes even = bytes_of(0x55), odd = bytes_of(0xAA);
    for (std::size_t parity = 0; parity < 2; ++parity) {
        const Bytes mask = parity ? odd : even;
        const Bytes a = BITS > 1 ? pick(mask, s[0], s[BITS > 1 ? 1 : 0]) : s[0];
        const Bytes b =
            BITS > 3 ? pick(mask, s[BITS > 2 ? 2 : 0], s[BITS > 3 ? 3 : 0]) : s[BITS > 2 ? 2 : 0];
        for (std::size_t m = parity; m < 4; m += 2)
            out[m] = BITS > 2 ? pick(bytes_of(place(0, m) | place(1, m)), a, b) : a;
    }
}

// The values of one part of a block, a vector per quad of columns.
template <std::size_t BITS>
SMOE_INLINE void values(const std::uint8_t* const* slices, std::size_t part, const Tables& tables,
                        Bytes* out) {
    constexpr std::size_t HIGH = BITS < 4 ? BITS : 4, LOW = BITS - HIGH;
    Bytes s[MAX_BITS], n[4];
    for (std::size_t t = 0; t < BITS; ++t) s[t] = bytes_at(slices[t] + part * VECTOR);
    nibbles<HIGH>(s, n);
    for (std::size_t m = 0; m < 4; ++m) {
        const auto table = table_of(tables.high[m], OFFSET);
        out[2 * m] = look_up(table, lower(n[m]));
        out[2 * m + 1] = look_up(table, upper(n[m]));
    }
    if (LOW) {
        nibbles<(LOW ? LOW : 1)>(s + HIGH, n);
        for (std::size_t m = 0; m < 4; ++m) {
            const auto table = table_of(tables.low[m], 0);
            out[2 * m] = add(out[2 * m], look_up(table, lower(n[m])));
            out[2 * m + 1] = add(out[2 * m + 1], look_up(table, upper(n[m])));
        }
    }
}

// Where the slices of a tile lie: that of bit t and block b starts at data[t] + b * step[t].
struct Slices {
    const std::uint8_t* data[MAX_BITS];
    std::size_t step[MAX_BITS];
};

SMOE_INLINE Slices slices_of(const Operand& w, std::size_t tile) {
    Slices found;
    std::size_t t = 0;
    for (std::size_t p = 0; p < w.level; ++p) {
        const std::size_t step = w.m->slices[p] * SLICE;
        for (std::size_t i = 0; i < w.m->slices[p]; ++i, ++t) {
            found.data[t] = w.record + w.m->plane[p] + tile * w.m->blocks() * step + i * SLICE;
            found.step[t] = step;
        }
    }
    return found;
}

// N tokens: values go from registers into the sums of all of them. Codes are read once, so
// they are fetched some blocks ahead. Where there are registers for it, sums are in two chains, so
// that a product need not wait for the one before.
constexpr std::size_t BLOCKS_AHEAD = 8, FEW = 4;

template <std::size_t BITS, std::size_t N, class S>
SMOE_INLINE void some_tokens(const Operand& w, std::size_t tile, const Rows& x, float* y,
                             std::size_t stride) {
    constexpr std::size_t CHAINS = N * PARTS <= 4 ? 2 : 1;
    const Matrix& m = *w.m;
    const Tables& tables = m.tables[w.level - 1];
    const Slices at = slices_of(w, tile);
    const auto* scales =
        reinterpret_cast<const typename S::T*>(w.record + m.scale) + tile * m.groups() * ROWS;
    const std::size_t in_group = m.group / COLUMNS, blocks = m.blocks();
    Floats total[PARTS][N];
    for (std::size_t part = 0; part < PARTS; ++part)
        for (std::size_t n = 0; n < N; ++n) total[part][n] = no_floats();
    for (std::size_t g = 0, b = 0; b < blocks; ++g) {
        Sums sums[PARTS][N][CHAINS];
        for (std::size_t part = 0; part < PARTS; ++part)
            for (std::size_t n = 0; n < N; ++n) {
                sums[part][n][0] = start(x.sum[n][g]);
                if (CHAINS > 1) sums[part][n][CHAINS - 1] = no_sums();
            }
        const std::size_t end = b + in_group < blocks ? b + in_group : blocks;
        for (; b < end; ++b) {
            const std::uint8_t* slices[MAX_BITS];
            for (std::size_t i = 0; i < BITS; ++i) {
                slices[i] = at.data[i] + b * at.step[i];
                __builtin_prefetch(slices[i] + BLOCKS_AHEAD * at.step[i]);
            }
            for (std::size_t part = 0; part < PARTS; ++part) {
                Bytes v[QUADS];
                values<BITS>(slices, part, tables, v);
                for (std::size_t i = 0; i < QUADS; ++i)
                    for (std::size_t n = 0; n < N; ++n) {
                        Sums& s = sums[part][n][i % CHAINS];
                        s = dot(s, v[i], quad_at(x.q[n] + b * COLUMNS + 4 * i));
                    }
            }
        }
        for (std::size_t part = 0; part < PARTS; ++part) {
            const Floats scale = S::load(scales + g * ROWS + part * WIDE);
            for (std::size_t n = 0; n < N; ++n) {
                const Sums* of = sums[part][n];
                const Sums sum = CHAINS > 1 ? plus(of[0], of[CHAINS - 1]) : of[0];
                total[part][n] = scaled(total[part][n], sum, scale, x.step[n][g]);
            }
        }
    }
    for (std::size_t part = 0; part < PARTS; ++part)
        for (std::size_t n = 0; n < N; ++n)
            put(y + n * stride + part * WIDE, total[part][n]);
}

// Up to N tokens.
template <std::size_t BITS, std::size_t N, class S>
SMOE_INLINE void few_tokens(const Operand& w, std::size_t tile, const Rows& x, float* y,
                            std::size_t stride) {
    if (x.n == N) return some_tokens<BITS, N, S>(w, tile, x, y, stride);
    if constexpr (N > 1) few_tokens<BITS, N - 1, S>(w, tile, x, y, stride);
}

// The values of some blocks of a tile, written down.
template <std::size_t BITS>
SMOE_INLINE void decode(const Slices& at, const Tables& tables, std::size_t first,
                        std::size_t blocks, std::uint8_t* out) {
    for (std::size_t b = 0; b < blocks; ++b) {
        const std::uint8_t* slices[MAX_BITS];
        for (std::size_t t = 0; t < BITS; ++t) slices[t] = at.data[t] + (first + b) * at.step[t];
        for (std::size_t part = 0; part < PARTS; ++part) {
            Bytes v[QUADS];
            values<BITS>(slices, part, tables, v);
            for (std::size_t i = 0; i < QUADS; ++i)
                std::memcpy(out + (b * QUADS + i) * SLICE + part * VECTOR, &v[i], VECTOR);
        }
    }
}

// Tiles times some tokens: more than a few have the values of a chunk written down once.
template <std::size_t BITS, class S = BF16>
void nested_tiles(const Operand& w, std::size_t tile, std::size_t tiles, const Rows& x, float* y,
                  std::size_t stride) {
    constexpr std::size_t few = BITS <= 4 ? FEW : 1;  // more would take minutes to compile
    if (x.n <= few) {
        for (std::size_t i = 0; i < tiles; ++i)
            few_tokens<BITS, few, S>(w, tile + i, x, y + i * ROWS, stride);
        return;
    }
    const Matrix& m = *w.m;
    const auto* scales =
        reinterpret_cast<const typename S::T*>(w.record + m.scale) + tile * m.groups() * ROWS;
    alignas(64) std::uint8_t buffer[SPAN * CHUNK * BLOCK];
    for (std::size_t b = 0; b < m.blocks(); b += CHUNK) {
        const std::size_t blocks = m.blocks() - b < CHUNK ? m.blocks() - b : CHUNK;
        for (std::size_t i = 0; i < tiles; ++i)
            decode<BITS>(slices_of(w, tile + i), m.tables[w.level - 1], b, blocks,
                         buffer + i * CHUNK * BLOCK);
        const Panel<S> panel = {buffer, CHUNK * BLOCK, scales, m.groups(), m.group / COLUMNS,
                                b,      blocks};
        multiply_panel<false>(panel, tiles, x, y, stride);
    }
}

template <std::size_t BITS>
void nested_tile(const Operand& w, std::size_t tile, const Rows& x, float* y, std::size_t stride) {
    nested_tiles<BITS>(w, tile, 1, x, y, stride);
}

void tile(const Operand& w, std::size_t tile, const Rows& x, float* y, std::size_t stride) {
    switch (w.m->kind) {
        case Weights::f32:
            return dense_tile<F32>(w, tile, x, y, stride);
        case Weights::bf16:
            return dense_tile<BF16>(w, tile, x, y, stride);
        case Weights::f16:
            return dense_tile<F16>(w, tile, x, y, stride);
        case Weights::i8:
            return dense_tile<I8>(w, tile, x, y, stride);
        case Weights::nested:
            break;
    }
    switch (w.m->bits(w.level)) {
        case 2:
            return nested_tile<2>(w, tile, x, y, stride);
        case 3:
            return nested_tile<3>(w, tile, x, y, stride);
        case 4:
            return nested_tile<4>(w, tile, x, y, stride);
        case 5:
            return nested_tile<5>(w, tile, x, y, stride);
        case 6:
            return nested_tile<6>(w, tile, x, y, stride);
        case 7:
            return nested_tile<7>(w, tile, x, y, stride);
        case 8:
            return nested_tile<8>(w, tile, x, y, stride);
    }
}

// ---- activations
// -------------------------------------------------------------------------------------------------

void quantise(const float* x, std::size_t n, std::size_t group, std::int8_t* q, float* step,
              std::int32_t* sum) {
    const std::size_t padded = (n + COLUMNS - 1) / COLUMNS * COLUMNS;
    for (std::size_t first = 0, g = 0; first < padded; first += group, ++g) {
        const std::size_t real = n - first < group ? n - first : group;
        const std::size_t all = padded - first < group ? padded - first : group;
        std::uint32_t largest =
            0;  // as integers the bits of magnitudes are ordered, and a NaN is above all
        for (std::size_t i = 0; i < real; ++i) {
            const std::uint32_t magnitude = bits_of(x[first + i]) & 0x7FFFFFFFu;
            largest = magnitude > largest ? magnitude : largest;
        }
        const float m = float_of(largest);
        const bool finite = largest < 0x7F800000u, usable = finite && m >= 1e-30f;
        step[g] = usable ? m / 127.0f : finite ? 0.0f : float_of(0x7FC00000u);
        std::int32_t total = 0;
        if (usable) {
            const float inverse = 127.0f / m;
            for (std::size_t i = 0; i < real; ++i) {
                const float shifted =
                    x[first + i] * inverse + 12582912.0f;  // rounds to even, as gate.h's exp does
                const std::int32_t code = std::int32_t(bits_of(shifted)) - 0x4B400000;
                q[first + i] = std::int8_t(code);
                total += code;
            }
        }
        for (std::size_t i = usable ? real : 0; i < all; ++i) q[first + i] = 0;
        sum[g] = -std::int32_t(OFFSET) * total;
    }
}

template <Act A>
void gate_with(const ExpertActivation& spec, const float* gate, const float* up, std::size_t n,
               float* inner) {
    const float limit = spec.limit;
    if (spec.kind == Kind::plain)
        for (std::size_t i = 0; i < n; ++i) inner[i] = act<A>(up[i]);
    else if (spec.kind == Kind::gated)
        for (std::size_t i = 0; i < n; ++i) inner[i] = act<A>(gate[i]) * up[i];
    else
        for (std::size_t i = 0; i < n; ++i) {
            const float g = gate[i] > limit ? limit : gate[i];
            const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
            inner[i] = act<A>(g) * u;
        }
}

void gate(const ExpertActivation& spec, const float* gate, const float* up, std::size_t n,
          float* inner) {
    const float limit = spec.limit, alpha = spec.alpha;
    if (spec.kind == Kind::softcapped) {
        for (std::size_t i = 0; i < n; ++i)
            inner[i] = ((limit * tanh_(gate[i] / limit)) * sigmoid_(gate[i])) *
                       (alpha * tanh_(up[i] / alpha));
        return;
    }
    if (spec.kind == Kind::clamped) {
        for (std::size_t i = 0; i < n; ++i) {
            const float g = gate[i] > limit ? limit : gate[i];
            const float u = up[i] > limit ? limit : up[i] < -limit ? -limit : up[i];
            inner[i] = ((u + 1.0f) * g) * sigmoid_(alpha * g);
        }
        return;
    }
    switch (spec.act) {
        case Act::silu:
            return gate_with<Act::silu>(spec, gate, up, n, inner);
        case Act::gelu:
            return gate_with<Act::gelu>(spec, gate, up, n, inner);
        case Act::gelu_tanh:
            return gate_with<Act::gelu_tanh>(spec, gate, up, n, inner);
        case Act::relu:
            return gate_with<Act::relu>(spec, gate, up, n, inner);
        case Act::relu2:
            return gate_with<Act::relu2>(spec, gate, up, n, inner);
        case Act::sigmoid:
            return gate_with<Act::sigmoid>(spec, gate, up, n, inner);
        case Act::tanh:
            return gate_with<Act::tanh>(spec, gate, up, n, inner);
        case Act::identity:
            return gate_with<Act::identity>(spec, gate, up, n, inner);
    }
}

}  // namespace
}  // namespace smoe
