// Values of a table by comparing with every edge: what lies above one adds the step that the value
// makes there. Sums of integers, exact in floats. The including file has `Floats` of LANES floats.
namespace smoe {
namespace {

template <std::size_t TOTAL, std::size_t LEVELS>
struct Values {
    static constexpr std::size_t EDGES = (1 << TOTAL) - 1;
    typedef std::int32_t Mask __attribute__((vector_size(LANES * 4)));
    Floats edges[EDGES], steps[LEVELS][EDGES], first[LEVELS];

    explicit Values(const Grid& grid) {
        for (std::size_t e = 0; e < EDGES; ++e) edges[e] = Floats{} + grid.edges[e];
        for (std::size_t n = 0; n < LEVELS; ++n) {
            first[n] = Floats{} + grid.values[n][0];
            for (std::size_t e = 0; e < EDGES; ++e)
                steps[n][e] = Floats{} + (grid.values[n][e + 1] - grid.values[n][e]);
        }
    }
    inline void of(Floats x, Floats (&found)[LEVELS]) const {
        for (std::size_t n = 0; n < LEVELS; ++n) found[n] = first[n];
        for (std::size_t e = 0; e < EDGES; ++e) {
            const Mask above = x > edges[e];
            for (std::size_t n = 0; n < LEVELS; ++n)
                if ((e + 1) % (1 << (LEVELS - 1 - n)) == 0)  // only there does a level's value step
                    found[n] += (Floats)((Mask)steps[n][e] & above);
        }
    }
    inline Mask code(Floats x) const {
        Mask code = {};
        for (std::size_t e = 0; e < EDGES; ++e) code -= Mask(x > edges[e]);
        return code;
    }
};

}  // namespace
}  // namespace smoe
