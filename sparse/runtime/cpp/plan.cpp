// The C interface for programs without Python: plans, which plan_file.py writes.
//
// A plan is, each part from a multiple of 64 bytes on and all numbers little-endian: a Header; mean
// and standard deviation per channel; operations, in whose pointers is 0 or 1 + the number of a
// table; pieces; where each table begins and how many bytes it has; the tables.
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "check.h"
#include "conv.h"
#include "include/sparse_runtime.h"
#include "network.h"
#include "retune.h"
#include "sha256.h"

namespace sparse_runtime {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "plans are little-endian");

constexpr char kMagic[8] = {'S', 'P', 'A', 'R', 'S', 'E', 'P', 'L'};
constexpr int64_t kPart = 64;             // bytes to which parts and tables are aligned
constexpr int64_t kMaxThreads = 1024;
constexpr int64_t kMaxImage = int64_t(1) << 31;  // floats of an image or of an output

struct Header {
  char magic[8];
  uint8_t digest[32];  // SHA-256 of everything that follows
  int64_t version, bytes;
  int64_t lanes, registers, op_bytes;
  int64_t threads;  // for which parts of the channels were cut
  int64_t arena;    // floats
  int64_t image[3], output[3];  // channels, height, width
  int64_t num_ops, num_pieces, num_tables;
  char level[16];
};
static_assert(sizeof(Header) == 184, "plan_file.py writes this header");

struct Table {
  int64_t begin, bytes;
};

// Why a call fails.
struct Failure {
  sparse_status status;
  std::string text;
};

thread_local std::string last_error;

