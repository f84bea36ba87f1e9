// Rows of every dtype and stride, in heap blocks of exactly their size: under AddressSanitizer a read past either end
// is an error.

#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "cpu/strided.h"
#include "cpu/tile_simd.h"

namespace regard::test {
namespace {

using namespace cpu;

// n elements `stride` bytes apart in a block of no byte more, starting `offset` bytes into it.
struct Row {
  Row(std::int64_t n, std::int64_t stride, std::int64_t item, std::int64_t offset)
      : size(offset + (n > 0 ? (n - 1) * std::abs(stride) + item : 0)), block(new char[static_cast<std::size_t>(size)]) {
    std::memset(block.get(), 0x55, static_cast<std::size_t>(size));
    first = block.get() + offset + (stride < 0 && n > 0 ? (n - 1) * -stride : 0);
  }
  std::int64_t size;
  std::unique_ptr<char[]> block;
  char* first;
};

template <class S, class T> void test_rows() {
  constexpr std::int64_t item = sizeof(S);
  for (const std::int64_t stride : {item, 2 * item, -item, -3 * item, item + 1, std::int64_t{0}})
    for (const std::int64_t offset : {std::int64_t{0}, std::int64_t{1}, item})
      for (std::int64_t n = 0; n <= 3 * kWidth<T> + 1; ++n) {
        const Row row(n, stride, item, offset);
        std::vector<T> wanted(static_cast<std::size_t>(n));
        for (std::int64_t i = 0; i < n; ++i) {
          const auto small = static_cast<float>((stride == 0 ? n - 1 : i) % 60 - 20);
          wanted[static_cast<std::size_t>(i)] = small;
          S s;
          if constexpr (std::is_same_v<S, double>)
            s = small;
          else
            s = from_float<S>(small);
          std::memcpy(row.first + i * stride, &s, sizeof s);
        }
        const std::unique_ptr<T[]> got(new T[static_cast<std::size_t>(n)]);
        read_row(dtype_of<S>(), row.first, stride, n, got.get());
        CHECK(n == 0 || std::memcmp(got.get(), wanted.data(), static_cast<std::size_t>(n) * sizeof(T)) == 0);
        if (stride == 0 || !std::is_same_v<ComputeOf<S>, T>) continue;
        const Row copy(n, stride, item, offset);
        write_row(dtype_of<S>(), copy.first, stride, n, got.get());
        CHECK(std::memcmp(copy.block.get(), row.block.get(), static_cast<std::size_t>(row.size)) == 0);
      }
}

// Of caches and masks.
template <class S, class T> void test_bytes(DType dtype) {
  for (std::int64_t n = 0; n <= 3 * kWidth<T> + 1; ++n) {
    const Row row(n, 1, 1, 0);
    for (std::int64_t i = 0; i < n; ++i) row.first[i] = static_cast<char>(i * 5);
    const std::unique_ptr<T[]> got(new T[static_cast<std::size_t>(n)]);
    read_row(dtype, row.first, 1, n, got.get());
    for (std::int64_t i = 0; i < n; ++i) CHECK(got[static_cast<std::size_t>(i)] == static_cast<T>(to_float(read<S>(row.first + i))));
  }
}

template <class T> void test_transpose_padded() {
  constexpr int w = kWidth<T>;
  for (int rows = 1; rows <= 2 * w + 1; ++rows)
    for (int columns = 1; columns <= 2 * w + 1; ++columns) {
      const int from_stride = (columns + w - 1) / w * w;
      const int padded = (rows + w - 1) / w * w;
      const std::unique_ptr<T[]> from(new T[static_cast<std::size_t>(rows * from_stride)]);
      const std::unique_ptr<T[]> to(new T[static_cast<std::size_t>(columns * padded)]);
      for (int i = 0; i < rows * from_stride; ++i) from[static_cast<std::size_t>(i)] = static_cast<T>(i + 1);
      transpose_padded(from.get(), from_stride, rows, columns, to.get(), padded, padded);
      bool right = true;
      for (int c = 0; c < columns; ++c)
        for (int r = 0; r < padded; ++r) {
          const T wanted = r < rows ? from[static_cast<std::size_t>(r * from_stride + c)] : T(0);
          right = right && to[static_cast<std::size_t>(c * padded + r)] == wanted;
        }
      CHECK(right);
    }
}

// C = scale C + A B on blocks that hold the rounded-up rows and whole vectors, and no element more. Small whole
// numbers: every sum is exact.
template <class T, Left Order> void test_multiply() {
  using V = Vec<T>;
  constexpr int w = kWidth<T>;
  for (int rows = 1; rows <= 2 * Tile<T>::kRows + 1; ++rows)
    for (int vectors = 1; vectors <= Tile<T>::kVectors; ++vectors)
      for (const int depth : {0, 1, 5, 33})
        for (const bool scaled : {false, true}) {
          const int rounded = (rows + Tile<T>::kRows - 1) / Tile<T>::kRows * Tile<T>::kRows;
          const int columns = vectors * w;
          const int lda = Order == Left::depth_contiguous ? depth : rounded;
          std::vector<T> a(static_cast<std::size_t>(rounded * depth)), b(static_cast<std::size_t>(depth * columns));
          std::vector<T> c(static_cast<std::size_t>(rounded * columns));
          Random random(static_cast<std::uint64_t>(rows * 100 + depth));
          for (auto* x : {&a, &b, &c})
            for (T& each : *x) each = static_cast<T>(static_cast<int>(random.bits() % 9) - 4);
          std::vector<T> wanted = c;
          for (int r = 0; r < rounded; ++r)
            for (int j = 0; j < columns; ++j) {
              T sum = scaled ? 2 * c[static_cast<std::size_t>(r * columns + j)] : 0;
              for (int k = 0; k < depth; ++k)
                sum += a[static_cast<std::size_t>(Order == Left::depth_contiguous ? r * lda + k : k * lda + r)] *
                       b[static_cast<std::size_t>(k * columns + j)];
              wanted[static_cast<std::size_t>(r * columns + j)] = sum;
            }
          V scale[Tile<T>::kVectors];
          for (V& each : scale) each = broadcast<V>(2);
          multiply<T, Order>(a.data(), lda, b.data(), columns, c.data(), columns, rows, vectors, depth, scaled ? scale : nullptr);
          CHECK(c == wanted);
        }
}

}  // namespace

void test_strided() {
  test_rows<float, float>();
  test_rows<Half, float>();
  test_rows<BFloat16, float>();
  test_rows<double, double>();
  test_rows<double, float>();
  test_rows<float, double>();
  test_bytes<Int8, float>(DType::int8);
  test_bytes<Int8, double>(DType::boolean);
  test_bytes<Float8, float>(DType::float8_e4m3fn);
  test_bytes<Float8, double>(DType::float8_e4m3fn);
  test_transpose_padded<float>();
  test_transpose_padded<double>();
  test_multiply<float, Left::depth_contiguous>();
  test_multiply<float, Left::rows_contiguous>();
  test_multiply<double, Left::depth_contiguous>();
  test_multiply<double, Left::rows_contiguous>();
}

}  // namespace regard::test
