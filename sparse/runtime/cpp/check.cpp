#include "check.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "attention.h"
#include "conv.h"
#include "simd.h"

namespace sparse_runtime {
namespace {

using Wide = __int128;  // products of three members do not overflow

constexpr int64_t kMost = int64_t(1) << 31;  // of a member that is no position

static_assert(offsetof(Op, eps) == offsetof(Op, num_tokens) + sizeof(int64_t) &&
                  offsetof(Op, mask) == offsetof(Op, score_scale) + sizeof(double),
              "whole numbers come first, then the others, then the pointers");

void require(bool fits, const char* what) {
  if (!fits) throw Damage(what);
}

// The distances of the first and of the last float from the start of a value.
struct Span {
  Wide first = 0, last = 0;

  // Repeat at `count` steps.
  Span repeat(int64_t count, Wide step) const {
    const Wide far = (count - 1) * step;
    return {first + std::min<Wide>(far, 0), last + std::max<Wide>(far, 0)};
  }
  Span move(Wide by) const { return {first + by, last + by}; }
};

constexpr Span kVector{0, kLanes - 1};
constexpr Span kFloat{0, 0};
constexpr Span kNothing{kMost, -kMost};  // until an offset is known: 0 need not be one of them

class Checker {
 public:
  Checker(const Op& op, const Limits& limits) : op_(op), limits_(limits) {}

  void check() const {
    check_members();
    switch (op_.kind) {
      case kInput: return image(op_.channels);
      case kSparseConv: return sparse_conv();
      case kDenseConv: return dense_conv();
      case kMaxPool: return max_pool();
      case kMeanPool: return mean_pool();
      case kSparseLinear: return sparse_linear();
      case kDenseLinear: return dense_linear();
      case kRepack: return repack();
      case kOutput: return output();
      case kScale: return scale();
      case kLayerNorm: return layer_norm();
      case kVectorNorm: return vector_norm();
      case kTokens: return tokens();
      case kToken: return token();
      case kAttention: return attention();
      case kQuantInput: return quant_input();
      case kQuantConv: return sparse_conv();
      case kQuantMaxPool: return max_pool();
      case kQuantMeanPool: return quant_mean_pool();
      case kQuantLinear: return quant_linear();
      case kQuantLookup: return quant_lookup();
      case kQuantize: return quantize();
      case kQuantizeVector: return quantize_vector();
      default: throw Damage("kind " + std::to_string(op_.kind) + " is unknown");
    }
  }

 private:
  // All members that are numbers. Positions are checked where they are used.
  void check_members() const {
    const int64_t* end = &op_.num_tokens;
    for (const int64_t* member = &op_.kind; member <= end; ++member) {
      const bool is_position = member == &op_.in || member == &op_.out || member == &op_.res;
      const int64_t most = is_position ? limits_.arena : kMost;
      require(*member >= -kMost && *member <= most, "a member is out of range");
    }
    require(op_.in >= 0 && op_.out >= -1 && op_.res >= -1, "a position is negative");
    for (int64_t size : {op_.in_row, op_.in_plane, op_.out_row, op_.out_plane, op_.res_row,
                         op_.res_plane, op_.halo, op_.pad_y, op_.pad_x, op_.pad_top, op_.pad_bottom,
                         op_.mask_row, op_.depth, op_.fill_top, op_.fill_bottom}) {
      require(size >= 0, "a size is negative");
    }
    constexpr double largest = std::numeric_limits<float>::max();
    require(op_.eps >= 0 && op_.eps <= largest, "eps is out of range");
    require(std::abs(op_.score_scale) <= largest, "score_scale is out of range");
    require(op_.fill >= 0 && op_.fill <= 255, "there is no such zero point");
    require(op_.activation >= kNone && op_.activation <= kTanh, "there is no such activation");
    // Threads share parts. They would else compute the same.
    const bool has_parts = op_.kind == kSparseConv || op_.kind == kDenseConv ||
                           op_.kind == kQuantConv || op_.kind == kLayerNorm ||
                           op_.kind == kQuantize;
    require(op_.num_parts >= 1 && (has_parts || op_.num_parts == 1), "it has other parts");
  }