// Call f and turn what it throws into a status.
template <typename F>
sparse_status guarded(F f) {
  const auto fail = [](sparse_status status, const char* text) {
    try {
      last_error = text;
    } catch (...) {
      last_error.clear();
    }
    return status;
  };
  try {
    f();
    return SPARSE_OK;
  } catch (const Failure& failure) {
    return fail(failure.status, failure.text.c_str());
  } catch (const Damage& damage) {
    return fail(SPARSE_BAD_PLAN, damage.what());
  } catch (...) {
    return fail(SPARSE_NO_MEMORY, "no memory");
  }
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Bytes = std::unique_ptr<char, Free>;

// Bytes at a multiple of 64, as the tables require.
Bytes allocate(size_t size) {
  Bytes bytes(static_cast<char*>(std::aligned_alloc(kPart, (size + kPart) / kPart * kPart)));
  if (!bytes) throw std::bad_alloc();
  return bytes;
}

// Half of the machine's memory, as in memory.py: a small file cannot ask for more.
int64_t memory_limit() {
  const int64_t pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
  return pages > 0 && page > 0 ? pages * page / 2 : int64_t(4) << 30;
}

std::string vectors(int64_t lanes, int64_t registers) {
  return std::to_string(lanes) + " lanes and " + std::to_string(registers) + " registers";
}

void require(bool fits, const char* what) {
  if (!fits) throw Damage(std::string("the plan is damaged: ") + what);
}

int64_t size_of(const int64_t shape[3]) {
  int64_t size = 1;
  for (int i = 0; i < 3; ++i) {
    require(shape[i] >= 1 && shape[i] < kMaxImage / size, "a shape is out of range");
    size *= shape[i];
  }
  return size;
}

void fit_memory(double floats) {
  if (floats > double(memory_limit()) / sizeof(float)) {
    throw Failure{SPARSE_NO_MEMORY, "the plan needs more than half of the memory of this machine"};
  }
}

// A plan that is checked, and its memory.
class Plan {
 public:
  Plan(Bytes bytes, size_t size) : bytes_(std::move(bytes)), size_(int64_t(size)) {
    read_header();
    const int64_t pointers = int64_t(offsetof(Op, mask)) / 8, members = int64_t(sizeof(Op)) / 8;
    const int64_t channels = header.image[0];
    mean = reinterpret_cast<const float*>(part(channels, sizeof(float)));
    std = reinterpret_cast<const float*>(part(channels, sizeof(float)));
    for (int64_t c = 0; c < channels; ++c) {
      require(std::isfinite(mean[c]) && std::isfinite(std[c]) && std[c] > 0, "its normalization");
    }
    const auto* stored = reinterpret_cast<const int64_t*>(part(header.num_ops, sizeof(Op)));
    pieces = reinterpret_cast<const Piece*>(part(header.num_pieces, sizeof(Piece)));
    read_tables();
    ops.resize(size_t(header.num_ops));
    for (Op& op : ops) {
      int64_t values[sizeof(Op) / 8];
      std::memcpy(values, stored, sizeof values);
      for (int64_t i = pointers; i < members; ++i) values[i] = pointer(values[i]);
      std::memcpy(&op, values, sizeof op);
      stored += members;
    }
    check();
  }

  // Activations and what each thread needs besides must fit.
  void check_memory(int threads) const {
    fit_memory(double(header.arena) + double(thread_floats(ops)) * threads);
  }

  int64_t image_size() const { return limits_.image; }
  int64_t output_size() const { return limits_.output; }

  Header header;
  const float *mean, *std;
  std::vector<Op> ops;
  const Piece* pieces;

 private:
  void read_header() {
    if (size_ < int64_t(sizeof header) || std::memcmp(bytes_.get(), kMagic, sizeof kMagic) != 0) {
      throw Damage("this is no plan");
    }
    std::memcpy(&header, bytes_.get(), sizeof header);
    if (header.version != kPlanVersion) {
      throw Failure{SPARSE_OTHER_VERSION,
                    "the plan has version " + std::to_string(header.version) +
                        ", this library reads version " + std::to_string(kPlanVersion) +
                        ": export it again"};
    }
    if (header.bytes != size_) {
      throw Damage("the plan is damaged: it has " + std::to_string(size_) + " bytes of " +
                   std::to_string(header.bytes));
    }
    const size_t hashed = offsetof(Header, version);
    const auto digest = sha256(reinterpret_cast<const uint8_t*>(bytes_.get()) + hashed,
                               size_t(size_) - hashed);
    require(std::memcmp(digest.data(), header.digest, digest.size()) == 0, "its digest differs");
    header.level[sizeof header.level - 1] = 0;
    if (header.lanes != kLanes || header.registers != kRegisters) {
      throw Failure{SPARSE_OTHER_LEVEL,
                    "the plan is for " + vectors(header.lanes, header.registers) + " (level " +
                        header.level + "), this library has " + vectors(kLanes, kRegisters) +
                        ": export it for the level of the library"};
    }
    if (header.op_bytes != int64_t(sizeof(Op))) {
      throw Failure{SPARSE_OTHER_VERSION,
                    "the plan has operations of " + std::to_string(header.op_bytes) +
                        " bytes, this library's have " + std::to_string(sizeof(Op)) +
                        ": export it again"};
    }
    require(header.threads >= 1 && header.threads <= kMaxThreads, "its number of threads");
    limits_.image = size_of(header.image);
    limits_.output = size_of(header.output);
    limits_.arena = header.arena;
    require(header.arena >= 0, "its memory");
    fit_memory(double(header.arena));
    at_ = int64_t(sizeof header);
  }

  // The next part: `count` elements of a size.
  const char* part(int64_t count, size_t size) {
    at_ = (at_ + kPart - 1) / kPart * kPart;
    require(at_ <= size_ && count >= 0 && count <= (size_ - at_) / int64_t(size),
            "its parts lie outside");
    const char* start = bytes_.get() + at_;
    at_ += count * int64_t(size);
    return start;
  }

  void read_tables() {
    const auto* tables = reinterpret_cast<const Table*>(part(header.num_tables, sizeof(Table)));
    tables_.assign(tables, tables + header.num_tables);
    for (const Table& table : tables_) {
      require(table.begin >= at_ && table.begin % kPart == 0 && table.begin < size_ &&
                  table.bytes >= 0 && table.bytes <= size_ - table.begin,
              "a table lies outside");
      require(limits_.table_bytes.emplace(bytes_.get() + table.begin, table.bytes).second,
              "two tables are one");
    }
  }

  // What an operation has in place of a pointer.
  int64_t pointer(int64_t stored) const {
    require(stored >= 0 && stored <= header.num_tables, "there is no such table");
    return stored ? reinterpret_cast<int64_t>(bytes_.get() + tables_[size_t(stored - 1)].begin) : 0;
  }

  void check() const {
    require(!ops.empty(), "it has no operations");
    for (size_t i = 0; i < ops.size(); ++i) {
      try {
        check_op(ops[i], limits_);
      } catch (const Damage& damage) {
        throw Damage("the plan is damaged: operation " + std::to_string(i) + ": " + damage.what());
      }
    }
    std::vector<int64_t> left;  // rows that no piece has yet
    for (const Op& op : ops) left.push_back(sparse_runtime_extent(&op));
    for (int64_t i = 0; i < header.num_pieces; ++i) {
      const Piece& p = pieces[i];
      require(p.op >= 0 && p.op < int64_t(ops.size()), "there is no such operation");
      require(0 <= p.begin && p.begin < p.end &&
                  p.end <= sparse_runtime_extent(&ops[size_t(p.op)]) &&
                  (left[size_t(p.op)] -= p.end - p.begin) >= 0,
              "its pieces");
    }
    require(std::all_of(left.begin(), left.end(), [](int64_t rows) { return rows == 0; }),
            "its pieces");
  }

  Bytes bytes_;
  int64_t size_, at_ = 0;
  Limits limits_;
  std::vector<Table> tables_;
};

// The fastest of some ways to compute an operation. They are timed in turn, over several rounds;
// later rounds keep the faster ones only.
Way fastest(void* network, const std::vector<Way>& ways) {
  std::vector<std::pair<double, size_t>> seconds;
  for (size_t i = 0; i < ways.size(); ++i) {
    seconds.emplace_back(std::numeric_limits<double>::infinity(), i);
  }
  for (size_t repetitions : {1, 1, 2, 2, 4, 4}) {
    std::stable_sort(seconds.begin(), seconds.end());
    for (size_t i = 0; i < (ways.size() + repetitions - 1) / repetitions; ++i) {
      auto& [least, way] = seconds[i];
      least = std::min(least, sparse_runtime_time(network, &ways[way].op, int64_t(repetitions)));
    }
  }
  return ways[std::min_element(seconds.begin(), seconds.end())->second];
}

}  // namespace
}  // namespace sparse_runtime

