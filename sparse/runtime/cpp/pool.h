// A pool of threads that sleep between tasks: they neither spin nor outlive the network.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace sparse_runtime {

class Pool {
 public:
  // `threads` counts the caller, who works too.
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
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

  // Call task(index, thread) once for each index below `count` and return when all are done. One
  // caller at a time.
  void run(int64_t count, const std::function<void(int64_t, int)>& task) {
    if (workers_.empty() || count < 2) {
      for (int64_t i = 0; i < count; ++i) task(i, 0);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      busy_ = int(workers_.size());
      ++round_;
    }
    wake_.notify_all();
    work(task, count, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

 private:
  void work(const std::function<void(int64_t, int)>& task, int64_t count, int thread) {
    for (int64_t i = next_.fetch_add(1); i < count; i = next_.fetch_add(1)) task(i, thread);
  }

  void serve(int thread) {
    int64_t seen = 0;
    for (;;) {
      const std::function<void(int64_t, int)>* task;
      int64_t count;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || round_ != seen; });
        if (stopping_) return;
        seen = round_;
        task = task_;
        count = count_;
      }
      work(*task, count, thread);
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (--busy_ > 0) continue;
      }
      done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int64_t, int)>* task_ = nullptr;
  int64_t count_ = 0;
  int busy_ = 0;
  int64_t round_ = 0;
  bool stopping_ = false;
  std::atomic<int64_t> next_{0};
};

}  // namespace sparse_runtime