  void in_arena(int64_t position, Span span) const {
    require(position + span.first >= 0 && position + span.last < limits_.arena,
            "a value lies outside the arena");
  }

  // Vectors are loaded from multiples of their size.
  static void aligned(std::initializer_list<int64_t> sizes) {
    for (int64_t size : sizes) require(size % kLanes == 0, "vectors are not aligned");
  }

  // A table must be there and have so many entries.
  template <typename T>
  void table(const T* start, Wide count) const {
    require(start != nullptr, "a table is missing");
    const auto found = limits_.table_bytes.find(start);
    require(found != limits_.table_bytes.end() && count * Wide(sizeof(T)) <= found->second,
            "a table is too short");
  }

  // The number of entries of a table, which must be there.
  template <typename T>
  int64_t entries(const T* start) const {
    table(start, 0);
    return limits_.table_bytes.at(start) / int64_t(sizeof(T));
  }

  // Planes of the output.
  int64_t planes() const {
    const int64_t channels = channels_in_plane(op_);
    return (op_.channels + channels - 1) / channels;
  }

  // How integers are turned into others.
  void rescale(Wide num_scales) const {
    table(op_.scales, num_scales);
    table(op_.rescale, 1);
    const Rescale& r = *op_.rescale;
    require(r.zero >= 0 && r.zero <= 255 && r.sum_high >= 0 && r.sum_high <= 255 &&
                r.high >= -r.zero && r.high <= 255 - r.zero && r.divisor > 0,
            "integers are out of range");
  }

  // How sums of products become bytes, or float32 without a rescale.
  void sums() const {
    if (op_.rescale) return rescale(op_.channels);
    table(op_.scales, op_.channels);
  }

  // A map that is written, with its borders.
  void writes_map() const {
    require(op_.rows >= 1 && op_.vectors >= 1 && op_.channels >= 1, "the output is empty");
    require(op_.out >= 0, "the output is no map");
    aligned({op_.out, op_.out_row, op_.out_plane});
    const Wide plane = (op_.vectors + 2 * op_.halo) * kLanes;
    // This limits the time, too: an operation computes no float twice.
    require(op_.out_plane >= plane && op_.out_row >= Wide(planes()) * op_.out_plane,
            "the planes or rows of the output overlap");
    const Span row = Span{0, plane - 1}.move(-Wide(op_.halo) * kLanes).repeat(planes(),
                                                                            op_.out_plane);
    const int64_t top = std::max(op_.pad_top, op_.fill_top);
    const int64_t bottom = std::max(op_.pad_bottom, op_.fill_bottom);
    in_arena(op_.out, row.repeat(top + op_.rows + bottom, op_.out_row)
                          .move(-Wide(top) * op_.out_row));
    if (op_.halo > 0 || op_.pad_top > 0 || op_.pad_bottom > 0) {
      if (op_.moves) table(op_.moves, 4 * kLanes);
    }
    if (op_.mask) {
      aligned({op_.mask_row});
      table(op_.mask, Wide(op_.rows - 1) * op_.mask_row + op_.vectors * kLanes);
    }
  }

  // Floats that are written one after the other, to the arena or to the output of the network.
  void writes_floats(Wide count) const {
    if (op_.out >= 0) return in_arena(op_.out, {0, count - 1});
    require(count == limits_.output, "the size of the output differs");
  }

  void image(int64_t channels) const {
    writes_map();
    require(op_.height >= 1 && op_.width >= 1 && channels >= 1, "the image is empty");
    require(Wide(channels) * op_.height * op_.width == limits_.image,
            "the size of the image differs");
    require(Wide(op_.rows) * op_.width < kMost, "there are too many rows");
    table(op_.offsets, Wide(op_.vectors) * kLanes);
  }

