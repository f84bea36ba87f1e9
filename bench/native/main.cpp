// Runs the native benchmarks of one instruction set, or says why this machine cannot.
//
//   regard_bench_avx512 --benchmark_filter=attention        REGARD_BENCH_THREADS=2 sets the threads

#include <benchmark/benchmark.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/ceilings.h"
#include "cpu/parallel.h"
#include "registry.h"

namespace {

// Built for the baseline, so it runs anywhere.
bool machine_runs(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(isa, "avx2") == 0) return avx2;
  if (std::strcmp(isa, "avx512") == 0) return avx512;
  if (std::strcmp(isa, "amx") == 0) return avx512 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
  return __builtin_cpu_supports("sse4.2");
#else
  return std::strcmp(isa, "baseline") == 0;
#endif
}

std::string giga(double rate) { return std::to_string(static_cast<long>(rate)); }

}  // namespace

int main(int argc, char** argv) {
  if (!machine_runs(REGARD_ISA)) {
    std::fprintf(stderr, "this machine does not run %s\n", REGARD_ISA);
    return 1;
  }
  if (const char* threads = std::getenv("REGARD_BENCH_THREADS")) {
    const int n = std::atoi(threads);
    if (n < 1) {
      std::fprintf(stderr, "REGARD_BENCH_THREADS: expected a number of at least 1, got '%s'\n", threads);
      return 1;
    }
    regard::cpu::set_num_threads(n);
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("instruction set", REGARD_ISA);
  benchmark::AddCustomContext("threads", std::to_string(regard::cpu::get_num_threads()));
  benchmark::AddCustomContext("multiply-add GFLOP/s", giga(regard::cpu::measure_fma(0.2)));
  benchmark::AddCustomContext("memory read GB/s", giga(regard::cpu::measure_read(std::int64_t{256} << 20, 0.2)));
  regard::bench::register_attention();
  regard::bench::register_excitation();
  regard::bench::register_linear();
  regard::bench::register_tile_engine();
  regard::bench::register_vector_math();
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
