// The row operations of rows.h, written once; each file of an instruction set includes this.
#include <initializer_list>

#include "lines.h"
#include "reals.h"
#include "recurrent_body.h"

namespace smoe {
namespace {

// ---- norm, rotary, softmax
// ---------------------------------------------------------------------------------

enum { X, RESIDUAL, WEIGHT, BIAS, ADDED, Y, SUM };  // lines of norm

// (x + residual) + added, of a piece.
SMOE_INLINE const float* summed(const RowOp& op, void* const* at, std::size_t first, std::size_t n,
                                float* room, float* other) {
    const Line* line = op.line;
    const float* s = floats(line[X], at[X], first, n, room);
    for (const auto operand : {RESIDUAL, ADDED}) {
        if (!line[operand].there) continue;
        const float* x = floats(line[operand], at[operand], first, n, other);
        const float* before = s;
        each(n, [&](std::size_t i) { room[i] = before[i] + x[i]; });
        s = room;
    }
    return s;
}

void norm(const RowOp& op, void* const* at) {
    const Line* line = op.line;
    const std::size_t all = line[X].n;
    float room[PIECE], other[PIECE], result[PIECE];
    float mean = 0;  // of rms: nothing changes where it is subtracted
    if (op.how == How::layer) {
        Lanes lanes;
        pieces(all, [&](std::size_t first, std::size_t n) {
            add_up(summed(op, at, first, n, room, other), n, lanes, itself);
        });
        mean = fold(lanes) / float(all);
    }
    Lanes lanes;
    pieces(all, [&](std::size_t first, std::size_t n) {
        const float* s = summed(op, at, first, n, room, other);
        each(n, [&](std::size_t i) { result[i] = s[i] - mean; });
        add_up(result, n, lanes, square);
    });
    const float r = 1.0f / __builtin_sqrtf(fold(lanes) / float(all) + op.number);
    pieces(all, [&](std::size_t first, std::size_t n) {
        const float* s = summed(op, at, first, n, room, other);
        if (line[SUM].there) {
            float* sum = target(line[SUM], at[SUM], first, other);
            each(n, [&](std::size_t i) { sum[i] = s[i]; });
            store(line[SUM], at[SUM], first, n, sum);
        }
        float* y = target(line[Y], at[Y], first, result);
        each(n, [&](std::size_t i) { y[i] = (s[i] - mean) * r; });
        if (line[WEIGHT].there) {
            const float* w = floats(line[WEIGHT], at[WEIGHT], first, n, other);
            each(n, [&](std::size_t i) { y[i] = y[i] * w[i]; });
        }
        if (line[BIAS].there) {
            const float* b = floats(line[BIAS], at[BIAS], first, n, other);
            each(n, [&](std::size_t i) { y[i] = y[i] + b[i]; });
        }
        store(line[Y], at[Y], first, n, y);
    });
}

void rotary(const RowOp& op, void* const* at) {
    const Line &x = op.line[0], &cosine = op.line[1], &sine = op.line[2], &y = op.line[3];
    const std::size_t half = x.n / 2;
    const bool halves = op.how == How::halves;
    const std::ptrdiff_t every = halves ? 1 : 2, apart = halves ? std::ptrdiff_t(half) : 1;
    const Line from = part(x, half, every), to = part(y, half, every);
    const float* x1 = static_cast<const float*>(at[0]);
    float* y1 = static_cast<float*>(at[3]);
    const float* x2 = x1 + apart * x.step;
    float* y2 = y1 + apart * y.step;
    float rooms[6][PIECE];
    pieces(half, [&](std::size_t first, std::size_t n) {
        const float* a = floats(from, x1, first, n, rooms[0]);
        const float* b = floats(from, x2, first, n, rooms[1]);
        const float* c = floats(cosine, at[1], first, n, rooms[2]);
        const float* s = floats(sine, at[2], first, n, rooms[3]);
        float* u = target(to, y1, first, rooms[4]);
        float* v = target(to, y2, first, rooms[5]);
        each(n, [&](std::size_t i) {
            const float one = a[i] * c[i] - b[i] * s[i], two = b[i] * c[i] + a[i] * s[i];
            u[i] = one, v[i] = two;
        });
        store(to, y1, first, n, u);
        store(to, y2, first, n, v);
    });
}

SMOE_INLINE float exp_or_nothing(float x) { return x < -87.0f ? 0.0f : exp_(x); }

void softmax(const RowOp& op, void* const* at) {
    const Line &x = op.line[0], &y = op.line[1];
    const float largest = max_of(x, at[0]);
    float room[PIECE], result[PIECE];
    Lanes lanes;
    pieces(x.n, [&](std::size_t first, std::size_t n) {
        const float* a = floats(x, at[0], first, n, room);
        float* e = target(y, at[1], first, result);
        each(n, [&](std::size_t i) { e[i] = exp_or_nothing(a[i] - largest); });
        add_up(e, n, lanes, itself);
        store(y, at[1], first, n, e);
    });
    const float total = fold(lanes);
    pieces(x.n, [&](std::size_t first, std::size_t n) {
        const float* e = floats(y, at[1], first, n, room);
        float* z = target(y, at[1], first, result);
        each(n, [&](std::size_t i) { z[i] = e[i] / total; });
        store(y, at[1], first, n, z);
    });
}

// ---- top-k, reduce
// -----------------------------------------------------------------------------------------

// Whether a comes before b, which has a lower index.
SMOE_INLINE bool above(float a, float b) { return a > b || (b != b && a == a); }

// Insertion into the best so far, which lie in the outputs.
void top_k(const RowOp& op, void* const* at) {
    const Line &x = op.line[0], &values = op.line[1], &ids = op.line[2];
    auto* best = static_cast<std::int64_t*>(at[2]);
    std::size_t count = 0;
    float last = 0;
    for (std::size_t i = 0; i < x.n; ++i) {
        const float a = number(x, at[0], i);
        if (count == ids.n && !above(a, last)) continue;
        std::size_t rank = count < ids.n ? count++ : count - 1;
        for (; rank; --rank) {
            const std::int64_t before = best[place(ids, rank - 1)];
            if (!above(a, number(x, at[0], std::size_t(before)))) break;
            best[place(ids, rank)] = before;
        }
        best[place(ids, rank)] = std::int64_t(i);
        last = number(x, at[0], std::size_t(best[place(ids, count - 1)]));
    }
    if (!values.there) return;
    for (std::size_t rank = 0; rank < ids.n; ++rank)
        put(values, at[1], rank, number(x, at[0], std::size_t(best[place(ids, rank)])));
}

void reduce(const RowOp& op, void* const* at) {
    const Line &x = op.line[0], &y = op.line[1];
    if (op.how == How::sum) return put(y, at[1], 0, sum_of(x, at[0]));
    if (op.how == How::mean) return put(y, at[1], 0, sum_of(x, at[0]) / float(x.n));
    const float largest = max_of(x, at[0]);
    if (op.how == How::max) return put(y, at[1], 0, largest);
    std::size_t i = 0;
    while (i < x.n && number(x, at[0], i) != largest) ++i;
    put_whole(y, at[1], 0, i < x.n ? std::int64_t(i) : 0);
}

// ---- elementwise
// -------------------------------------------------------------------------------------------

template <class F>
SMOE_INLINE void map(const float* x, float* y, std::size_t n, F&& f) {
    each(n, [&](std::size_t i) { y[i] = f(x[i]); });
}

void unary_floats(How how, const float* x, float* y, std::size_t n) {
    switch (how) {
        case How::neg:
            return map(x, y, n, [](float a) { return -a; });
        case How::abs:
            return map(x, y, n, [](float a) { return magnitude(a); });
        case How::exp:
            return map(x, y, n, [](float a) { return exp_or_nothing(a); });
        case How::log:
            return map(x, y, n, [](float a) { return log_(a); });
        case How::sqrt:
            return map(x, y, n, [](float a) { return __builtin_sqrtf(a); });
        case How::rsqrt:
            return map(x, y, n, [](float a) { return 1.0f / __builtin_sqrtf(a); });
        case How::reciprocal:
            return map(x, y, n, [](float a) { return 1.0f / a; });
        case How::sigmoid:
            return map(x, y, n, [](float a) { return sigmoid_(a); });
        case How::tanh:
            return map(x, y, n, [](float a) { return tanh_(a); });
        case How::erf:
            return map(x, y, n, [](float a) { return erf_(a); });
        case How::silu:
            return map(x, y, n, [](float a) { return act<Act::silu>(a); });
        case How::gelu:
            return map(x, y, n, [](float a) { return act<Act::gelu>(a); });
        case How::gelu_tanh:
            return map(x, y, n, [](float a) { return act<Act::gelu_tanh>(a); });
        case How::relu:
            return map(x, y, n, [](float a) { return relu_(a); });
        case How::relu2:
            return map(x, y, n, [](float a) { return relu_(a) * relu_(a); });
        case How::softplus:
            return map(x, y, n, [](float a) { return softplus_(a); });
        case How::sin:
            return map(x, y, n, [](float a) { return sine(a, 0); });
        case How::cos:
            return map(x, y, n, [](float a) { return sine(a, 1); });
        case How::logical_not:
            return map(x, y, n, [](float a) { return a == 0.0f ? 1.0f : 0.0f; });
        case How::floor:
            return map(x, y, n, [](float a) { return __builtin_floorf(a); });
        case How::sign:
            return map(x, y, n, [](float a) { return a > 0.0f ? 1.0f : a < 0.0f ? -1.0f : a; });
        default:  // copy
            return map(x, y, n, [](float a) { return a; });
    }
}

// Whole numbers wrap, as unsigned ones do.
SMOE_INLINE std::int64_t wrapped(std::uint64_t x) { return std::int64_t(x); }

// Whether `how` works on whole numbers where its inputs are some.
SMOE_INLINE bool exact(How how) {
    return how == How::neg || how == How::abs || how == How::logical_not || how == How::sign ||
           how == How::floor || how == How::copy;
}

SMOE_INLINE std::int64_t unary_whole(How how, std::int64_t a) {
    const std::int64_t minus = wrapped(0 - std::uint64_t(a));
    switch (how) {
        case How::neg:
            return minus;
        case How::abs:
            return a < 0 ? minus : a;
        case How::logical_not:
            return a == 0;
        case How::sign:
            return (a > 0) - (a < 0);
        default:  // floor, copy
            return a;
    }
}

void unary(const RowOp& op, void* const* at) {
    const Line &x = op.line[0], &y = op.line[1];
    if (x.type != Type::f32 && exact(op.how)) {
        for (std::size_t i = 0; i < y.n; ++i)
            put_whole(y, at[1], i, unary_whole(op.how, whole(x, at[0], i)));
        return;
    }
    float room[PIECE], result[PIECE];
    pieces(y.n, [&](std::size_t first, std::size_t n) {
        const float* a = floats(x, at[0], first, n, room);
        float* z = target(y, at[1], first, result);
        unary_floats(op.how, a, z, n);
        store(y, at[1], first, n, z);
    });
}

template <class F>
SMOE_INLINE void join(const float* a, const float* b, float* y, std::size_t n, F&& f) {
    each(n, [&](std::size_t i) { y[i] = f(a[i], b[i]); });
}

SMOE_INLINE float truth(bool holds) { return holds ? 1.0f : 0.0f; }

void binary_floats(How how, const float* a, const float* b, float* y, std::size_t n) {
    switch (how) {
        case How::add:
            return join(a, b, y, n, [](float u, float v) { return u + v; });
        case How::sub:
            return join(a, b, y, n, [](float u, float v) { return u - v; });
        case How::mul:
            return join(a, b, y, n, [](float u, float v) { return u * v; });
        case How::div:
            return join(a, b, y, n, [](float u, float v) { return u / v; });
        case How::max:
            return join(a, b, y, n, [](float u, float v) { return u > v || u != u ? u : v; });
        case How::min:
            return join(a, b, y, n, [](float u, float v) { return u < v || u != u ? u : v; });
        case How::pow:
            return join(a, b, y, n, [](float u, float v) { return pow_(u, v); });
        case How::logical_and:
            return join(a, b, y, n, [](float u, float v) { return truth(u != 0 && v != 0); });
        case How::logical_or:
            return join(a, b, y, n, [](float u, float v) { return truth(u != 0 || v != 0); });
        case How::equal:
            return join(a, b, y, n, [](float u, float v) { return truth(u == v); });
        case How::less:
            return join(a, b, y, n, [](float u, float v) { return truth(u < v); });
        case How::less_equal:
            return join(a, b, y, n, [](float u, float v) { return truth(u <= v); });
        case How::greater:
            return join(a, b, y, n, [](float u, float v) { return truth(u > v); });
        default:  // greater_equal
            return join(a, b, y, n, [](float u, float v) { return truth(u >= v); });
    }
}

// A division is cut off; by zero it gives 0.
SMOE_INLINE std::int64_t binary_whole(How how, std::int64_t a, std::int64_t b) {
    const std::uint64_t u = std::uint64_t(a), v = std::uint64_t(b);
    switch (how) {
        case How::add:
            return wrapped(u + v);
        case How::sub:
            return wrapped(u - v);
        case How::mul:
            return wrapped(u * v);
        case How::div:
            return b == 0 ? 0 : b == -1 ? wrapped(0 - u) : a / b;
        case How::max:
            return a > b ? a : b;
        case How::min:
            return a < b ? a : b;
        case How::logical_and:
            return a != 0 && b != 0;
        case How::logical_or:
            return a != 0 || b != 0;
        case How::equal:
            return a == b;
        case How::less:
            return a < b;
        case How::less_equal:
            return a <= b;
        case How::greater:
            return a > b;
        default:  // greater_equal
            return a >= b;
    }
}

void binary(const RowOp& op, void* const* at) {
    const Line &a = op.line[0], &b = op.line[1], &y = op.line[2];
    if (a.type != Type::f32 && b.type != Type::f32 && op.how != How::pow) {
        for (std::size_t i = 0; i < y.n; ++i)
            put_whole(y, at[2], i,
                      binary_whole(op.how, whole(a, at[0], i), whole(b, at[1], i)));
        return;
    }
    float rooms[3][PIECE];
    pieces(y.n, [&](std::size_t first, std::size_t n) {
        const float* u = floats(a, at[0], first, n, rooms[0]);
        const float* v = floats(b, at[1], first, n, rooms[1]);
        float* z = target(y, at[2], first, rooms[2]);
        binary_floats(op.how, u, v, z, n);
        store(y, at[2], first, n, z);
    });
}

void where(const RowOp& op, void* const* at) {
    const Line &condition = op.line[0], &a = op.line[1], &b = op.line[2], &y = op.line[3];
    const bool floating = a.type == Type::f32 || b.type == Type::f32;
    for (std::size_t i = 0; i < y.n; ++i) {
        const bool first = number(condition, at[0], i) != 0;
        const Line& line = first ? a : b;
        const void* from = first ? at[1] : at[2];
        if (floating)
            put(y, at[3], i, number(line, from, i));
        else
            put_whole(y, at[3], i, whole(line, from, i));
    }
}

void fill(const RowOp& op, void* const* at) {
    for (std::size_t i = 0; i < op.line[0].n; ++i) put(op.line[0], at[0], i, op.number);
}

// ---- gather, scatter
// ---------------------------------------------------------------------------------------

// The index of n that `i` means, or n.
SMOE_INLINE std::size_t index_of(std::int64_t i, std::size_t n) {
    if (i < 0) i += std::int64_t(n);
    return i < 0 || i >= std::int64_t(n) ? n : std::size_t(i);
}

void gather(const RowOp& op, void* const* at) {
    const Line &x = op.line[0], &ids = op.line[1], &y = op.line[2];
    for (std::size_t i = 0; i < y.n; ++i) {
        const std::size_t k = index_of(whole(ids, at[1], i), x.n);
        if (x.type == Type::f32)
            put(y, at[2], i, k < x.n ? number(x, at[0], k) : 0.0f);
        else
            put_whole(y, at[2], i, k < x.n ? whole(x, at[0], k) : 0);
    }
}

void scatter(const RowOp& op, void* const* at) {
    const Line &ids = op.line[0], &x = op.line[1], &y = op.line[2];
    for (std::size_t i = 0; i < ids.n; ++i) {
        const std::size_t k = index_of(whole(ids, at[0], i), y.n);
        if (k == y.n) continue;
        if (x.type == Type::f32)
            put(y, at[2], k, number(x, at[1], i));
        else
            put_whole(y, at[2], k, whole(x, at[1], i));
    }
}

}  // namespace
}  // namespace smoe

#define SMOE_ROW_KERNELS(name)                                                                    \
    {name,   smoe::norm,   smoe::rotary, smoe::softmax, smoe::top_k,  smoe::reduce,               \
     smoe::unary, smoe::binary, smoe::where, smoe::fill,    smoe::gather, smoe::scatter,           \
     smoe::delta_rule, smoe::convolution}
