// attention_forward on the shapes of bench/shapes.py that fit a minute.

#include <benchmark/benchmark.h>

#include <cmath>

#include "arrays.h"
#include "cpu/operations.h"
#include "registry.h"

namespace regard::bench {
namespace {

struct Shape {
  const char* name;
  std::int64_t batch, heads, heads_kv, len_q, len_kv, dim;
  bool causal;
};

constexpr Shape kShapes[] = {
    {"bert", 8, 12, 12, 128, 128, 64, false}, {"vit", 8, 12, 12, 197, 197, 64, false},          {"gpt", 1, 16, 16, 1024, 1024, 64, false},
    {"long", 1, 4, 4, 4096, 4096, 64, false}, {"llama_causal", 1, 8, 8, 2048, 2048, 128, true}, {"decode", 1, 32, 8, 1, 8192, 128, false},
    {"tiny", 1, 1, 1, 8, 8, 64, false},
};

void attention(benchmark::State& state, const Shape& s, DType dtype) {
  const Tensor query(dtype, {s.batch, s.heads, s.len_q, s.dim});
  const Tensor key(dtype, {s.batch, s.heads_kv, s.len_kv, s.dim});
  const Tensor value(dtype, {s.batch, s.heads_kv, s.len_kv, s.dim});
  const Tensor out(dtype, {s.batch, s.heads, s.len_q, s.dim});
  AttentionProblem p;
  p.query = query.view();
  p.key = key.view();
  p.value = value.view();
  p.out = out.view();
  p.scale = 1 / std::sqrt(static_cast<double>(s.dim));
  if (s.causal) p.window_right = 0;
  if (p.check() || p.check_outputs()) return state.SkipWithError("refused");
  for (auto _ : state) {
    cpu::attention_forward(p);
    benchmark::ClobberMemory();
  }
  const double scores = static_cast<double>(s.batch * s.heads * s.len_q * s.len_kv) * (s.causal ? 0.5 : 1);
  set_rates(state, 4 * scores * static_cast<double>(s.dim), query.bytes() + key.bytes() + value.bytes() + out.bytes());
}

}  // namespace

void register_attention() {
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
    for (const Shape& s : kShapes)
      benchmark::RegisterBenchmark((std::string("attention/") + s.name + "/" + name_of(dtype)).c_str(), attention, s, dtype)
          ->UseRealTime()
          ->Unit(benchmark::kMicrosecond);
}

}  // namespace regard::bench
