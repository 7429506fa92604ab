/* Classify an image with a plan: classify PLAN IMAGE.ppm [THREADS]
 *
 * The image is a binary PPM (P6) of the size for which the plan was written. Prints the classes with
 * the largest logits, one a line. docs/embedding.md shows how to compile this file. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "sparse_runtime.h"

enum { kShown = 5 };

/* Return the pixels of a PPM of this size, or null with a message. */
static uint8_t* read_ppm(const char* path, int64_t height, int64_t width) {
  FILE* file = fopen(path, "rb");
  if (!file) {
    perror(path);
    return NULL;
  }
  int found_width = 0, found_height = 0, most = 0;
  const int found = fscanf(file, "P6 %d %d %d", &found_width, &found_height, &most);
  uint8_t* pixels = NULL;
  if (found != 3 || most != 255 || fgetc(file) == EOF) {
    fprintf(stderr, "%s: not a binary PPM of 8 bits\n", path);
  } else if (found_width != width || found_height != height) {
    fprintf(stderr, "%s: is %dx%d, the plan takes %" PRId64 "x%" PRId64 "\n", path, found_width,
            found_height, width, height);
  } else {
    const size_t size = (size_t)(3 * width * height);
    pixels = malloc(size);
    if (!pixels || fread(pixels, 1, size, file) != size) {
      fprintf(stderr, "%s: pixels are missing\n", path);
      free(pixels);
      pixels = NULL;
    }
  }
  fclose(file);
  return pixels;
}

static void print_largest(float* logits, int64_t count) {
  for (int shown = 0; shown < kShown && shown < count; ++shown) {
    int64_t best = 0;
    for (int64_t i = 1; i < count; ++i) best = logits[i] > logits[best] ? i : best;
    printf("class %" PRId64 ": %.9g\n", best, logits[best]);
    logits[best] = -INFINITY;
  }
}

static int classify(sparse_network* network, const char* path) {
  int64_t in[3], out[3];
  sparse_input_shape(network, in);
  sparse_output_shape(network, out);
  if (in[0] != 3) {
    fprintf(stderr, "the plan takes images of %" PRId64 " channels\n", in[0]);
    return 1;
  }
  const int64_t classes = out[0] * out[1] * out[2];
  uint8_t* pixels = read_ppm(path, in[1], in[2]);
  float* logits = malloc((size_t)classes * sizeof *logits);
  int failed = !pixels || !logits;
  if (!failed && sparse_run_uint8(network, pixels, 1, logits) != SPARSE_OK) {
    fprintf(stderr, "%s\n", sparse_error());
    failed = 1;
  }
  if (!failed) print_largest(logits, classes);
  free(logits);
  free(pixels);
  return failed;
}

int main(int argc, char** argv) {
  if (argc < 3) {
    fprintf(stderr, "usage: %s PLAN IMAGE.ppm [THREADS]\n", argv[0]);
    return 2;
  }
  sparse_network* network;
  const sparse_status status = sparse_open(argv[1], argc > 3 ? atoi(argv[3]) : 0, &network);
  if (status != SPARSE_OK) {
    fprintf(stderr, "%s: %s\n", sparse_status_name(status), sparse_error());
    return 1;
  }
  const int failed = classify(network, argv[2]);
  sparse_close(network);
  return failed;
}
