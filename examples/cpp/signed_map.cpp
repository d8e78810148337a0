// signed_map NX NY NZ MASK.raw: the mask's signed distance map as MASK.raw.sdf (float32), on the first GPU,
// or on the CPU where there is none. For a library that was built with CUDA. MASK.raw: one byte a voxel, not
// 0 for object.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#include "noisyseg/distance.h"

using namespace noisyseg;

static void* allocate(size_t bytes, bool gpu) {  // the library allocates nothing: all memory is the caller's
  void* memory = nullptr;
  if (gpu ? cudaMallocManaged(&memory, bytes) != cudaSuccess : !(memory = std::malloc(bytes + 1)))
    std::fprintf(stderr, "no memory for %zu bytes\n", bytes), std::exit(1);
  return memory;
}

int main(int argc, char** argv) {
  if (argc != 5) return std::fprintf(stderr, "usage: signed_map NX NY NZ MASK.raw\n"), 2;
  const int64_t n[3] = {std::atoll(argv[1]), std::atoll(argv[2]), std::atoll(argv[3])},
                all = n[0] * n[1] * n[2];
  int devices = 0;
  const bool gpu = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  cudaStream_t stream = nullptr;
  Exec exec;  // the CPU, all threads
  if (gpu) {
    cudaStreamCreate(&stream);
    exec.device = 0;
    exec.stream = stream;
  }
  const Array mask{allocate(all, gpu), DType::u8, 3, {n[0], n[1], n[2]}, {n[1] * n[2], n[2], 1}};
  Array map = mask;
  map.data = allocate(4 * all, gpu);
  map.dtype = DType::f32;
  if (!std::ifstream(argv[4], std::ios::binary).read((char*)mask.data, all))
    return std::fprintf(stderr, "%s: holds fewer than %lld bytes\n", argv[4], (long long)all), 1;
  DistanceOptions options;
  options.convention = SignedMap::boundary;
  void* scratch = allocate(distance_workspace(mask, 3, options, false, false, exec), gpu);
  signed_distance_map(mask, 3, nullptr, options, map, scratch, exec);  // on the stream: it does not wait
  if (gpu && cudaStreamSynchronize(stream) != cudaSuccess)
    return std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(cudaGetLastError())), 1;
  std::ofstream(std::string(argv[4]) + ".sdf", std::ios::binary).write((const char*)map.data, 4 * all);
  std::printf("%s\n", gpu ? "GPU" : "CPU");
}