using namespace sparse_runtime;

// Handles that no call is using, each with activations and threads. There are as many handles as
// there have been calls at the same time.
struct sparse_network {
  sparse_network(Bytes bytes, size_t size, int wanted)
      : plan(std::move(bytes), size), threads(wanted > 0 ? wanted : int(plan.header.threads)) {
    plan.check_memory(threads);
    idle.push_back(create());
    started = int(sparse_runtime_threads(idle.front()));
  }
  ~sparse_network() { clear(); }
  sparse_network(const sparse_network&) = delete;
  sparse_network& operator=(const sparse_network&) = delete;

  void* create() const {
    void* handle = sparse_runtime_create(plan.ops.data(), plan.header.num_ops, plan.pieces,
                                         plan.header.num_pieces, plan.header.arena, threads);
    if (!handle) throw std::bad_alloc();
    return handle;
  }

  void clear() {
    for (void* handle : idle) sparse_runtime_destroy(handle);
    idle.clear();
  }

  // A handle for one call; it must be given back.
  void* lend() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      if (!idle.empty()) {
        void* handle = idle.back();
        idle.pop_back();
        return handle;
      }
    }
    return create();
  }

  void give_back(void* handle) {
    try {
      std::lock_guard<std::mutex> lock(mutex);
      idle.push_back(handle);
    } catch (...) {
      sparse_runtime_destroy(handle);
    }
  }

  void run(const float* images, int64_t count, float* outputs) {
    void* handle = lend();
    const bool failed = sparse_runtime_run(handle, images, plan.image_size(), outputs,
                                           plan.output_size(), count) != 0;
    give_back(handle);
    if (failed) throw std::bad_alloc();
  }

  void retune() {
    std::vector<Op> ops = plan.ops;
    std::vector<std::shared_ptr<const ConvTables>> tables = owned;
    tables.resize(ops.size());
    void* handle = lend();
    try {
      for (size_t i = 0; i < ops.size(); ++i) {
        const std::vector<Way> all = ways(ops[i]);
        if (all.size() < 2) continue;
        const Way best = fastest(handle, all);
        ops[i] = best.op;
        if (best.tables) tables[i] = best.tables;  // else those that it had
      }
    } catch (...) {
      give_back(handle);
      throw;
    }
    give_back(handle);
    plan.ops.swap(ops);
    owned.swap(tables);
    clear();  // the handles compute with the operations with which they were made
  }

  Plan plan;
  const int threads;
  int started;
  std::vector<std::shared_ptr<const ConvTables>> owned;  // by operation, since retune
  std::mutex mutex;
  std::vector<void*> idle;
};

