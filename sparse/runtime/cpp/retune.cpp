#include "retune.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <set>
#include <utility>

#include "conv.h"

namespace sparse_runtime {
namespace {

// The limits of tune.py and execution_plan.py.
constexpr int64_t kMinTile = 4, kMaxRows = 7, kMaxRow = 8;
constexpr double kBlockBytes[] = {16 * 1024, 32 * 1024, 64 * 1024};
constexpr double kMinConnections = 4, kDenseFrom = 0.2, kSharedFrom = 0.25;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Connection {
  int32_t offset;
  float weight;
};

// The connections of a convolution by output channel, in the order of memory.
class Connections {
 public:
  explicit Connections(const Op& op) : op_(op), by_channel_(size_t(op.channels)) {
    if (op.kind == kDenseConv) read_dense();
    else read_sparse();
    for (auto& connections : by_channel_) {
      std::stable_sort(connections.begin(), connections.end(),
                       [](Connection a, Connection b) { return a.offset < b.offset; });
      for (const Connection& c : connections) offsets_.push_back(c.offset);
      count_ += int64_t(connections.size());
    }
    std::sort(offsets_.begin(), offsets_.end());
    offsets_.erase(std::unique(offsets_.begin(), offsets_.end()), offsets_.end());
  }

  // Share of the taps that are active, of those that any channel uses.
  double density() const {
    return double(count_) / std::max<double>(1, double(op_.channels) * double(offsets_.size()));
  }
  double per_channel() const { return double(count_) / double(op_.channels); }
  // Rows of the input that one row of the output reads.
  int64_t height() const {
    return offsets_.empty() ? 1 : (int64_t(offsets_.back()) - offsets_.front()) / op_.in_row + 1;
  }

  // The tables of sparse_table in tables.py, with the parts of the plan.
  Way sparse(int64_t group, int64_t blocks) const {
    auto tables = std::make_shared<ConvTables>();
    for (int64_t part = 0; part < op_.num_parts; ++part) {
      tables->part_stream.push_back(int64_t(tables->connections.size()));
      add_part(op_.part_begin[part], op_.part_begin[part + 1], group, blocks, *tables);
    }
    Op op = without_tables();
    op.kind = op_.kind == kQuantConv ? kQuantConv : kSparseConv;
    op.group = group, op.num_blocks = blocks;
    op.row_channel = tables->row_channel.data();
    op.counts = tables->counts.data();
    op.part_stream = tables->part_stream.data();
    op.connections = tables->connections.data();
    return {op, std::move(tables)};
  }

  // All weights of the taps that any channel uses.
  Way dense() const {
    auto tables = std::make_shared<ConvTables>();
    tables->offsets = offsets_;
    const int64_t depth = int64_t(offsets_.size());
    tables->weights.resize(size_t(ceil_div(op_.channels, kDenseChannels) * depth * kDenseChannels));
    for (int64_t c = 0; c < op_.channels; ++c) {
      for (const Connection& connection : by_channel_[size_t(c)]) {
        const auto at = std::lower_bound(offsets_.begin(), offsets_.end(), connection.offset);
        const int64_t term = c / kDenseChannels * depth + (at - offsets_.begin());
        tables->weights[size_t(term * kDenseChannels + c % kDenseChannels)] += connection.weight;
      }
    }
    Op op = without_tables();
    op.kind = kDenseConv;
    op.tile_rows = 1;
    op.depth = depth;
    op.weights = tables->weights.data();
    op.offsets = tables->offsets.data();
    return {op, std::move(tables)};
  }

 private:
  struct Entry {
    int32_t offset;
    int pattern;
    std::array<float, 4> weights;  // by member of the group
  };

  void read_dense() {
    for (int64_t c = 0; c < op_.channels; ++c) {
      const float* weight = op_.weights + c / kDenseChannels * op_.depth * kDenseChannels;
      for (int64_t k = 0; k < op_.depth; ++k) {
        const float w = weight[k * kDenseChannels + c % kDenseChannels];
        if (w != 0) by_channel_[size_t(c)].push_back({op_.offsets[k], w});
      }
    }
  }

