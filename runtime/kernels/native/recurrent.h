// What a sequence carries from token to token, and what its next rows make of it. recurrent.py
// repeats this arithmetic bit for bit.
//
//   delta_rule    of every row, in turn: S *= decay; c = (v - sum of k[i] S[i]) * beta; S[i] +=
//                 k[i] c; y = sum of q[i] S[i]. Sums begin with 0 and go over i, rising
//   convolution   of every number for itself: y = x(oldest) * weight[0] + .. + x(its own) *
//                 weight[taps - 1], from left to right, then + bias
//
// Everything is float32 and rounded on its own, so that the bits are those of every instruction
// set, and of any cut of the rows, and of heads or numbers among threads.
#pragma once
#include <cstddef>

namespace smoe {

// Rows of a buffer: those of row r begin at data + r * row.
struct Lane {
    float* data;
    std::size_t row;
};

// One head of the delta rule, [keys][values]: `found` before `rows` rows of one sequence, and
// `left` behind them, which may be the same memory. `decays`: one factor for each of the keys,
// side by side, else one for all.
struct DeltaHead {
    const float* found;
    float* left;
    std::size_t keys, values, rows;
    Lane q, k, v, decay, beta, y;
    bool decays;
};

// `numbers` of the numbers of a convolution: [tokens][width] `found` and `left`, as above, and
// weight [taps][width].
struct Taps {
    const float* found;
    float* left;
    const float* weight;
    const float* bias;  // or null
    std::size_t tokens, width, taps, numbers, rows;
    Lane x, y;
};

}  // namespace smoe
