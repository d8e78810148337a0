// volume NX NY NZ PRED.raw TARGET.raw: the signed distance map of TARGET as TARGET.raw.sdf (float32), and the
// surface metrics of the pair. The files hold one byte for each voxel, not 0 for object.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "noisyseg/distance.h"
#include "noisyseg/surface.h"

using namespace noisyseg;

int main(int argc, char** argv) {
  if (argc != 6) return std::fprintf(stderr, "usage: volume NX NY NZ PRED.raw TARGET.raw\n"), 2;
  const int64_t n[3] = {std::atoll(argv[1]), std::atoll(argv[2]), std::atoll(argv[3])},
                all = n[0] * n[1] * n[2];
  const auto array = [&](void* data, DType dtype) {
    return Array{data, dtype, 3, {n[0], n[1], n[2]}, {n[1] * n[2], n[2], 1}};
  };
  std::vector<char> masks[2] = {std::vector<char>(all), std::vector<char>(all)};
  for (int i = 0; i < 2; ++i)
    if (!std::ifstream(argv[4 + i], std::ios::binary).read(masks[i].data(), all))
      return std::fprintf(stderr, "%s: holds fewer than %lld bytes\n", argv[4 + i], (long long)all), 1;
  const Array pred = array(masks[0].data(), DType::u8), target = array(masks[1].data(), DType::u8);
  const Exec here;  // the CPU, all threads

  std::vector<float> map(all);
  DistanceOptions signed_map;
  signed_map.convention = SignedMap::boundary;
  std::vector<char> scratch(distance_workspace(target, 3, signed_map, false, false, here));
  signed_distance_map(target, 3, nullptr, signed_map, array(map.data(), DType::f32), scratch.data(), here);
  std::ofstream(std::string(argv[5]) + ".sdf", std::ios::binary).write((const char*)map.data(), 4 * all);

  const SurfaceOptions options;  // MONAI's definition, 95th percentile, tolerance 1
  std::vector<char> surfaces(cpu::surface_extract_workspace(pred, 3, options, here));
  scratch.resize(cpu::surface_extract(pred, target, 3, options, surfaces.data(), here));
  double found[6];  // hd, hd_percentile, asd, assd, asd from target, nsd
  const Array out{found, DType::f64, 2, {6, 1}, {1, 1}};
  cpu::surface_metrics(pred, 3, options, surfaces.data(), scratch.data(), out, here);
  std::printf("HD %.6f HD95 %.6f ASSD %.6f NSD %.6f\n", found[0], found[1], found[3], found[5]);
}