namespace {

void check_call(const void* network, const void* images, int64_t count, const void* outputs) {
  if (!network) throw Failure{SPARSE_BAD_ARGUMENT, "network is null"};
  if (count < 0) {
    throw Failure{SPARSE_BAD_ARGUMENT,
                  "num_images must not be negative, got " + std::to_string(count)};
  }
  if (count > 0 && (!images || !outputs)) {
    throw Failure{SPARSE_BAD_ARGUMENT, images ? "outputs is null" : "images is null"};
  }
}

// Copy interleaved pixels to planes, normalized.
void normalize(const Plan& plan, const uint8_t* pixels, float* image) {
  const int64_t channels = plan.header.image[0], size = plan.image_size() / channels;
  for (int64_t c = 0; c < channels; ++c) {
    float values[256];
    for (int x = 0; x < 256; ++x) values[x] = (float(x) / 255.0f - plan.mean[c]) / plan.std[c];
    for (int64_t i = 0; i < size; ++i) image[c * size + i] = values[pixels[i * channels + c]];
  }
}

// Open the plan that `read` returns, with its size; `path` is null if it is in memory.
template <typename F>
sparse_status open_bytes(int threads, sparse_network** network, const char* path, F read) {
  if (network) *network = nullptr;
  return guarded([&] {
    const std::string name = path ? std::string(path) + ": " : "";
    if (!network) throw Failure{SPARSE_BAD_ARGUMENT, "network is null"};
    if (threads < 0 || threads > kMaxThreads) {
      throw Failure{SPARSE_BAD_ARGUMENT, "threads must be 0 to " + std::to_string(kMaxThreads) +
                                             ", got " + std::to_string(threads)};
    }
    try {
      size_t size = 0;
      Bytes bytes = read(size);
      *network = new sparse_network(std::move(bytes), size, threads);
    } catch (const Damage& damage) {
      throw Failure{SPARSE_BAD_PLAN, name + damage.what()};
    } catch (const Failure& failure) {
      throw Failure{failure.status, name + failure.text};
    }
  });
}

}  // namespace

