#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace smoe {
namespace {

constexpr std::size_t MOST = 64;  // threads
constexpr std::size_t RUNS = 4;   // of consecutive items that each thread takes, if all are as fast
constexpr auto PATIENCE =
    std::chrono::microseconds(50);  // that a worker looks for work before it sleeps

struct Pool {
    std::mutex busy;  // held by the thread whose job it is
    std::mutex sleep;
    std::condition_variable wake;
    std::vector<std::thread> workers;
    // The job. Written before `round` rises and read after it was seen to.
    void (*run)(void*, std::size_t) = nullptr;
    void* context = nullptr;
    std::size_t items = 0, run_of = 1;
    std::atomic<std::size_t> next{0}, working{0};
    std::atomic<std::size_t> round{0};

    void take() {
        for (std::size_t i; (i = next.fetch_add(run_of, std::memory_order_relaxed)) < items;)
            for (std::size_t end = i + run_of < items ? i + run_of : items; i < end; ++i)
                run(context, i);
    }

    void work(std::size_t me, std::size_t seen) {
        for (;;) {
            const auto until = std::chrono::steady_clock::now() + PATIENCE;
            while (round.load(std::memory_order_acquire) == seen &&
                   std::chrono::steady_clock::now() < until) {}
            if (round.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(sleep);
                wake.wait(lock, [&] { return round.load(std::memory_order_acquire) != seen; });
            }
            // Only helpers of a round read its job: the caller waits for them, so it cannot change
            // meanwhile.
            seen = round.load(std::memory_order_acquire);
            if (me < helpers_of(seen)) {
                take();
                working.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    // The number of helpers travels in the round itself, so that a worker that overslept a round
    // never reads a job that is not its own.
    static std::size_t helpers_of(std::size_t round) { return round % MOST; }
};

Pool* pool = nullptr;
pthread_once_t once = PTHREAD_ONCE_INIT;

void make() {
    pool = new Pool;  // never deleted: its workers live as long as the process
    // Threads do not survive a fork; the child gets a pool of its own.
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
}

void start_worker(Pool& p) {
    const std::size_t me = p.workers.size();
    try {
        p.workers.emplace_back([&p, me, seen = p.round.load()] { p.work(me, seen); });
    } catch (const std::system_error& error) {
        throw std::runtime_error(
            "The system gives no thread more than " + std::to_string(me + 1) +
            " for the experts (" + error.what() +
            "); ask for fewer threads, or raise the limits of memory or processes.");
    }
    p.workers.back().detach();
}

}  // namespace

void parallel(std::size_t items, std::size_t threads, void (*run)(void*, std::size_t),
              void* context) {
    pthread_once(&once, make);
    threads = threads < MOST ? threads : MOST - 1;
    std::unique_lock<std::mutex> ours(pool->busy, std::defer_lock);
    if (items < 2 || threads < 2 || !ours.try_lock()) {
        for (std::size_t i = 0; i < items; ++i) run(context, i);
        return;
    }
    Pool& p = *pool;
    const std::size_t helpers = threads - 1;
    while (p.workers.size() < helpers) start_worker(p);
    p.run = run;
    p.context = context;
    p.items = items;
    p.run_of = items / (threads * RUNS) + 1;
    p.next.store(0, std::memory_order_relaxed);
    p.working.store(helpers, std::memory_order_relaxed);
    {
        std::lock_guard<std::mutex> lock(p.sleep);
        const std::size_t before = p.round.load(std::memory_order_relaxed);
        p.round.store((before / MOST + 1) * MOST + helpers, std::memory_order_release);
    }
    p.wake.notify_all();
    p.take();
    while (p.working.load(std::memory_order_acquire)) std::this_thread::yield();
}

}  // namespace smoe