  // The vectors that a convolution reads for `rows` rows, from those at the offsets on.
  void reads_taps(const Span& offsets, int64_t rows) const {
    if (offsets.first > offsets.last) return;  // there are no connections
    in_arena(op_.in, Span{offsets.first, offsets.last + kLanes - 1}
                         .repeat(op_.vectors, Wide(op_.stride_x) * kLanes)
                         .repeat(rows, Wide(op_.stride_y) * op_.in_row));
  }

  static void widen(Span& span, int32_t offset) {
    aligned({offset});
    span = {std::min<Wide>(span.first, offset), std::max<Wide>(span.last, offset)};
  }

  void conv() const {
    writes_map();
    require(op_.stride_y >= 1 && op_.stride_x >= 1, "a stride is not positive");
    require(op_.tile_rows >= 1, "there are no tiles");
    aligned({op_.in, op_.in_row, op_.in_plane});
    if (op_.kind == kQuantConv) sums();
    table(op_.bias, Wide(op_.channels) * (op_.kind == kQuantConv ? 2 : 1));
    if (op_.res >= 0) {
      aligned({op_.res, op_.res_row, op_.res_plane});
      in_arena(op_.res, Span{0, Wide(op_.vectors) * kLanes - 1}
                            .repeat(planes(), op_.res_plane)
                            .repeat(op_.rows, op_.res_row));
    }
    table(op_.part_begin, Wide(op_.num_parts) + 1);
    const int64_t* begin = op_.part_begin;
    require(begin[0] == 0 && begin[op_.num_parts] == op_.channels, "parts lack channels");
    for (int64_t part = 0; part < op_.num_parts; ++part) {
      require(begin[part] % 4 == 0 && begin[part] <= begin[part + 1], "a part begins elsewhere");
    }
    // Tuning reads the input as a whole.
    require(op_.height >= 1 && op_.in_channels >= 1, "the input is empty");
    in_arena(op_.in, kFloat.repeat(op_.in_channels, op_.in_plane).repeat(op_.height, op_.in_row));
  }

  void sparse_conv() const {
    conv();
    require(op_.group == 1 || op_.group == 2 || op_.group == 4, "there is no such group");
    require(op_.num_blocks >= 1, "there are no blocks");
    for (int64_t rows = 1; rows <= std::min(op_.tile_rows, op_.rows); ++rows) {
      for (int64_t vectors = 1; vectors <= std::min(op_.tile_vectors, op_.vectors); ++vectors) {
        require(find_tile(op_.kind, op_.group, vectors, rows, op_.stride_x), "there is no such tile");
      }
    }
    require(op_.tile_vectors >= 1, "there is no such tile");
    table(op_.row_channel, op_.channels);
    for (int64_t i = 0; i < op_.channels; ++i) {
      require(op_.row_channel[i] >= 0 && op_.row_channel[i] < op_.channels, "there is no channel");
      if (op_.kind == kQuantConv) check_quad(i);
    }
    const int64_t patterns = (int64_t(1) << op_.group) - 1;
    table(op_.counts, Wide(op_.num_blocks) * patterns * groups(0, op_.channels));
    table(op_.part_stream, op_.num_parts);
    Span offsets = kNothing;
    for (int64_t part = 0; part < op_.num_parts; ++part) stream(part, patterns, offsets);
    reads_taps(offsets, op_.rows);
  }

  // The channels of a plane follow each other.
  void check_quad(int64_t i) const {
    const int64_t channel = op_.row_channel[i];
    require(channel % kPacked == i % kPacked &&
                (i % kPacked == 0 || channel == op_.row_channel[i - 1] + 1),
            "channels of a plane are apart");
  }

  int64_t groups(int64_t first, int64_t end) const {
    return (end - first + op_.group - 1) / op_.group;
  }

