// Classify an image with a plan: classify PLAN IMAGE.ppm [THREADS]
//
// The same as classify.c, with a network that frees itself, and an image that is normalized here, as
// a program does whose pixels are floats already.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "sparse_runtime.h"

namespace {

using Network = std::unique_ptr<sparse_network, void (*)(sparse_network*)>;

void check(sparse_status status) {
  if (status != SPARSE_OK) {
    throw std::runtime_error(std::string(sparse_status_name(status)) + ": " + sparse_error());
  }
}

Network open(const char* path, int threads) {
  sparse_network* network = nullptr;
  check(sparse_open(path, threads, &network));
  return {network, sparse_close};
}

std::vector<unsigned char> read_ppm(const std::string& path, const int64_t shape[3]) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, most = 0;
  file >> magic >> width >> height >> most;
  if (!file || magic != "P6" || most != 255) {
    throw std::runtime_error(path + ": not a binary PPM of 8 bits");
  }
  if (shape[0] != 3 || height != shape[1] || width != shape[2]) {
    throw std::runtime_error(path + ": is not of the size that the plan takes");
  }
  file.get();
  std::vector<unsigned char> pixels(size_t(3 * width * height));
  file.read(reinterpret_cast<char*>(pixels.data()), std::streamsize(pixels.size()));
  if (!file) throw std::runtime_error(path + ": pixels are missing");
  return pixels;
}

void classify(sparse_network* network, const std::string& path) {
  int64_t in[3], out[3];
  sparse_input_shape(network, in);
  sparse_output_shape(network, out);
  const std::vector<unsigned char> pixels = read_ppm(path, in);
  const float *mean = sparse_mean(network), *std = sparse_std(network);
  std::vector<float> image(pixels.size());
  const size_t plane = pixels.size() / 3;
  for (size_t c = 0; c < 3; ++c) {
    for (size_t i = 0; i < plane; ++i) {
      image[c * plane + i] = (float(pixels[3 * i + c]) / 255.0f - mean[c]) / std[c];
    }
  }
  std::vector<float> logits(size_t(out[0] * out[1] * out[2]));
  check(sparse_run(network, image.data(), 1, logits.data()));

  std::vector<size_t> order(logits.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  order.resize(std::min<size_t>(order.size(), 5));
  for (size_t i : order) std::printf("class %zu: %.9g\n", i, double(logits[i]));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: " << argv[0] << " PLAN IMAGE.ppm [THREADS]\n";
    return 2;
  }
  try {
    const Network network = open(argv[1], argc > 3 ? std::stoi(argv[3]) : 0);
    classify(network.get(), argv[2]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
