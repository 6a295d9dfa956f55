#include "mixture.h"

namespace smoe {
namespace {

// Slots by their experts; false where one is not there.
bool dispatch(Mixture& m, const MixtureLayer& l, const std::int64_t* ids, std::size_t slots) {
    m.counts.assign(l.experts + 1, 0);
    for (std::size_t s = 0; s < slots; ++s) {
        if (ids[s] < 0 || ids[s] > std::int64_t(l.experts)) return false;
        const auto id = std::size_t(ids[s]);
        if (id < l.experts && (l.where[id] < 0 || l.where[id] >= std::int64_t(m.frames)))
            return false;
        ++m.counts[id];
    }
    m.at.clear(), m.levels.clear(), m.starts.assign(1, 0);
    std::size_t before = 0;
    for (std::size_t e = 0; e < l.experts; ++e) {
        const std::size_t count = m.counts[e];
        m.counts[e] = before, before += count;  // from here on where its next slot lies
        if (!count) continue;
        m.at.push_back(m.records + std::size_t(l.where[e]) * m.nbytes);
        m.levels.push_back(l.level);
        m.starts.push_back(before);
    }
    m.tokens.resize(before), m.place.assign(slots, -1);
    for (std::size_t s = 0; s < slots; ++s) {
        if (ids[s] == std::int64_t(l.experts)) continue;
        m.place[s] = std::ptrdiff_t(m.counts[std::size_t(ids[s])]++);
        m.tokens[std::size_t(m.place[s])] = s / l.top_k;
    }
    return true;
}

// Rank after rank.
void combine(const Mixture& m, const MixtureLayer& l, const float* weights, std::size_t rows,
             float* y) {
    const std::size_t hidden = l.layer->down.n_out;
    for (std::size_t s = 0; s < rows * l.top_k; ++s) {
        const std::size_t rank = s % l.top_k;
        float* sum = y + s / l.top_k * hidden;
        const float w = weights[s];
        if (m.place[s] < 0) {
            for (std::size_t h = 0; h < hidden; ++h)
                sum[h] = rank ? sum[h] + 0.0f * w : 0.0f * w;
            continue;
        }
        const float* x = m.outputs.data() + std::size_t(m.place[s]) * hidden;
        if (rank)
            for (std::size_t h = 0; h < hidden; ++h) sum[h] += x[h] * w;
        else
            for (std::size_t h = 0; h < hidden; ++h) sum[h] = x[h] * w;
    }
}

}  // namespace

std::size_t steps(Program& program, StepRows& rows, Mixture& m, std::size_t first) {
    for (std::size_t i = first; i < m.layers.size(); ++i) {
        const MixtureLayer& l = m.layers[i];
        const auto* ids = reinterpret_cast<const std::int64_t*>(program.at(rows, l.ids));
        if (!dispatch(m, l, ids, rows.rows * l.top_k)) return i;
        m.outputs.resize(m.tokens.size() * l.layer->down.n_out);
        const auto* x = reinterpret_cast<const float*>(program.at(rows, l.hidden));
        if (!m.tokens.empty())
            ffn({&program.variant, l.layer, m.at.size(), m.at.data(), m.levels.data(),
                 m.starts.data(), m.tokens.data(), x, rows.rows, m.outputs.data(),
                 program.threads});
        combine(m, l, reinterpret_cast<const float*>(program.at(rows, l.weights)), rows.rows,
                reinterpret_cast<float*>(program.at(rows, l.output)));
        program.run(rows, l.segment + 1);
    }
    return m.layers.size();
}

}  // namespace smoe