  // Walk through the connections of a part, as the kernels do.
  void stream(int64_t part, int64_t patterns, Span& offsets) const {
    const int64_t words = entries(op_.connections);
    const int64_t first = op_.part_begin[part], end = op_.part_begin[part + 1];
    const int32_t* count = op_.counts + op_.num_blocks * patterns * (first / op_.group);
    int64_t at = op_.part_stream[part];
    require(at >= 0 && at <= words, "connections begin elsewhere");
    for (int64_t i = 0; i < op_.num_blocks * groups(first, end); ++i, count += patterns) {
      for (int64_t k = 0; k < patterns; ++k) {
        const int64_t size = 1 + num_bits(int(k + 1));
        require(count[k] >= 0 && count[k] * size <= words - at, "there are not enough connections");
        for (int64_t n = 0; n < count[k]; ++n, at += size) {
          widen(offsets, offset_at(op_.connections + at));
        }
      }
    }
  }

  void dense_conv() const {
    conv();
    require(op_.tile_rows <= 2 && op_.tile_rows <= op_.rows, "there is no such tile");
    table(op_.weights, Wide(op_.channels + kDenseChannels - 1) / kDenseChannels * op_.depth *
                           kDenseChannels);
    const bool in_pairs = op_.tile_rows == 2;
    table(op_.offsets, Wide(op_.depth) * (in_pairs ? 3 : 1));
    Span offsets = kNothing;
    for (int64_t k = 0; k < op_.depth; ++k) {
      widen(offsets, op_.offsets[in_pairs ? 3 * k : k]);
      if (in_pairs) widen(offsets, op_.offsets[3 * k + 1]);
    }
    reads_taps(offsets, op_.rows - (in_pairs ? 1 : 0));
    if (!in_pairs) return;
    table(op_.counts, 4);
    int64_t terms = 0;
    for (int product = 0; product < 4; ++product) {
      require(op_.counts[product] >= 0, "a product has no number of terms");
      terms += op_.counts[product];
    }
    require(terms == op_.depth, "the products have other terms");
  }

  void max_pool() const {
    writes_map();
    require(op_.stride_y >= 1 && op_.stride_x >= 1, "a stride is not positive");
    require(op_.window_y >= 1 && op_.window_x >= 1, "the window is empty");
    aligned({op_.in, op_.in_row, op_.in_plane});
    const Wide columns = Wide(op_.vectors - 1) * op_.stride_x + op_.window_x;
    const Wide rows = Wide(op_.rows - 1) * op_.stride_y + op_.window_y;
    require(op_.width >= columns && columns < kMost && rows < kMost, "columns are missing");
    table(op_.offsets, (op_.width + rows) * kLanes);
    in_arena(op_.in, kVector.repeat(int64_t(columns), kLanes)
                         .repeat(int64_t(rows), op_.in_row)
                         .repeat(op_.channels, op_.in_plane)
                         .move(-Wide(op_.pad_y) * op_.in_row - Wide(op_.pad_x) * kLanes));
  }

  // A map that is read: `rows` rows, and vectors from the first one on.
  void reads_map(int64_t rows) const {
    require(rows >= 1 && op_.vectors >= 1 && op_.channels >= 1, "the input is empty");
    aligned({op_.in, op_.in_row, op_.in_plane});
    // This limits the time, too.
    require(op_.in_plane >= op_.vectors * kLanes &&
                op_.in_row >= Wide(op_.channels) * op_.in_plane,
            "the planes or rows of the input overlap");
    in_arena(op_.in, kVector.repeat(op_.vectors, kLanes)
                         .repeat(rows, op_.in_row)
                         .repeat(op_.channels, op_.in_plane));
  }

  void mean_pool() const {
    reads_map(op_.height);
    writes_floats(op_.channels);
  }

  void linear() const {
    require(op_.channels >= 1, "the output is empty");
    table(op_.bias, op_.channels);
    writes_floats(op_.channels);
  }

