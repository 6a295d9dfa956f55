// A small program for threads.cpp: an embedding, a norm, a product, an attention.
#pragma once
#include <cstring>
#include <vector>

#include "../../runtime/kernels/native/program.h"

namespace {

constexpr std::size_t WORDS = 7, WIDE = 32, HEAD = 16, TOKENS_OF = 150;

smoe::ViewAbout view(std::ptrdiff_t source, std::size_t offset, std::size_t n) {
    return {source, offset, {n}, {1}};
}

smoe::ViewAbout head(std::ptrdiff_t source, std::size_t offset) {
    return {source, offset, {1, HEAD}, {std::ptrdiff_t(HEAD), 1}};
}

smoe::ProgramAbout about() {
    using smoe::Form;
    using smoe::Type;
    const smoe::ViewAbout absent = {-1, 0, {}, {}};
    smoe::ProgramAbout made;
    made.buffers = {{Type::f32, WIDE, false, false, false, 0},
                    {Type::f32, 3 * HEAD, false, false, false, WIDE * 4},
                    {Type::f32, HEAD, false, true, false, 0}};
    made.constants = {{Form::f32, WORDS, WIDE, 0, false, 0},
                      {Form::f32, 3 * HEAD, WIDE, 0, false, WORDS * WIDE * 4}};
    made.states = {{1, HEAD, HEAD, false}};
    const smoe::ViewAbout x = view(0, 0, WIDE);
    made.segments = {{
        {"embedding", "", {x}, 0, 0, {1.0}},
        {"norm", "rms", {x, absent, absent, absent, absent, x, absent}, -1, 0, {1e-5}},
        {"product", "", {x, absent, view(1, 0, 3 * HEAD)}, 1, 0, {}},
        {"attention", "", {head(1, 0), head(1, HEAD), head(1, 2 * HEAD), absent, head(2, 0)}, -1, 0,
         {0.25, 0, 0}},
    }};
    return made;
}

// What an attention with one head of keys remembers; `byte(i)` is what is there before.
struct Remembered {
    std::vector<std::uint8_t> bytes;
    std::vector<std::int64_t> table;
    smoe::KeyValues values;

    template <class F>
    Remembered(smoe::StateKind kind, std::size_t tokens, std::size_t width, F&& byte) {
        const std::size_t blocks = (tokens + smoe::BLOCK_TOKENS - 1) / smoe::BLOCK_TOKENS;
        const std::size_t nbytes = 2 * smoe::BLOCK_TOKENS * width * sizeof(float);  // at most
        bytes.resize(blocks * nbytes + 64);
        for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = byte(i);
        auto first = std::int64_t(reinterpret_cast<std::uintptr_t>(bytes.data()) / 64 * 64 + 64);
        for (std::size_t b = 0; b < blocks; ++b)
            table.push_back(first + std::int64_t(b * nbytes));
        values = smoe::key_values(table.data(), kind, tokens, 1, width, width, false);
    }
};

// A program that several callers share, and what it gives on one thread.
struct Shared {
    std::vector<float> memory;
    smoe::Program program;

    explicit Shared(std::size_t threads)
        : memory((WORDS + 3 * HEAD) * WIDE + 16),
          program(about(), weights(), (WORDS + 3 * HEAD) * WIDE * 4, smoe::portable, threads) {}

    const std::uint8_t* weights() {
        float* first = memory.data();
        while (reinterpret_cast<std::uintptr_t>(first) % 64) ++first;
        for (std::size_t i = 0; i < (WORDS + 3 * HEAD) * WIDE; ++i)
            first[i] = float(i * 29 % 103) / 103 - .5f;
        return reinterpret_cast<const std::uint8_t*>(first);
    }

    // Two sequences of a step.
    std::vector<float> solve() {
        const auto zero = [](std::size_t) { return std::uint8_t(0); };
        Remembered first(smoe::StateKind::f32, TOKENS_OF, HEAD, zero);
        Remembered second(smoe::StateKind::int8, TOKENS_OF, HEAD, zero);
        smoe::State states[2];
        smoe::StepRows rows;
        for (std::size_t s = 0; s < 2; ++s) {
            states[s] = {TOKENS_OF, {s ? second.values : first.values}, {}, nullptr};
            rows.sequences.push_back({&states[s], 0, 0, TOKENS_OF});
        }
        for (std::size_t i = 0; i < 2 * TOKENS_OF; ++i) rows.ids.push_back(i * 5 % WORDS);
        program.begin(rows);
        program.run(rows, 0);
        std::vector<float> y(2 * TOKENS_OF * HEAD);
        std::memcpy(y.data(), program.at(rows, 2), y.size() * sizeof(float));
        program.end(rows);
        return y;
    }
};

}  // namespace
