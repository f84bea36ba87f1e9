// linear with its weight packed beforehand, and packed in the call; the norms.

#include <benchmark/benchmark.h>

#include <cmath>

#include "arrays.h"
#include "cpu/operations.h"
#include "registry.h"

namespace regard::bench {
namespace {

struct Shape {
  const char* name;
  std::int64_t rows, in_features, out_features;
};

constexpr Shape kShapes[] = {
    {"bert_projection", 1024, 768, 768},
    {"bert_feed_forward", 1024, 768, 3072},
    {"minilm", 4096, 384, 1536},
    {"decode", 1, 4096, 4096},
};

void linear(benchmark::State& state, const Shape& s, DType dtype, bool packed_before) {
  const Tensor x(dtype, {s.rows, s.in_features});
  const Tensor weight(dtype, {s.out_features, s.in_features}, 1 / std::sqrt(static_cast<float>(s.in_features)));
  const Tensor bias(dtype, {s.out_features});
  const Tensor out(dtype, {s.rows, s.out_features});
  const DType compute = compute_dtype(dtype);
  const Tensor packed(compute, {panel_count(s.out_features, compute), s.in_features + 1, panel_columns(compute)});
  LinearProblem p;
  p.x = x.view();
  p.out = out.view();
  p.activation = LinearProblem::Activation::relu;
  if (packed_before) {
    PackProblem pack{weight.view(), bias.view(), {}};
    if (pack.check()) return state.SkipWithError("refused");
    pack.packed = packed.view();
    cpu::pack_linear(pack);
    p.weight = packed.view();
    p.packed = true;
    p.packed_out_features = s.out_features;
  } else {
    p.weight = weight.view();
    p.bias = bias.view();
  }
  if (p.check() || p.check_outputs()) return state.SkipWithError("refused");
  for (auto _ : state) {
    cpu::linear(p);
    benchmark::ClobberMemory();
  }
  const double products = static_cast<double>(s.rows * s.in_features) * static_cast<double>(s.out_features);
  set_rates(state, 2 * products, x.bytes() + weight.bytes() + out.bytes());
}

void norm(benchmark::State& state, NormProblem::Kind kind, std::int64_t rows, std::int64_t features) {
  const Tensor x(DType::float32, {rows, features});
  const Tensor weight(DType::float32, {features});
  const Tensor out(DType::float32, {rows, features});
  NormProblem p;
  p.x = x.view();
  p.weight = weight.view();
  p.out = out.view();
  p.eps = 1e-5;
  p.kind = kind;
  if (p.check() || p.check_outputs()) return state.SkipWithError("refused");
  for (auto _ : state) {
    cpu::norm(p);
    benchmark::ClobberMemory();
  }
  set_rates(state, 0, x.bytes() + out.bytes());
}

}  // namespace

void register_linear() {
  for (const DType dtype : {DType::float32, DType::bfloat16})
    for (const Shape& s : kShapes)
      for (const bool packed : {true, false})
        benchmark::RegisterBenchmark((std::string("linear/") + s.name + "/" + name_of(dtype) + (packed ? "/packed" : "/plain")).c_str(),
                                     linear, s, dtype, packed)
            ->UseRealTime()
            ->Unit(benchmark::kMicrosecond);
  benchmark::RegisterBenchmark("norm/layer/1024x768", norm, NormProblem::Kind::layer, 1024, 768)
      ->UseRealTime()
      ->Unit(benchmark::kMicrosecond);
  benchmark::RegisterBenchmark("norm/rms/2048x4096", norm, NormProblem::Kind::rms, 2048, 4096)
      ->UseRealTime()
      ->Unit(benchmark::kMicrosecond);
}

}  // namespace regard::bench