  void sparse_linear() const {
    linear();
    table(op_.row_begin, Wide(op_.channels) + 1);
    const int32_t* begin = op_.row_begin;
    require(begin[0] >= 0, "connections begin elsewhere");
    for (int64_t c = 0; c < op_.channels; ++c) {
      require(begin[c] <= begin[c + 1], "connections begin elsewhere");
    }
    table(op_.connections, 2 * Wide(begin[op_.channels]));
    for (int64_t i = begin[0]; i < begin[op_.channels]; ++i) {
      in_arena(op_.in, kFloat.move(offset_at(op_.connections + 2 * i)));
    }
  }

  void dense_linear() const {
    linear();
    aligned({op_.in, op_.depth});
    in_arena(op_.in, {0, Wide(op_.depth) - 1});
    table(op_.weights, Wide(op_.channels) * op_.depth);
  }

  // Floats of a vector that one operation has computed for another.
  void reads_floats() const {
    require(op_.channels >= 1, "the input is empty");
    in_arena(op_.in, {0, Wide(op_.channels) - 1});
  }

  // From the first to the last float that the offsets of a table reach; negative ones reach none.
  Span reached(Wide count) const {
    table(op_.offsets, count);
    const int32_t most = *std::max_element(op_.offsets, op_.offsets + int64_t(count));
    return {0, std::max<Wide>(most, 0)};
  }

  // The same for whole vectors, which lie anywhere.
  Span reached_vectors(Wide count) const {
    table(op_.offsets, count);
    aligned({op_.in, op_.in_plane});
    Span places;
    for (int64_t i = 0; i < int64_t(count); i += kLanes) widen(places, op_.offsets[i]);
    return {places.first, places.last + kLanes - 1};
  }

  void repack() const {
    writes_map();
    const Wide size = Wide(op_.rows) * op_.vectors * kLanes;
    const Span places = op_.depth ? reached_vectors(size) : reached(size);
    int64_t channels = op_.channels;
    if (op_.row_channel) {
      table(op_.row_channel, channels);
      const auto [least, most] =
          std::minmax_element(op_.row_channel, op_.row_channel + op_.channels);
      require(*least >= 0, "there is no channel");
      channels = int64_t(*most) + 1;
    }
    in_arena(op_.in, places.repeat(channels, op_.in_plane));
  }

  void tokens() const {
    writes_map();
    const Wide size = Wide(op_.rows) * op_.vectors * kLanes;
    table(op_.weights, size * op_.channels);
    in_arena(op_.in, reached(size).repeat(op_.channels, op_.in_plane));
  }

  void token() const {
    require(op_.channels >= 1, "the output is empty");
    in_arena(op_.in, kFloat.repeat(op_.channels, op_.in_plane));
    writes_floats(op_.channels);
  }

  void scale() const {
    writes_map();
    reads_map(op_.rows);
    require(op_.res >= 0, "there are no factors");
    in_arena(op_.res, {0, Wide(op_.channels) - 1});
  }

  void norm() const {
    table(op_.weights, op_.channels);
    table(op_.bias, op_.channels);
  }

  void layer_norm() const {
    writes_map();
    reads_map(op_.rows);
    norm();
    // A part is some vectors of a row, and borders are copied from the whole row.
    const bool has_borders = op_.halo > 0 || op_.pad_top > 0 || op_.pad_bottom > 0;
    require(op_.num_parts == 1 || !has_borders, "parts of rows have borders");
  }

  void vector_norm() const {
    reads_floats();
    norm();
    writes_floats(op_.channels);
  }

