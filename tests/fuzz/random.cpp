// For compilers without libFuzzer: RUNS inputs of random bytes from SEED on. Usage: random RUNS SEED
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int count, char** arguments) {
  const long runs = count > 1 ? std::atol(arguments[1]) : 1000,
             first = count > 2 ? std::atol(arguments[2]) : 1;
  for (long i = 0; i < runs; ++i) {
    std::mt19937_64 random(static_cast<unsigned long>(first + i));
    uint8_t bytes[256];
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(random());
    if (i % 1000 == 0) std::fflush(stderr);
    LLVMFuzzerTestOneInput(bytes, random() % sizeof bytes);
  }
  std::printf("%ld runs from seed %ld\n", runs, first);
}
