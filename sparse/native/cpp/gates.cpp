// Zero or count the inactive entries of many tensors in one pass.
//
// The pass reads and writes every gradient once and does nothing else, so its time is that of
// memory. The bits of the masks add 1/32 to the traffic. The pass works on four places of a tensor
// in turn, because the processor prefetches for each place separately. This is a quarter faster
// than one place after the other.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kLanes = SPARSE_LANES < 8 ? 8 : SPARSE_LANES;
constexpr int64_t kBlock = 64;  // entries, a multiple of kLanes
constexpr int kPlaces = 4;
constexpr int kAhead = 1024;  // bytes
constexpr int64_t kWorthAThread = 1 << 18;  // entries

// A tensor of `size` entries; bit i % 8 of bits[i / 8] says whether entry i is active.
struct Layer {
  void* values;
  const uint8_t* bits;
  int64_t size;
  int64_t entry_size;  // bytes: 2, 4 or 8
};

// A vector of entries. All bits of `active` are set in the lanes of active entries.
template <class Word>
struct Vector {
  typedef Word Lanes __attribute__((vector_size(kLanes * sizeof(Word))));
  Lanes entries, active;

  Vector(const Word* values, const uint8_t* bits) {
    uint16_t packed = bits[0];
    if (kLanes == 16) packed = uint16_t(packed | bits[1] << 8);
    Lanes bit;
    for (int lane = 0; lane < kLanes; ++lane) bit[lane] = Word(1) << lane;
    active = Lanes((bit & (Lanes{} + Word(packed))) != 0);
    std::memcpy(&entries, values, sizeof entries);
    __builtin_prefetch(reinterpret_cast<const char*>(values) + kAhead);
  }
};

template <class Word>
void keep_lanes(Word* values, const uint8_t* bits) {
  const Vector<Word> vector(values, bits);
  const auto kept = vector.entries & vector.active;
  std::memcpy(values, &kept, sizeof kept);
}

template <class Word>
void keep_blocks(Word* values, const uint8_t* bits, int64_t begin, int64_t end) {
  const int64_t quarter = (end - begin) / kPlaces / kBlock * kBlock;
  for (int64_t i = begin; i < begin + quarter; i += kBlock)
    for (int place = 0; place < kPlaces; ++place)
      for (int64_t j = i + place * quarter; j < i + place * quarter + kBlock; j += kLanes)
        keep_lanes(values + j, bits + j / 8);
  int64_t i = begin + kPlaces * quarter;
  for (; i + kLanes <= end; i += kLanes) keep_lanes(values + i, bits + i / 8);
  for (; i < end; ++i)
    if (!(bits[i / 8] >> i % 8 & 1)) values[i] = 0;
}

void keep(const Layer& layer, int64_t begin, int64_t end) {
  void* const values = layer.values;
  if (layer.entry_size == 2) keep_blocks(static_cast<uint16_t*>(values), layer.bits, begin, end);
  if (layer.entry_size == 4) keep_blocks(static_cast<uint32_t*>(values), layer.bits, begin, end);
  if (layer.entry_size == 8) keep_blocks(static_cast<uint64_t*>(values), layer.bits, begin, end);
}

template <class Word>
int64_t count_entries(const Word* values, const uint8_t* bits, int64_t begin, int64_t end) {
  int64_t count = 0;
  for (int64_t i = begin; i < end; ++i)
    count += !(bits[i / 8] >> i % 8 & 1) && Word(values[i] << 1) != 0;  // -0 is 0
  return count;
}

// A block almost never has anything to count. Finding this out takes no longer than reading it.
template <class Word>
int64_t count_blocks(const void* memory, const uint8_t* bits, int64_t begin, int64_t end) {
  const Word* const values = static_cast<const Word*>(memory);
  int64_t count = 0, i = begin;
  for (; i + kBlock <= end; i += kBlock) {
    typename Vector<Word>::Lanes found = {};
    for (int64_t j = i; j < i + kBlock; j += kLanes) {
      const Vector<Word> vector(values + j, bits + j / 8);
      found |= (vector.entries + vector.entries) & ~vector.active;
    }
    Word any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= found[lane];
    if (any) count += count_entries(values, bits, i, i + kBlock);
  }
  return count + count_entries(values, bits, i, end);
}

int64_t count(const Layer& layer, int64_t begin, int64_t end) {
  if (layer.entry_size == 2) return count_blocks<uint16_t>(layer.values, layer.bits, begin, end);
  if (layer.entry_size == 4) return count_blocks<uint32_t>(layer.values, layer.bits, begin, end);
  return count_blocks<uint64_t>(layer.values, layer.bits, begin, end);
}

// Call work(layer, begin, end) for entries begin .. end - 1, numbered through all layers.
template <class Work>
void visit(const Layer* layers, int64_t num_layers, int64_t begin, int64_t end, const Work& work) {
  for (int64_t l = 0; l < num_layers; ++l) {
    const int64_t size = layers[l].size;
    // Cuts are between whole blocks of a layer, so that no two threads share a byte of bits.
    const auto cut = [size](int64_t at) {
      return at >= size ? size : std::max<int64_t>(at, 0) / kBlock * kBlock;
    };
    if (cut(begin) < cut(end)) work(l, cut(begin), cut(end));
    begin -= size;
    end -= size;
  }
}

// The same for all entries, which threads share.
template <class Work>
void visit_all(const Layer* layers, int64_t num_layers, int64_t num_threads, const Work& work) {
  int64_t total = 0;
  for (int64_t l = 0; l < num_layers; ++l) total += layers[l].size;
  num_threads = std::min(num_threads, total / kWorthAThread + 1);
  const auto share = [=, &work](int64_t t) {
    visit(layers, num_layers, total * t / num_threads, total * (t + 1) / num_threads, work);
  };
  std::vector<std::thread> threads;
  for (int64_t t = 1; t < num_threads; ++t) threads.emplace_back(share, t);
  share(0);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

extern "C" {

int64_t sparse_gates_layer_size() { return int64_t(sizeof(Layer)); }

// Zero the inactive entries.
void sparse_gates_keep(const Layer* layers, int64_t num_layers, int64_t num_threads) {
  visit_all(layers, num_layers, num_threads,
            [=](int64_t l, int64_t begin, int64_t end) { keep(layers[l], begin, end); });
}

// Add to counts[l] the number of inactive entries of layer l that are not zero.
void sparse_gates_count(const Layer* layers, int64_t num_layers, int64_t num_threads,
                        int64_t* counts) {
  visit_all(layers, num_layers, num_threads, [=](int64_t l, int64_t begin, int64_t end) {
    __atomic_fetch_add(&counts[l], count(layers[l], begin, end), __ATOMIC_RELAXED);
  });
}
}