  void read_sparse() {
    const int group = int(op_.group), patterns = (1 << group) - 1;
    for (int64_t part = 0; part < op_.num_parts; ++part) {
      const int64_t first = op_.part_begin[part], end = op_.part_begin[part + 1];
      const int32_t* count = op_.counts + op_.num_blocks * patterns * (first / group);
      const float* p = op_.connections + op_.part_stream[part];
      for (int64_t block = 0; block < op_.num_blocks; ++block) {
        for (int64_t row = first; row < end; row += group, count += patterns) {
          for (int pattern = 1; pattern <= patterns; ++pattern) {
            for (int64_t n = 0; n < count[pattern - 1]; ++n) {
              const int32_t offset = offset_at(p++);
              for (int member = 0; member < group; ++member) {
                if (!(pattern >> member & 1)) continue;
                const float weight = *p++;
                if (row + member >= end) continue;  // a channel that is not there
                by_channel_[size_t(op_.row_channel[row + member])].push_back({offset, weight});
              }
            }
          }
        }
      }
    }
  }

  Op without_tables() const {
    Op op = op_;
    op.group = op.num_blocks = 1;
    op.depth = 0;
    op.row_channel = op.counts = op.offsets = nullptr;
    op.part_stream = nullptr;
    op.connections = op.weights = nullptr;
    return op;
  }

  // The channels of a part as sparse_table orders them.
  std::vector<int32_t> order_of(int64_t first, int64_t end) const {
    const int64_t together = op_.kind == kQuantConv ? kPacked : 1;
    std::vector<int64_t> work(size_t(ceil_div(op_.channels, together)), 0);
    for (int64_t c = first; c < end; ++c) {
      work[size_t(c / together)] += int64_t(by_channel_[size_t(c)].size());
    }
    std::vector<int32_t> order;
    for (int64_t c = first; c < end; ++c) order.push_back(int32_t(c));
    const int64_t whole = op_.channels / together;  // planes that lack no channel
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      const int64_t plane_a = a / together, plane_b = b / together;
      if ((plane_a < whole) != (plane_b < whole)) return plane_a < whole;
      return work[size_t(plane_a)] > work[size_t(plane_b)];
    });
    return order;
  }

  void add_part(int64_t first, int64_t end, int64_t group, int64_t blocks, ConvTables& to) const {
    const std::vector<int32_t> order = order_of(first, end);
    to.row_channel.insert(to.row_channel.end(), order.begin(), order.end());
    const int64_t patterns = (int64_t(1) << group) - 1;
    std::vector<std::vector<Entry>> lists;  // by group and pattern
    for (size_t i = 0; i < order.size(); i += size_t(group)) {
      lists.resize(lists.size() + size_t(patterns));
      const auto* members = order.data() + i;
      const size_t count = std::min(order.size() - i, size_t(group));
      for (const Entry& entry : merge(members, count)) {
        lists[lists.size() - size_t(patterns) + size_t(entry.pattern - 1)].push_back(entry);
      }
    }
    std::vector<size_t> done(lists.size(), 0);
    for (int64_t block = 0; block < blocks; ++block) {
      for (size_t i = 0; i < lists.size(); ++i) {
        const size_t begin = done[i], size = lists[i].size();
        while (done[i] < size &&
               int64_t((done[i] + 1) * size_t(blocks) - 1) / int64_t(size) == block) {
          add(lists[i][done[i]++], to.connections);
        }
        to.counts.push_back(int32_t(done[i] - begin));
      }
    }
  }

  static void add(const Entry& entry, std::vector<float>& stream) {
    stream.push_back(0);
    std::memcpy(&stream.back(), &entry.offset, sizeof entry.offset);
    for (int member = 0; member < 4; ++member) {
      if (entry.pattern >> member & 1) stream.push_back(entry.weights[size_t(member)]);
    }
  }

