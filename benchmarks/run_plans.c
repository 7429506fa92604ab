/* Run plans on their inputs: run_plans [retune] THREADS REPEATS STEM ...
 *
 * For each STEM: STEM.plan is opened, STEM.in holds normalized images, STEM.out receives the
 * outputs. Prints the least seconds per image (processor time with one thread), and the status and
 * the reason of what fails. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "sparse_runtime.h"

static void* slurp(const char* path, size_t* size) {
  FILE* file = fopen(path, "rb");
  if (!file) exit(3);
  fseek(file, 0, SEEK_END);
  *size = (size_t)ftell(file);
  rewind(file);
  void* data = malloc(*size + 1);
  if (!data || fread(data, 1, *size, file) != *size) exit(3);
  fclose(file);
  return data;
}

static double now(int threads) {
  struct timespec t;
  clock_gettime(threads > 1 ? CLOCK_MONOTONIC : CLOCK_PROCESS_CPUTIME_ID, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static sparse_status run(const char* stem, int threads, int repeats, int retune) {
  char path[4096];
  size_t size = 0;
  sparse_network* network;
  snprintf(path, sizeof path, "%s.plan", stem);
  sparse_status status = sparse_open(path, threads, &network);
  if (status != SPARSE_OK) return status;
  int64_t in[3], out[3];
  sparse_input_shape(network, in);
  sparse_output_shape(network, out);
  snprintf(path, sizeof path, "%s.in", stem);
  float* images = slurp(path, &size);
  const int64_t count = (int64_t)(size / sizeof(float)) / (in[0] * in[1] * in[2]);
  const size_t floats = (size_t)(count * out[0] * out[1] * out[2]);
  float* outputs = malloc(floats * sizeof(float) + 1);
  if (!outputs) exit(3);
  if (retune) status = sparse_retune(network);
  double least = 1e30;
  for (int i = 0; i < repeats && status == SPARSE_OK; ++i) {
    const double start = now(sparse_threads(network));
    status = sparse_run(network, images, count, outputs);
    const double seconds = now(sparse_threads(network)) - start;
    if (seconds < least) least = seconds;
  }
  snprintf(path, sizeof path, "%s.out", stem);
  FILE* file = fopen(path, "wb");
  if (!file || fwrite(outputs, sizeof(float), floats, file) != floats) exit(3);
  fclose(file);
  printf("%s %.9f\n", stem, least / (double)count);
  free(outputs);
  free(images);
  sparse_close(network);
  return status;
}

int main(int argc, char** argv) {
  const int retune = argc > 1 && strcmp(argv[1], "retune") == 0;
  argv += retune;
  argc -= retune;
  if (argc < 3) return 2;
  int failed = 0;
  for (int i = 3; i < argc; ++i) {
    const sparse_status status = run(argv[i], atoi(argv[1]), atoi(argv[2]), retune);
    if (status == SPARSE_OK) continue;
    printf("%s %s %s\n", argv[i], sparse_status_name(status), sparse_error());
    failed = 1;
  }
  return failed;
}