  void attention() const {
    writes_map();
    reads_map(op_.rows);  // the queries
    require(op_.heads >= 1 && op_.depth >= 1 && Wide(op_.heads) * op_.depth == op_.channels,
            "the heads have other channels");
    // This limits the time, and the memory of keys and values: it is less than that of the map.
    require(op_.num_windows >= 1 && op_.num_tokens >= 1 &&
                Wide(op_.num_windows) * op_.num_tokens <= Wide(op_.rows) * op_.vectors * kLanes,
            "the map has no such number of tokens");
    const int64_t size = window_vectors(op_) * kLanes, half = op_.num_windows * size;
    table(op_.offsets, 2 * Wide(half));
    const Span read{0, furthest(op_.offsets, size)};
    in_arena(op_.in, read.repeat(3 * op_.channels, op_.in_plane));
    const Span reached{0, furthest(op_.offsets + half, size)};
    in_arena(op_.out, reached.repeat(op_.channels, op_.out_plane));
    std::vector<int32_t> written(op_.offsets + half, op_.offsets + 2 * half);
    std::sort(written.begin(), written.end());
    const auto first = std::lower_bound(written.begin(), written.end(), 0);
    require(std::adjacent_find(first, written.end()) == written.end(), "two tokens are one");
    if (op_.weights) table(op_.weights, op_.heads);
    if (!op_.bias) return;
    table(op_.counts, op_.num_windows);
    const auto [least, most] = std::minmax_element(op_.counts, op_.counts + op_.num_windows);
    require(*least >= 0, "there is no such bias");
    table(op_.bias, (Wide(*most) + 1) * op_.heads * op_.num_tokens * size);
  }

  // The furthest of the places of all windows, each of which has so many.
  Wide furthest(const int32_t* places, int64_t size) const {
    int32_t most = 0;
    for (int64_t i = 0; i < op_.num_windows * size; ++i) {
      require((places[i] >= 0) == (i % size < op_.num_tokens), "a token lies elsewhere");
      most = std::max(most, places[i]);
    }
    return most;
  }

  void quant_input() const {
    image(op_.in_channels);
    rescale(1);
  }

  void quant_mean_pool() const {
    reads_map(op_.height);
    rescale(2);
    table(op_.bias, 1);
    writes_floats(op_.channels);
  }

  void quant_linear() const {
    require(op_.channels >= 1, "the output is empty");
    aligned({op_.in, op_.depth});
    in_arena(op_.in, {0, Wide(op_.depth) - 1});
    table(op_.weights, Wide(op_.channels) * op_.depth);
    table(op_.bias, 2 * Wide(op_.channels));
    sums();
    writes_floats(op_.rescale ? (Wide(op_.channels) + kPacked - 1) / kPacked : op_.channels);
  }

  // Planes of 4 channels each; the last one may have less.
  void packs() const {
    rescale(1);
    require(op_.channels >= 1 && op_.in_channels > (op_.channels - 1) * kPacked &&
                op_.in_channels <= op_.channels * kPacked,
            "the planes have other channels");
  }

  void quantize() const {
    writes_map();
    packs();
    require(op_.num_parts == op_.channels, "a part is no plane");
    aligned({op_.in, op_.in_row, op_.in_plane});
    in_arena(op_.in, Span{0, Wide(op_.vectors) * kLanes - 1}
                         .repeat(op_.rows, op_.in_row)
                         .repeat(op_.in_channels, op_.in_plane));
  }

  void quantize_vector() const {
    packs();
    require(op_.out >= 0, "the output is no vector of bytes");
    in_arena(op_.in, {0, Wide(op_.in_channels) - 1});
    in_arena(op_.out, {0, Wide(op_.channels) - 1});
  }

  void quant_lookup() const {
    writes_map();
    reads_map(op_.rows);
    table(op_.weights, 256 / kPacked);
  }

  void output() const {
    reads_map(op_.rows);
    require(op_.height >= 1 && op_.width >= 1, "the output is empty");
    writes_floats(Wide(op_.channels) * op_.height * op_.width);
    const Wide size = Wide(op_.rows) * op_.vectors * kLanes;
    table(op_.offsets, size);
    for (int64_t i = 0; i < int64_t(size); ++i) {
      require(op_.offsets[i] < Wide(op_.height) * op_.width, "a pixel lies outside the output");
    }
  }

  const Op& op_;
  const Limits& limits_;
};

}  // namespace

void check_op(const Op& op, const Limits& limits) { Checker(op, limits).check(); }

}  // namespace sparse_runtime
