// Products of bytes against loops in whole numbers, on buffers of exact size, in order and in random order: no sum may be
// off by one.
//
// The mutations of test_mutations.py are compiled into this program: it is small on purpose.

#include "cuda/linear_bytes.cuh"
#include "kernel_check.h"

namespace regard::test {
namespace {

// rows x length numbers, the second row of zeros, the last but one not finite where there are so many.
void test_quantise(int rows, int length) {
  Random random(5);
  const int pitch = static_cast<int>(byte_row(length));
  Buffer<float> x(static_cast<std::int64_t>(rows) * length), scale(rows);
  Buffer<char> bytes(static_cast<std::int64_t>(rows) * pitch);
  for (int r = 0; r < rows; ++r)
    for (int k = 0; k < length; ++k) x[r * length + k] = r == 1 ? 1e-35f : static_cast<float>(random.uniform(-3, 3));
  if (rows > 2) x[(rows - 2) * length + length / 2] = INFINITY;
  const Array all = rows_of(x.data(), DType::float32, 1, rows, length);
  const QuantiseArguments a{Rows(all), length % 4 == 0, length, pitch, bytes.data(), scale.data()};
  launch(quantise_rows<float>, rows, kQuantiseThreads, kQuantiseThreads / kWarp * 4, nullptr, a);
  bool ok = true;
  for (int r = 0; r < rows; ++r) {
    float top = 0;
    for (int k = 0; k < length; ++k) top = std::max(top, std::abs(x[r * length + k]));
    const bool finite = top < INFINITY;
    const bool zero = !finite || top < kSmallestScaled;
    ok = ok && (!finite ? scale[r] != scale[r] : scale[r] == (zero ? 0 : top / 127.0f));
    for (int k = 0; k < pitch; ++k) {
      const float want = zero || k >= length ? 0 : std::nearbyint(x[r * length + k] * (127.0f / top));
      ok = ok && static_cast<float>(static_cast<signed char>(bytes[r * pitch + k])) == want;
    }
  }
  CHECK(ok);
}

// run(arguments) launches the kernel. Every sum is its own value: all scales are 1.
template <class Launch> void test_product(int rows, int outputs, int length, Launch&& run) {
  Random random(6);
  const int pitch = static_cast<int>(byte_row(length));
  Buffer<signed char> x(static_cast<std::int64_t>(rows) * pitch), w(static_cast<std::int64_t>(outputs) * pitch);
  Buffer<float> x_scale(rows), scale(outputs), out(static_cast<std::int64_t>(rows) * outputs);
  for (Buffer<signed char>* b : {&x, &w})
    for (std::size_t n = 0; n < b->bytes; ++n)
      b->data()[n] = static_cast<int>(n) % pitch < length ? static_cast<signed char>(random.bits() % 255 - 127) : 0;
  for (int r = 0; r < rows; ++r) x_scale[r] = 1;
  for (int o = 0; o < outputs; ++o) scale[o] = 1;
  LinearProblem p;
  p.out = rows_of(out.data(), DType::float32, 1, rows, outputs);
  ByteArguments a{reinterpret_cast<char*>(x.data()),
                  x_scale.data(),
                  reinterpret_cast<char*>(w.data()),
                  scale.data(),
                  rows,
                  outputs,
                  pitch,
                  0,
                  epilogue_of(p)};
  run(a);
  bool ok = true;
  for (int r = 0; r < rows; ++r)
    for (int o = 0; o < outputs; ++o) {
      int want = 0;
      for (int k = 0; k < length; ++k) want += x[r * pitch + k] * w[o * pitch + k];
      ok = ok && out[r * outputs + o] == static_cast<float>(want);
    }
  CHECK(ok);
}

template <class Tile> void test_tiles(int rows, int outputs, int length) {
  test_product(rows, outputs, length, [&](ByteArguments& a) {
    a.down = (rows + Tile::kRows - 1) / Tile::kRows;
    const std::int64_t across = (outputs + Tile::kOutputs - 1) / Tile::kOutputs;
    launch(multiply_bytes<Tile>, a.down * across, kByteThreads, Tile::kSharedBytes, nullptr, a);
  });
}

void test_few(int rows, int outputs, int length) {
  test_product(rows, outputs, length, [&](ByteArguments& a) {
    a.down = (rows + kFewRows - 1) / kFewRows;
    launch(multiply_few, a.down * ((outputs + kFewBlockOutputs - 1) / kFewBlockOutputs), kByteThreads, 0, nullptr, a);
  });
}

}  // namespace

void test_byte_kernels() {
  try {
    for (const bool random : {false, true}) {
      emulation::settings() = {random, 5};
      emulation::counters() = {};
      test_quantise(4, 37);
      test_quantise(3, 2052);
      test_tiles<SmallByteTile>(33, 70, 300);
      test_tiles<SmallByteTile>(9, 5, 17);
      test_tiles<LargeByteTile>(130, 129, 400);
      CHECK(emulation::counters().products > 0);
      CHECK(emulation::counters().bank_conflicts == 0);
      test_few(1, 9, 1040);
      test_few(11, 17, 530);
    }
  } catch (const emulation::Failure& f) {
    std::printf("%s\n", f.what());
    CHECK(false);
  }
  emulation::settings() = {};
}

}  // namespace regard::test
