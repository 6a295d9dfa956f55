// Workers that share a list of items with the thread that calls. One job at a time: a second caller
// does its own alone.
#pragma once
#include <cstddef>

namespace smoe {

// run(context, i) for every i < items, on up to `threads` threads including this one; returns when
// all are done. Items are handed out in rising order, in runs, since neighbours lie together in
// memory. After a job the workers look for the next one for some tens of microseconds, which is
// shorter than waking up, then sleep. A thread that the system does not give is a
// std::runtime_error; nothing ran then.
void parallel(std::size_t items, std::size_t threads, void (*run)(void* context, std::size_t item),
              void* context);

template <class F>
void parallel(std::size_t items, std::size_t threads, F&& f) {
    parallel(
        items, threads, [](void* context, std::size_t item) { (*static_cast<F*>(context))(item); },
        &f);
}

}  // namespace smoe
