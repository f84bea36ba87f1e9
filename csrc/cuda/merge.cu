// Merging partial attention: lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) out_i. A warp has one row.

#include <vector>

#include "core/merge_problem.h"
#include "core/rows.h"
#include "cuda/operations.h"
#include "cuda/types.cuh"

namespace regard::cuda {
namespace {

constexpr int kThreads = 128;

struct MergeArguments {
  const Rows* parts;  // their outs, then their lses
  Rows out;
  Rows lse;
  int count;  // of parts
  DType type;
  DType lse_type;
};

template <class C> REGARD_KERNEL(kThreads, 1) merge_rows(const REGARD_GRID_CONSTANT MergeArguments a) {
  const std::int64_t row = static_cast<std::int64_t>(block_index()) * (kThreads / kWarp) + thread_index() / kWarp;
  if (row >= a.out.count()) return;  // whole warps, and no barrier follows
  const auto lse = [&](int part) { return load_as<C>(a.parts[a.count + part].at(row), a.lse_type); };
  C top = -infinity<C>();
  for (int part = 0; part < a.count; ++part) top = lse(part) > top ? lse(part) : top;  // NaN comes back with its own difference
  const C shift = top == -infinity<C>() ? C(0) : top;
  C sum = 0;
  for (int part = 0; part < a.count; ++part) sum += exp_of(lse(part) - shift);
  for (std::int64_t d = thread_index() % kWarp; d < a.out.length(); d += kWarp) {
    C o = 0;
    for (int part = 0; part < a.count; ++part) {
      // A part that saw no key weighs nothing, whatever its out holds.
      if (lse(part) == -infinity<C>()) continue;
      o += exp_of(lse(part) - shift) / sum * load_as<C>(a.parts[part].at(row) + d * a.parts[part].step(), a.type);
    }
    store_as(a.out.at(row) + d * a.out.step(), a.type, o);
  }
  if (thread_index() % kWarp == 0) store_as(a.lse.at(row), a.lse_type, static_cast<double>(shift) + log(static_cast<double>(sum)));
}

// An array of row scalars, [...], seen as rows of length 1.
Rows scalars(Array x) {
  x.insert_axis(x.rank);
  return Rows(x);
}

}  // namespace

void merge_attention(const MergeProblem& p, const Queue& queue) {
  const Rows out(p.out);
  if (out.count() == 0) return;
  const OnDevice here(queue.device);
  std::vector<Rows> parts;
  for (const Array& x : p.outs) parts.emplace_back(x);
  for (const Array& x : p.lses) parts.push_back(scalars(x));
  const auto bytes = static_cast<std::int64_t>(parts.size() * sizeof(Rows));
  char* const there = queue.scratch(bytes);
  copy_to_device(there, parts.data(), bytes, queue.stream);
  const MergeArguments a{reinterpret_cast<const Rows*>(there), out, scalars(p.lse), static_cast<int>(p.parts()), p.out.dtype, p.lse.dtype};
  constexpr int kRows = kThreads / kWarp;
  with_compute(p.out.dtype,
               [&](auto t) { launch(merge_rows<decltype(t)>, (out.count() + kRows - 1) / kRows, kThreads, 0, queue.stream, a); });
}

}  // namespace regard::cuda
