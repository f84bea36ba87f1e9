// Linear layers with weights of int8: see linear_bytes.cuh.

#include "cuda/linear_bytes.cuh"

#include "cuda/operations.h"

namespace regard::cuda {
namespace {

std::int64_t divided(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

template <class Tile> std::int64_t blocks_of(const ByteArguments& a) {
  return divided(a.rows, Tile::kRows) * divided(a.outputs, Tile::kOutputs);
}

template <class Tile> void launch_tiles(ByteArguments a, Stream stream) {
  a.down = divided(a.rows, Tile::kRows);
  chosen({"int8 tensor cores", Tile::kRows, Tile::kOutputs, true});
  launch(multiply_bytes<Tile>, blocks_of<Tile>(a), kByteThreads, Tile::kSharedBytes, stream, a);
}

}  // namespace

void quantise_rows(const Array& x, char* bytes, float* scales, const Queue& queue) {
  const Rows rows(x);
  if (rows.count() == 0) return;
  require_room({rows.length()});
  const OnDevice here(queue.device);
  const QuantiseArguments a{rows, in_vectors(x), static_cast<int>(rows.length()), static_cast<int>(byte_row(rows.length())), bytes, scales};
  with_type(x.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (!std::is_same_v<T, double>)  // problems refuse it
      launch(quantise_rows<T>, rows.count(), kQuantiseThreads, kQuantiseThreads / kWarp * 4, queue.stream, a);
  });
}

void linear_bytes(const LinearProblem& p, const Queue& queue) {
  const Rows x(p.x);
  if (x.count() == 0 || p.out_features() == 0) return;
  require_room({p.out_features()});
  const std::int64_t pitch = byte_row(p.in_features());
  char* const bytes = pitch > 0 ? queue.scratch(x.count() * pitch) : nullptr;
  float* const scales = reinterpret_cast<float*>(queue.scratch(x.count() * 4));
  quantise_rows(p.x, bytes, scales, queue);
  ByteArguments a{bytes,
                  scales,
                  p.weight.data,
                  reinterpret_cast<const float*>(p.scale.data),
                  x.count(),
                  static_cast<int>(p.out_features()),
                  static_cast<int>(pitch),
                  0,
                  epilogue_of(p)};
  const OnDevice here(queue.device);
  const Device device = cuda::device(queue.device);
  if (a.rows <= kFewRows || device.capability < 80) {
    a.down = divided(a.rows, kFewRows);
    chosen({"int8 rows", kFewRows, kFewBlockOutputs, false});
    launch(multiply_few, a.down * divided(a.outputs, kFewBlockOutputs), kByteThreads, 0, queue.stream, a);
  } else if (a.rows > LargeByteTile::kRows / 2 && blocks_of<LargeByteTile>(a) >= device.processors &&
             device.shared_bytes >= LargeByteTile::kSharedBytes) {
    launch_tiles<LargeByteTile>(a, queue.stream);
  } else {  // large tiles would be half empty, or leave multiprocessors idle
    launch_tiles<SmallByteTile>(a, queue.stream);
  }
}

}  // namespace regard::cuda