extern "C" {

int sparse_version() { return SPARSE_RUNTIME_VERSION; }

const char* sparse_status_name(sparse_status status) {
  switch (status) {
    case SPARSE_OK: return "SPARSE_OK";
    case SPARSE_BAD_ARGUMENT: return "SPARSE_BAD_ARGUMENT";
    case SPARSE_NO_FILE: return "SPARSE_NO_FILE";
    case SPARSE_BAD_PLAN: return "SPARSE_BAD_PLAN";
    case SPARSE_OTHER_VERSION: return "SPARSE_OTHER_VERSION";
    case SPARSE_OTHER_LEVEL: return "SPARSE_OTHER_LEVEL";
    case SPARSE_NO_MEMORY: return "SPARSE_NO_MEMORY";
  }
  return "unknown";
}

const char* sparse_error() { return last_error.c_str(); }

sparse_status sparse_open(const char* path, int threads, sparse_network** network) {
  return open_bytes(threads, network, path, [&](size_t& size) {
    if (!path) throw Failure{SPARSE_BAD_ARGUMENT, "path is null"};
    const auto fail = [] {
      return Failure{SPARSE_NO_FILE, std::string("cannot be read: ") + std::strerror(errno)};
    };
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
    if (!file) throw fail();
    std::fgetc(file.get());  // fails where it is a directory
    if (std::ferror(file.get()) || std::fseek(file.get(), 0, SEEK_END) != 0) throw fail();
    const long end = std::ftell(file.get());
    if (end < 0 || std::fseek(file.get(), 0, SEEK_SET) != 0) throw fail();
    size = size_t(end);
    if (int64_t(end) > memory_limit()) throw Failure{SPARSE_NO_MEMORY, "is larger than the memory"};
    Bytes bytes = allocate(size);
    if (std::fread(bytes.get(), 1, size, file.get()) != size) throw fail();
    return bytes;
  });
}

sparse_status sparse_open_memory(const void* data, size_t size, int threads,
                                 sparse_network** network) {
  return open_bytes(threads, network, nullptr, [&](size_t& copied) {
    if (!data) throw Failure{SPARSE_BAD_ARGUMENT, "data is null"};
    if (size > size_t(memory_limit())) throw std::bad_alloc();
    Bytes bytes = allocate(size);
    std::memcpy(bytes.get(), data, size);
    copied = size;
    return bytes;
  });
}

void sparse_close(sparse_network* network) { delete network; }

void sparse_input_shape(const sparse_network* network, int64_t shape[3]) {
  std::copy_n(network->plan.header.image, 3, shape);
}

void sparse_output_shape(const sparse_network* network, int64_t shape[3]) {
  std::copy_n(network->plan.header.output, 3, shape);
}

const float* sparse_mean(const sparse_network* network) { return network->plan.mean; }
const float* sparse_std(const sparse_network* network) { return network->plan.std; }
const char* sparse_level(const sparse_network* network) { return network->plan.header.level; }

int sparse_threads(const sparse_network* network) { return network->started; }

sparse_status sparse_run(sparse_network* network, const float* images, int64_t num_images,
                         float* outputs) {
  return guarded([&] {
    check_call(network, images, num_images, outputs);
    network->run(images, num_images, outputs);
  });
}

sparse_status sparse_run_uint8(sparse_network* network, const uint8_t* images, int64_t num_images,
                               float* outputs) {
  return guarded([&] {
    check_call(network, images, num_images, outputs);
    const int64_t size = network->plan.image_size(), output = network->plan.output_size();
    const int64_t most = std::min<int64_t>(network->threads, num_images);  // that run side by side
    std::vector<float> normalized(size_t(most * size));
    for (int64_t i = 0, count; i < num_images; i += count) {
      count = std::min(most, num_images - i);
      for (int64_t k = 0; k < count; ++k) {
        normalize(network->plan, images + (i + k) * size, normalized.data() + k * size);
      }
      network->run(normalized.data(), count, outputs + i * output);
    }
  });
}

sparse_status sparse_retune(sparse_network* network) {
  return guarded([&] {
    if (!network) throw Failure{SPARSE_BAD_ARGUMENT, "network is null"};
    network->retune();
  });
}

}  // extern "C"
