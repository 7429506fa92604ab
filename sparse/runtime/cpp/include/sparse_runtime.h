/* Run a trained sparse network from C or C++, without Python.
 *
 * `python export.py NETWORK PLAN --to plan` writes a plan: a network for images of one size and for
 * one level of instructions. docs/embedding.md shows how to build this library and how to use it.
 *
 * Errors. Functions that can fail return a sparse_status. sparse_error() then has the reason in one
 * line. A plan may come from anybody: it is checked in full before it is used, and what does not fit
 * is refused. No function throws.
 *
 * Threads. sparse_run and sparse_run_uint8 may be called by several threads at a time with the same
 * network. Such calls run side by side, each with activations and worker threads of its own; these
 * are kept for later calls. The functions that ask for shapes and the like may be called at any
 * time. sparse_retune and sparse_close need the network for themselves. Different networks are
 * independent.
 */
#ifndef SPARSE_RUNTIME_H
#define SPARSE_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#define SPARSE_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

/* Number of this interface. It grows when functions are added; existing ones stay as they are. */
#define SPARSE_RUNTIME_VERSION 1

typedef enum sparse_status {
  SPARSE_OK = 0,
  SPARSE_BAD_ARGUMENT = 1, /* of the call: a null pointer, a negative number */
  SPARSE_NO_FILE = 2,      /* the file cannot be read */
  SPARSE_BAD_PLAN = 3,     /* no plan, or a damaged one */
  SPARSE_OTHER_VERSION = 4, /* a plan of another version of the runtime */
  SPARSE_OTHER_LEVEL = 5,  /* a plan for other vectors or registers than this library's */
  SPARSE_NO_MEMORY = 6
} sparse_status;

typedef struct sparse_network sparse_network;

/* The SPARSE_RUNTIME_VERSION with which the library was compiled. */
SPARSE_API int sparse_version(void);

/* The name of a status, such as "SPARSE_BAD_PLAN". */
SPARSE_API const char* sparse_status_name(sparse_status status);

/* The reason of the last failure in the calling thread, in one line. Valid until the next one. */
SPARSE_API const char* sparse_error(void);

/* Open a plan. `threads` is the number of threads of a call, with the caller's; 0 takes the number
 * for which the plan was written. On failure *network is null. */
SPARSE_API sparse_status sparse_open(const char* path, int threads, sparse_network** network);

/* The same for a plan in memory. It is copied: `data` may be freed afterwards. */
SPARSE_API sparse_status sparse_open_memory(const void* data, size_t size, int threads,
                                            sparse_network** network);

/* Free a network. Null is allowed. */
SPARSE_API void sparse_close(sparse_network* network);

/* Channels, height and width of an image. */
SPARSE_API void sparse_input_shape(const sparse_network* network, int64_t shape[3]);

/* The shape of the output of one image: {classes, 1, 1}, or channels, height and width. */
SPARSE_API void sparse_output_shape(const sparse_network* network, int64_t shape[3]);

/* Mean and standard deviation per channel: images are normalized by (x - mean) / std, with x from 0
 * to 1. The arrays live as long as the network. */
SPARSE_API const float* sparse_mean(const sparse_network* network);
SPARSE_API const float* sparse_std(const sparse_network* network);

/* Number of threads of a call. It is less than asked for if the system starts fewer. */
SPARSE_API int sparse_threads(const sparse_network* network);

/* The level for which the plan was written, such as "avx2". */
SPARSE_API const char* sparse_level(const sparse_network* network);

/* Run normalized images (num_images, channels, height, width), C-contiguous. `outputs` receives
 * (num_images, output shape). */
SPARSE_API sparse_status sparse_run(sparse_network* network, const float* images,
                                    int64_t num_images, float* outputs);

/* The same for pixels from 0 to 255 in the order of image files, (num_images, height, width,
 * channels). They are normalized here. */
SPARSE_API sparse_status sparse_run_uint8(sparse_network* network, const uint8_t* images,
                                          int64_t num_images, float* outputs);

/* Measure on this machine how each convolution is computed fastest, and compute it so from now on.
 * This takes some seconds to a minute, and memory for the tables of a layer in all ways that are
 * tried. Outputs may differ in their last bits afterwards. */
SPARSE_API sparse_status sparse_retune(sparse_network* network);

#ifdef __cplusplus
}
#endif
#endif
