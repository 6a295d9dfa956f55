// What the files of the Python face share.
#pragma once
#include <nanobind/nanobind.h>

#include <string>

#include "attention.h"
#include "ffn.h"

namespace smoe {

inline void require(bool holds, const char* sentence) {
    if (!holds) throw nanobind::value_error(sentence);
}

inline const Variant& named(const std::string& name) {
    std::size_t count;
    const Variant* const* found = variants(&count);
    for (std::size_t i = 0; i < count; ++i)
        if (name == found[i]->name) return *found[i];
    throw nanobind::value_error("this processor has no such variant; ask variants()");
}

inline StateKind state_kind(const std::string& name) {
    require(name == "f32" || name == "f16" || name == "int8",
            "what is remembered is f32, f16 or int8");
    return name == "f32" ? StateKind::f32 : name == "f16" ? StateKind::f16 : StateKind::int8;
}

// A ValueError unless records of `nbytes`, the first at `data`, hold what `layer` reads at `level`.
void check_records(const Layer& layer, std::int64_t level, const void* data, std::size_t nbytes);

void bind_backbone(nanobind::module_& m);  // backbone_module.cpp
void bind_program(nanobind::module_& m);   // program_module.cpp

}  // namespace smoe
