// A step of a program that goes on from layer to layer as long as all experts that the routers
// chose are there, without returning to who holds the experts.
//
// What a layer adds is what runtime/experts.py and routing.py `combine` make of it, bit for bit:
// outputs of experts times mixing weights, rank after rank; a slot without an expert adds nothing
// times its weight.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "program.h"

namespace smoe {

// The experts of one layer. Expert e lies in frame where[e] (-1: it is not there) at the level
// wanted. Buffers of the program by their number: hidden [H], ids and weights [top_k], output [H].
struct MixtureLayer {
    const Layer* layer;
    std::size_t level;
    const std::int64_t* where;
    std::size_t experts, top_k;
    std::size_t segment;  // that gives hidden, ids and weights; the next one takes output
    std::size_t hidden, ids, weights, output;
};

struct Mixture {
    std::vector<MixtureLayer> layers;
    const std::uint8_t* records;  // [frames][nbytes]
    std::size_t frames, nbytes;

    // Room for a layer's slots, as ffn.h's Call has them.
    std::vector<const std::uint8_t*> at;
    std::vector<std::size_t> levels, starts, tokens, counts;
    std::vector<std::ptrdiff_t> place;  // of a slot among those of all experts, or -1
    std::vector<float> outputs;
};

// The segment of layer `first` has run. Computes its experts and the next segment, and so on with
// the layers behind; returns the first layer of which an expert is missing (its segment has run,
// and nothing was added), or the number of layers: then all segments have run. Nobody may change
// frames or `where` meanwhile.
std::size_t steps(Program& program, StepRows& rows, Mixture& mixture, std::size_t first);

}  // namespace smoe