  // One entry for the connections of a group from the same tap.
  std::vector<Entry> merge(const int32_t* members, size_t count) const {
    std::vector<std::pair<Connection, int>> all;
    for (size_t member = 0; member < count; ++member) {
      for (const Connection& c : by_channel_[size_t(members[member])]) {
        all.emplace_back(c, int(member));
      }
    }
    std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
      return a.first.offset < b.first.offset;
    });
    std::vector<Entry> entries;
    for (const auto& [connection, member] : all) {
      if (entries.empty() || entries.back().offset != connection.offset ||
          entries.back().pattern >> member & 1) {
        entries.push_back({connection.offset, 0, {}});
      }
      entries.back().pattern |= 1 << member;
      entries.back().weights[size_t(member)] = connection.weight;
    }
    return entries;
  }

  const Op& op_;
  std::vector<std::vector<Connection>> by_channel_;
  std::vector<int32_t> offsets_;
  int64_t count_ = 0;
};

// Tiles of at most `most` vectors, as in tiles of execution_plan.py: parts of a row of nearly equal
// size, and any number of rows that fits. As pairs of vectors and rows.
std::set<std::pair<int64_t, int64_t>> tiles(const Op& op, int64_t most) {
  const int64_t most_rows = std::min(op.rows, op.stride_x <= 2 ? kMaxRows : 1);
  const int64_t least = ceil_div(op.vectors, std::min(most, kMaxRow));
  std::set<std::pair<int64_t, int64_t>> found;
  int64_t largest = 0;
  for (int64_t count : {least, least + 1}) {
    const int64_t vectors = ceil_div(op.vectors, count);
    for (int64_t rows = 1; rows <= std::min(most / vectors, most_rows); ++rows) {
      const int64_t even = ceil_div(op.rows, ceil_div(op.rows, rows));
      found.emplace(vectors, even);
      largest = std::max(largest, vectors * even);
    }
  }
  for (auto tile = found.begin(); tile != found.end();) {
    const bool is_small = tile->first * tile->second < std::min(largest, kMinTile);
    tile = is_small ? found.erase(tile) : std::next(tile);
  }
  return found;
}

// Numbers of blocks whose part of a tile's input about fits the first-level cache.
std::set<int64_t> block_counts(const Op& op, const Connections& connections, int64_t group,
                               std::pair<int64_t, int64_t> tile) {
  const auto height = double(connections.height());
  const double rows = double((tile.second - 1) * op.stride_y) + height;
  const double vectors = double(tile.first * op.stride_x) + height - 1;
  const double bytes = 4.0 * rows * vectors * kLanes * double(op.in_channels);
  const double most = double(group) * connections.per_channel() / kMinConnections;
  std::set<int64_t> found{1};
  for (const double block : kBlockBytes) {
    const double count = std::ceil(bytes / block);
    if (count <= most) found.insert(int64_t(count));
  }
  return found;
}

}  // namespace

std::vector<Way> ways(const Op& op) {
  std::vector<Way> found{{op, nullptr}};
  const bool is_single = op.kind == kDenseConv && op.tile_rows == 1;
  const bool is_sparse = op.kind == kSparseConv || op.kind == kQuantConv;
  if ((!is_sparse && !is_single) || op.in_row < 1) return found;
  const Connections connections(op);
  for (int64_t group : {1, 2, 4}) {
    if (group > 1 && (op.stride_x > 1 || connections.density() * double(group) < kSharedFrom)) {
      continue;
    }
    std::set<std::pair<int64_t, std::pair<int64_t, int64_t>>> choices;  // blocks and tile
    for (const auto& tile : tiles(op, max_tile(int(group)))) {
      for (int64_t blocks : block_counts(op, connections, group, tile)) {
        choices.insert({blocks, tile});
      }
    }
    Way way{};
    for (const auto& [blocks, tile] : choices) {
      if (!way.tables || way.op.num_blocks != blocks) way = connections.sparse(group, blocks);
      found.push_back(way);
      found.back().op.tile_vectors = tile.first;
      found.back().op.tile_rows = tile.second;
    }
  }
  if (op.kind != kQuantConv && connections.density() >= kDenseFrom) found.push_back(connections.dense());
  return found;
}

}  // namespace sparse_runtime
