// The C interface. A network is a list of operations, one arena per thread and a thread pool.
#include <time.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "attention.h"
#include "conv.h"
#include "int8.h"
#include "layers.h"
#include "network.h"
#include "norm.h"
#include "pool.h"

namespace sparse_runtime {

int64_t thread_floats(const std::vector<Op>& ops) {
  int64_t floats = 0;
  for (const Op& op : ops) {
    floats = std::max({floats, scratch_floats(op), attention_scratch_floats(op)});
  }
  return floats;
}

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kDisplacing = size_t(1) << 20;  // floats: more than a core's own caches hold
constexpr size_t kHugePage = size_t(2) << 20;

// Zeroed floats, aligned to a cache line. Large arrays use huge pages if the system has them.
class Floats {
 public:
  explicit Floats(int64_t count) {
    size_t bytes = std::max<size_t>(size_t(count) * sizeof(float), kAlignment);
    const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
    bytes = (bytes + alignment - 1) / alignment * alignment;
    data_ = static_cast<float*>(std::aligned_alloc(alignment, bytes));
    if (!data_) throw std::bad_alloc();
#ifdef __linux__
    if (alignment == kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
    std::memset(data_, 0, bytes);
  }
  ~Floats() { std::free(data_); }
  Floats(const Floats&) = delete;
  Floats& operator=(const Floats&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

struct Image {
  const float* pixels;
  float* arena;
  float* logits;
};

// Some rows of some channels of an operation.
struct Slice {
  int64_t begin_part, end_part, begin, end;
};

bool is_vector(const Op& op) {
  return op.kind == kMeanPool || op.kind == kSparseLinear || op.kind == kDenseLinear ||
         op.kind == kToken || op.kind == kQuantMeanPool || op.kind == kQuantLinear;
}

// What slices of an operation are counted in. An attention counts the windows of all heads; a norm
// or a quantization of a vector is one whole.
int64_t extent(const Op& op) {
  if (op.kind == kAttention) return op.heads * op.num_windows;
  if (op.kind == kVectorNorm || op.kind == kQuantizeVector) return 1;
  return is_vector(op) ? op.channels : op.rows;
}

void run_slice(const Op& op, const Image& image, const Slice& s, float* scratch) {
  float* out = op.out < 0 ? image.logits : image.arena + op.out;
  switch (op.kind) {
    case kInput: return read_input(op, image.pixels, image.arena, s.begin, s.end);
    case kSparseConv:
    case kQuantConv:
      return sparse_conv(op, image.arena, s.begin_part, s.end_part, s.begin, s.end, scratch);
    case kDenseConv:
      return dense_conv(op, image.arena, s.begin_part, s.end_part, s.begin, s.end, scratch);
    case kScale: return scale(op, image.arena, s.begin, s.end);
    case kMaxPool: return max_pool(op, image.arena, s.begin, s.end);
    case kRepack: return repack(op, image.arena, s.begin, s.end);
    case kOutput: return write_output(op, image.arena, out, s.begin, s.end);
    case kLayerNorm:
      return layer_norm(op, image.arena, s.begin_part, s.end_part, s.begin, s.end);
    case kVectorNorm: return vector_norm(op, image.arena, out);
    case kTokens: return tokens(op, image.arena, s.begin, s.end);
    case kToken: return token(op, image.arena, out, s.begin, s.end);
    case kAttention: return attention(op, image.arena, s.begin, s.end, scratch);
    case kMeanPool: return mean_pool(op, image.arena, out, s.begin, s.end);
    case kQuantInput: return quant_input(op, image.pixels, image.arena, s.begin, s.end);
    case kQuantMaxPool: return quant_max_pool(op, image.arena, s.begin, s.end);
    case kQuantLookup: return quant_lookup(op, image.arena, s.begin, s.end);
    case kQuantize:
      return quantize(op, image.arena, s.begin_part, s.end_part, s.begin, s.end);
    case kQuantizeVector: return quantize_vector(op, image.arena);
    case kQuantMeanPool: return quant_mean_pool(op, image.arena, out, s.begin, s.end);
    case kQuantLinear: return quant_linear(op, image.arena, out, s.begin, s.end);
    default: return linear(op, image.arena, out, s.begin, s.end);
  }
}

void run_rows(const Op& op, const Image& image, int64_t begin, int64_t end, float* scratch) {
  run_slice(op, image, {0, op.num_parts, begin, end}, scratch);
}

class Network {
 public:
  Network(const Op* ops, int64_t num_ops, const Piece* pieces, int64_t num_pieces,
          int64_t arena_floats, int threads)
      : ops_(ops, ops + num_ops),
        pieces_(pieces, pieces + num_pieces),
        arena_floats_(arena_floats),
        pool_(threads) {
    const int64_t scratch = thread_floats(ops_);
    for (int i = 0; i < pool_.size(); ++i) scratch_.push_back(std::make_unique<Floats>(scratch));
    arenas_.push_back(std::make_unique<Floats>(arena_floats));
  }

  void run(const float* images, int64_t image_size, float* logits, int64_t logits_size, int64_t n) {
    const int64_t threads = pool_.size();
    const int64_t side_by_side = threads > 1 ? n / threads * threads : 0;
    if (side_by_side > 0) {
      while (int64_t(arenas_.size()) < threads) {
        arenas_.push_back(std::make_unique<Floats>(arena_floats_));
      }
      pool_.run(side_by_side, [&](int64_t i, int thread) {
        const Image image{images + i * image_size, arenas_[thread]->get(),
                          logits + i * logits_size};
        run_alone(image, scratch_[thread]->get());
      });
    }
    for (int64_t i = side_by_side; i < n; ++i) {
      const Image image{images + i * image_size, arenas_[0]->get(), logits + i * logits_size};
      if (threads == 1) {
        run_alone(image, scratch_[0]->get());
      } else {
        for (const Op& op : ops_) run_shared(op, image);
      }
    }
  }

  int threads() const { return pool_.size(); }

  // Return the least processor time, in seconds, of one operation on the content of the arena. As
  // in a running network, the input has just been in the cache, and the weights have not.
  double time(const Op& op, int repetitions) {
    double best = 1e30;
    others_.resize(kDisplacing);
    std::vector<float> logits(size_t(op.channels));
    const Image image{logits.data(), arenas_[0]->get(), logits.data()};
    const float* in = arenas_[0]->get() + op.in;
    // Up to the first vector of the last channel: the arena may end after it.
    const int64_t in_floats = (op.height - 1) * op.in_row + (op.in_channels - 1) * op.in_plane + 1;
    for (int i = 0; i < repetitions; ++i) {
      touch(others_.data(), int64_t(others_.size()));
      touch(in, in_floats);
      const double start = now();
      run_rows(op, image, 0, extent(op), scratch_[0]->get());
      best = std::min(best, now() - start);
    }
    return best;
  }

  void profile(const float* images, float* logits, double* seconds) {
    const Image image{images, arenas_[0]->get(), logits};
    std::fill(seconds, seconds + ops_.size(), 0.0);
    for (const Piece& p : pieces_) {
      const double start = now();
      run_rows(ops_[p.op], image, p.begin, p.end, scratch_[0]->get());
      seconds[p.op] += now() - start;
    }
  }

 private:
  static double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  }

  static void touch(const float* data, int64_t count) {
    volatile float sink = 0;
    for (int64_t i = 0; i < count; i += kLineFloats) sink = data[i];
    (void)sink;
  }

  void run_alone(const Image& image, float* scratch) const {
    for (const Piece& p : pieces_) run_rows(ops_[p.op], image, p.begin, p.end, scratch);
  }

  // Run an operation for one image on all threads. They share its rows, or its channels.
  void run_shared(const Op& op, const Image& image) {
    const int64_t size = extent(op);
    const int64_t threads = pool_.size();
    // Large images are split by rows, one slice per thread: in the next layer a thread mostly reads
    // from its own cache what it wrote. In small images most of the traffic is weights, so channels
    // are split. In int8 that begins where tiles would have fewer rows, which read the same weights.
    // (In float32 other tiles may add in another order.)
    const int64_t least = op.kind == kQuantConv ? std::max<int64_t>(2, op.tile_rows) : 2;
    const bool by_rows = size >= least * threads || op.num_parts == 1;
    const int64_t parts = by_rows ? 1 : std::min<int64_t>(op.num_parts, threads);
    const int64_t slices = by_rows ? std::min(size, threads) : 1;
    pool_.run(slices * parts, [&](int64_t i, int thread) {
      const int64_t slice = i / parts;
      const int64_t p = i % parts, all = op.num_parts;
      run_slice(op, image,
               {all * p / parts, all * (p + 1) / parts, size * slice / slices,
                size * (slice + 1) / slices},
               scratch_[thread]->get());
    });
  }

  std::vector<Op> ops_;
  std::vector<Piece> pieces_;
  int64_t arena_floats_;
  std::vector<std::unique_ptr<Floats>> arenas_, scratch_;
  std::vector<float> others_;  // displaces weights from the cache; the first `time` allocates it
  Pool pool_;
};

}  // namespace
}  // namespace sparse_runtime

using sparse_runtime::Network;
using sparse_runtime::Op;
using sparse_runtime::Piece;

extern "C" {

int64_t sparse_runtime_lanes() { return sparse_runtime::kLanes; }
int64_t sparse_runtime_registers() { return sparse_runtime::kRegisters; }
int64_t sparse_runtime_max_tile(int64_t group) { return sparse_runtime::max_tile(int(group)); }
int64_t sparse_runtime_fast_int8(int64_t allowed) {
  sparse_runtime::slow_int8 = allowed == 0;
  return sparse_runtime::int8_is_fast();
}
int64_t sparse_runtime_op_size() { return int64_t(sizeof(Op)); }
int64_t sparse_runtime_plan_version() { return sparse_runtime::kPlanVersion; }
int64_t sparse_runtime_extent(const Op* op) { return sparse_runtime::extent(*op); }

void* sparse_runtime_create(const Op* ops, int64_t num_ops, const Piece* pieces,
                            int64_t num_pieces, int64_t arena_floats, int64_t threads) {
  try {
    return new Network(ops, num_ops, pieces, num_pieces, arena_floats, int(threads));
  } catch (...) {
    return nullptr;
  }
}

int64_t sparse_runtime_threads(const void* network) {
  return static_cast<const Network*>(network)->threads();
}

void sparse_runtime_destroy(void* network) { delete static_cast<Network*>(network); }

int64_t sparse_runtime_run(void* network, const float* images, int64_t image_size, float* logits,
                           int64_t logits_size, int64_t num_images) {
  try {
    static_cast<Network*>(network)->run(images, image_size, logits, logits_size, num_images);
    return 0;
  } catch (...) {
    return 1;
  }
}

double sparse_runtime_time(void* network, const Op* op, int64_t repetitions) {
  return static_cast<Network*>(network)->time(*op, int(repetitions));
}

void sparse_runtime_profile(void* network, const float* image, float* logits, double* seconds) {
  static_cast<Network*>(network)->profile(image, logits, seconds);
}

}  // extern "C"
