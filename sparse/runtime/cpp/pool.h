// A thread pool. The threads share the layers of a network. Between two layers an idle thread first
// polls for work, because waking it up would take as long. Then it yields to others. Then it
// sleeps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#ifdef __linux__
#include <sched.h>
#endif

namespace sparse_runtime {

class Pool {
 public:
  // `threads` includes the caller, which works too. The pool is smaller if the system starts fewer.
  explicit Pool(int threads) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
    } catch (const std::system_error&) {
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const { return int(workers_.size()) + 1; }

  // Call task(index, thread) once for each index below `count`, and return when all are done.
  // Thread t begins with index t, so that it finds in its cache what it wrote in the layer before.
  // Only one caller at a time is allowed.
  void run(int64_t count, const std::function<void(int64_t, int)>& task) {
    if (workers_.empty() || count < 2) {
      for (int64_t i = 0; i < count; ++i) task(i, 0);
      return;
    }
    task_ = &task;
    count_ = count;
    next_.store(size(), std::memory_order_relaxed);
    busy_.store(int(workers_.size()), std::memory_order_relaxed);
    caller_processor_.store(processor(), std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      round_.fetch_add(1);  // publishes everything above
    }
    wake_.notify_all();
    work(task, count, 0);
    const auto done = [this] { return busy_.load() == 0; };
    if (poll(done)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, done);
  }

 private:
  static constexpr int kPolls = 2000;   // take 20 to 80 microseconds
  static constexpr int kYields = 1000;  // take about a millisecond

  // Poll a condition for a short time; return whether it has come true.
  template <typename Condition>
  static bool poll(Condition condition) {
    for (int i = 0; i < kPolls; ++i) {
      if (condition()) return true;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#elif defined(__aarch64__)
      asm volatile("yield");
#endif
    }
    for (int i = 0; i < kYields; ++i) {
      if (condition()) return true;
      std::this_thread::yield();
    }
    return false;
  }

#ifdef __linux__
  static int processor() { return sched_getcpu(); }

  // Move the thread to another processor. Systems tend to wake a thread up where its waker runs.
  // The two would then take turns until the system balances the load, which takes as long as a
  // network.
  static void leave(int processor) {
    cpu_set_t allowed;
    if (processor < 0 || sched_getcpu() != processor) return;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
    cpu_set_t others = allowed;
    CPU_CLR(processor, &others);
    if (sched_setaffinity(0, sizeof others, &others) == 0) {
      sched_setaffinity(0, sizeof allowed, &allowed);
    }
  }
#else
  static int processor() { return -1; }
  static void leave(int) {}
#endif

  void work(const std::function<void(int64_t, int)>& task, int64_t count, int thread) {
    for (int64_t i = thread; i < count; i = next_.fetch_add(1)) task(i, thread);
  }

  void serve(int thread) {
    int64_t seen = 0;
    const auto called = [&] { return stopping_.load() || round_.load() != seen; };
    for (;;) {
      if (!poll(called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, called);
      }
      if (stopping_) return;
      leave(caller_processor_.load(std::memory_order_relaxed));
      seen = round_.load();
      work(*task_, count_, thread);
      if (busy_.fetch_sub(1) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);  // the caller has not checked yet, or it sleeps
        done_.notify_one();
      }
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  // The caller writes these while no thread works.
  const std::function<void(int64_t, int)>* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0}, round_{0};
  std::atomic<int> busy_{0}, caller_processor_{-1};
  std::atomic<bool> stopping_{false};
};

}  // namespace sparse_runtime
