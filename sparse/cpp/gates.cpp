// Zero what masks leave inactive, in one pass over many tensors.
//
// The pass reads and writes every gradient once and does nothing else, so memory sets its time. Bits
// add 1/32 to the traffic, and four places of a tensor are worked on in turn, because a processor
// fetches ahead in each place separately: together a quarter faster than one place after the other.

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

template <class Word>
void keep_lanes(Word* values, const uint8_t* bits) {
  typedef Word Lanes __attribute__((vector_size(kLanes * sizeof(Word))));
  uint16_t active = bits[0];
  if (kLanes == 16) active = uint16_t(active | bits[1] << 8);
  Lanes bit;
  for (int lane = 0; lane < kLanes; ++lane) bit[lane] = Word(1) << lane;
  Lanes entries;
  std::memcpy(&entries, values, sizeof entries);
  entries &= Lanes((bit & (Lanes{} + Word(active))) != 0);
  std::memcpy(values, &entries, sizeof entries);
}

template <class Word>
void keep_blocks(Word* values, const uint8_t* bits, int64_t begin, int64_t end) {
  const int64_t quarter = (end - begin) / kPlaces / kBlock * kBlock;
  for (int64_t i = begin; i < begin + quarter; i += kBlock)
    for (int place = 0; place < kPlaces; ++place)
      for (int64_t j = i + place * quarter; j < i + place * quarter + kBlock; j += kLanes) {
        __builtin_prefetch(reinterpret_cast<const char*>(values + j) + kAhead);
        keep_lanes(values + j, bits + j / 8);
      }
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

// Entries begin .. end of all layers, counted through them.
void keep_range(const Layer* layers, int64_t num_layers, int64_t begin, int64_t end) {
  for (int64_t l = 0; l < num_layers; ++l) {
    const int64_t size = layers[l].size;
    // Cuts fall on whole blocks of a layer, so that no two threads share a byte of bits.
    const auto cut = [size](int64_t at) {
      return at >= size ? size : std::max<int64_t>(at, 0) / kBlock * kBlock;
    };
    if (cut(begin) < cut(end)) keep(layers[l], cut(begin), cut(end));
    begin -= size;
    end -= size;
  }
}

}  // namespace

extern "C" {

int64_t sparse_gates_layer_size() { return int64_t(sizeof(Layer)); }

void sparse_gates_keep(const Layer* layers, int64_t num_layers, int64_t num_threads) {
  int64_t total = 0;
  for (int64_t l = 0; l < num_layers; ++l) total += layers[l].size;
  num_threads = std::min(num_threads, total / kWorthAThread + 1);
  const auto share = [=](int64_t t) {
    keep_range(layers, num_layers, total * t / num_threads, total * (t + 1) / num_threads);
  };
  std::vector<std::thread> threads;
  for (int64_t t = 1; t < num_threads; ++t) threads.emplace_back(share, t);
  share(0);
  for (std::thread& thread : threads) thread.join();
}
}
