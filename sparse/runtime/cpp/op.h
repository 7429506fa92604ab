// The operations of an execution plan. They work on activations in an arena of floats.
//
// Layout of an activation: rows of channels of vectors. A row of the image takes n vectors, and
// lane l of vector i holds column l * n + i. The neighbor of a column is thus in the same lane of
// the next vector, and every load of a convolution is aligned. Vectors -halo .. -1 and n .. n +
// halo - 1 repeat the columns that lie in a neighboring lane. Lanes at columns outside the image
// are zero, and so are the rows above and below the image.
//
// A map in int8 has 4 channels per plane, as unsigned bytes of what is a float elsewhere: channel c
// is byte c % 4 of plane c / 4. A byte b stands for scale * (b - zero point). Lanes and rows outside
// the image are the zero point. Four int8 weights take the place of a float weight in the same way.
//
// The lanes of an image can also hold several bands of rows: see Grid in layout.py. The rows above
// and below then repeat rows of the neighboring bands.
#pragma once

#include <cstdint>

namespace sparse_runtime {

enum Kind : int64_t {
  kInput = 0,
  kSparseConv = 1,
  kDenseConv = 2,
  kMaxPool = 3,
  kMeanPool = 4,
  kSparseLinear = 5,
  kDenseLinear = 6,
  kRepack = 7,
  kOutput = 8,
  kScale = 9,
  kLayerNorm = 10,
  kVectorNorm = 11,
  kTokens = 12,
  kToken = 13,
  kAttention = 14,
  // Of networks in int8.
  kQuantInput = 15,
  kQuantConv = 16,
  kQuantMaxPool = 17,
  kQuantMeanPool = 18,
  kQuantLinear = 19,
  kQuantLookup = 20,
  // Of float32, where an operation in int8 reads it.
  kQuantize = 21,
  kQuantizeVector = 22,
};

// In the order of ACTIVATIONS of graph.py.
enum Activation : int64_t {
  kNone = 0,
  kRelu = 1,
  kRelu6 = 2,
  kSilu = 3,
  kHardswish = 4,
  kHardsigmoid = 5,
  kSigmoid = 6,
  kGelu = 7,
  kGeluTanh = 8,
  kTanh = 9,
};

constexpr int64_t kPacked = 4;  // channels per plane of an int8 map

// How the integers of an int8 operation are turned into those of its output. A sum of products s of
// channel c is first clamp(round(s * scales[c] / divisor), -zero, high) + zero. What is added then
// gives clamp(round(fma(last, last_scale, fma(first, first_scale, shift))), 0, sum_high).
struct Rescale {
  float zero, high;
  float divisor;                // of a convolution without a sum: its scale if `scales` give float32,
                                // else 1
  float own_last;               // 1 if the convolution's value is the last operand, else 0
  float own_scale, res_scale;   // of the convolution and of what is added
  float shift, sum_high;
};

// The version of plan files. Raise it when the meaning of a member or of a table changes: older plans
// are then refused. (A change of the size of Op is noticed without it.)
constexpr int64_t kPlanVersion = 4;

// Positions are in floats from the start of the arena. Every member is 8 bytes wide. The pointers
// come last, from `mask` on: plan files have the numbers of tables in their place (plan.cpp).
struct Op {
  int64_t kind;
  int64_t in, out, res;             // res: activation to add, or -1; scale: the vector of factors;
                                    // out: -1 for the logits
  int64_t in_row, in_plane;         // distance between rows, between channels of a row
  int64_t out_row, out_plane;
  int64_t res_row, res_plane;
  int64_t rows, vectors, channels;  // of the output
  int64_t halo;                     // of the output, vectors on each side
  int64_t stride_y, stride_x;       // input rows per output row, input vectors per output vector
  int64_t activation;               // an Activation, of convolutions and linear layers whose value
                                    // is float32
  int64_t tile_rows, tile_vectors;  // of a convolution; dense: 1 row, or 2 by F(2, 3)
  int64_t group;                    // output channels computed together: 1, 2 or 4
  int64_t num_parts, num_blocks;    // ranges of output channels, blocks of connections; quantize: a
                                    // part is a plane
  int64_t depth;                    // terms per output: dense convolution, linear, mean; repack: 1
                                    // if whole vectors are copied; attention: channels of a head
  int64_t width, height, in_channels;  // of the input; max-pool: columns from -pad_x to the last read
  int64_t window_y, window_x, pad_y, pad_x;  // of a max-pool
  int64_t pad_top, pad_bottom;      // rows of the output that repeat others: with bands only
  int64_t mask_row;                 // distance between rows of the mask, 0 if one row serves all
  int64_t fill;                     // int8: zero point of the output, which borders have
  int64_t fill_top, fill_bottom;    // int8, without bands: rows of the output outside the image
  int64_t heads, num_windows, num_tokens;  // of an attention; the tokens are those of a window
  double eps, score_scale;          // of a layer norm; of an attention
  const int32_t* mask;              // [vectors][lanes] valid output columns, null if all are valid
  const int32_t* moves;             // [4][lanes] Grid.moves of the output, null with one band
  const int32_t* row_begin;         // sparse linear: [channels + 1] into connections
  const int32_t* row_channel;       // [channels] in the order of computation, part by part; int8:
                                    // those of a plane follow each other;
                                    // repack: the channel that each one copies, null for the same
  const int32_t* counts;            // [parts][blocks][groups][2^group - 1] connections by pattern;
                                    // dense, of 2 rows: [4] terms of each product; attention:
                                    // [num_windows] the bias of a window, null without
  const int64_t* part_begin;        // [parts + 1] first channel of each part, a multiple of 4
  const int64_t* part_stream;       // [parts] where the connections of a part begin
  const float* connections;         // in the order of use: offset from the tile's first input
                                    // vector, in floats; one weight per channel of the pattern
  const float* weights;             // dense: [channels / 4][depth][4]; linear: [channels][depth];
                                    // layer norm: [channels]; tokens: [channels][rows][vectors]
                                    // [lanes] to add; lookup: [256] bytes; attention: [heads] by
                                    // what cosines are multiplied, null if the scores are no cosines
  const int32_t* offsets;           // dense: [depth]; of 2 rows: [depth][3] two offsets and the
                                    // sign of the second; input: [vectors][lanes] pixel of row 0,
                                    // or -1; output, repack: [rows][vectors][lanes] where in the
                                    // channel, or -1; max-pool: [width][lanes] valid input columns,
                                    // then valid rows, from -pad_x and -pad_y on; tokens: as
                                    // repack; attention: [2][num_windows][vectors of num_tokens]
                                    // [lanes] where in the channel of the input and of the output,
                                    // or -1 after the last token
  const float* bias;                // [channels]; attention: [biases][heads][num_tokens keys]
                                    // [vectors of num_tokens][lanes] queries, null without; int8:
                                    // integers, then what is added for signed bytes; mean: the zero
                                    // point of the input
  const float* scales;              // int8: [channels] factor of each sum of products; input and
                                    // quantize: the scale; mean: the scales of the input and of the
                                    // output
  const Rescale* rescale;           // int8: null if the output is float32
};

// Channels of a plane of the output of a convolution.
inline int64_t channels_in_plane(const Op& op) {
  return op.kind == kQuantConv && op.rescale ? kPacked : 1;
}

}  // namespace sparse_runtime
