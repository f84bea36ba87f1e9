// Recurrent layers against their equations in double, every array in a heap block of exactly its size: under
// AddressSanitizer a read or write past an end is an error.

#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "cpu/operations.h"

namespace regard::test {
namespace {

template <class T> struct Block {
  std::unique_ptr<T[]> values;
  Array view;

  Block() = default;
  Block(std::vector<std::int64_t> shape, Random& random) {
    view.kind = Array::Kind::array;
    view.dtype = dtype_of<T>();
    view.writable = true;
    view.rank = static_cast<int>(shape.size());
    std::int64_t n = 1;
    for (int a = view.rank - 1; a >= 0; --a) {
      view.shape[a] = shape[static_cast<std::size_t>(a)];
      view.stride[a] = n * static_cast<std::int64_t>(sizeof(T));
      n *= view.shape[a];
    }
    values.reset(new T[static_cast<std::size_t>(n)]);
    for (std::int64_t i = 0; i < n; ++i) values[static_cast<std::size_t>(i)] = static_cast<T>(random.uniform(-1, 1));
    view.data = reinterpret_cast<char*>(values.get());
  }
  double operator()(std::int64_t i, std::int64_t j, std::int64_t k) const {
    return values[static_cast<std::size_t>((i * view.shape[1] + j) * view.shape[2] + k)];
  }
  double operator()(std::int64_t i, std::int64_t j) const { return values[static_cast<std::size_t>(i * view.shape[1] + j)]; }
  double operator()(std::int64_t i) const { return values[static_cast<std::size_t>(i)]; }
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <class T>
void test_layer(Cell cell, std::int64_t batch, std::int64_t length, std::int64_t features, std::int64_t hidden, bool reverse) {
  Random random(static_cast<std::uint64_t>(batch * 1000 + hidden));
  const std::int64_t rows = gates_of(cell) * hidden;
  const Block<T> x({batch, length, features}, random), h0({1, batch, hidden}, random), c0({1, batch, hidden}, random);
  const Block<T> w_input({rows, features}, random), w_hidden({rows, hidden}, random), b_input({rows}, random), b_hidden({rows}, random);
  const Block<T> out({batch, length, hidden}, random), h_n({1, batch, hidden}, random), c_n({1, batch, hidden}, random);
  const std::unique_ptr<std::int64_t[]> lengths(new std::int64_t[static_cast<std::size_t>(batch)]);
  for (std::int64_t b = 0; b < batch; ++b) lengths[static_cast<std::size_t>(b)] = (b * 7 + 3) % (length + 1);

  RecurrentProblem p;
  p.cell = cell;
  p.x = x.view;
  p.h0 = h0.view;
  if (cell == Cell::lstm) p.c0 = c0.view;
  p.lengths.kind = Array::Kind::array;
  p.lengths.dtype = DType::int64;
  p.lengths.rank = 1;
  p.lengths.shape[0] = batch;
  p.lengths.stride[0] = sizeof(std::int64_t);
  p.lengths.data = reinterpret_cast<char*>(lengths.get());
  p.weights[0] = {w_input.view, w_hidden.view, b_input.view, b_hidden.view};
  p.reverse = reverse;
  if (!CHECK(!p.check())) return;
  p.out = out.view;
  p.h_n = h_n.view;
  p.c_n = c_n.view;
  cpu::recurrent(p);

  const double near = (sizeof(T) == 4 ? 0x1p-23 : 0x1p-52) * 40 * static_cast<double>(8 + hidden + features);
  std::vector<double> h(static_cast<std::size_t>(hidden)), c(h), a(static_cast<std::size_t>(rows)), s(a);
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t end = lengths[static_cast<std::size_t>(b)];
    for (std::int64_t j = 0; j < hidden; ++j) {
      h[static_cast<std::size_t>(j)] = h0(0, b, j);
      c[static_cast<std::size_t>(j)] = c0(0, b, j);
    }
    for (std::int64_t step = 0; step < end; ++step) {
      const std::int64_t t = reverse ? end - 1 - step : step;
      for (std::int64_t r = 0; r < rows; ++r) {
        double from_x = b_input(r), from_h = b_hidden(r);
        for (std::int64_t k = 0; k < features; ++k) from_x += w_input(r, k) * x(b, t, k);
        for (std::int64_t k = 0; k < hidden; ++k) from_h += w_hidden(r, k) * h[static_cast<std::size_t>(k)];
        a[static_cast<std::size_t>(r)] = from_x;
        s[static_cast<std::size_t>(r)] = from_h;
      }
      const auto gate = [&](std::int64_t g, std::int64_t j) { return static_cast<std::size_t>(g * hidden + j); };
      for (std::int64_t j = 0; j < hidden; ++j) {
        double& state = h[static_cast<std::size_t>(j)];
        double& kept = c[static_cast<std::size_t>(j)];
        const auto sum = [&](std::int64_t g) { return a[gate(g, j)] + s[gate(g, j)]; };
        if (cell == Cell::gru) {
          const double z = sigmoid(sum(1));
          state = (1 - z) * std::tanh(a[gate(2, j)] + sigmoid(sum(0)) * s[gate(2, j)]) + z * state;
        } else {
          kept = sigmoid(sum(1)) * kept + sigmoid(sum(0)) * std::tanh(sum(2));
          state = sigmoid(sum(3)) * std::tanh(kept);
        }
        CHECK(std::abs(out(b, t, j) - state) <= near);
      }
    }
    for (std::int64_t j = 0; j < hidden; ++j) {
      CHECK(std::abs(h_n(0, b, j) - h[static_cast<std::size_t>(j)]) <= near);
      if (cell == Cell::lstm) CHECK(std::abs(c_n(0, b, j) - c[static_cast<std::size_t>(j)]) <= near);
      for (std::int64_t t = end; t < length; ++t) CHECK(out(b, t, j) == 0);
    }
  }
}

}  // namespace

void test_recurrent() {
  for (const Cell cell : {Cell::gru, Cell::lstm})
    for (const bool reverse : {false, true}) {
      for (const std::int64_t hidden : {1, 7, 8, 15, 16, 17, 33, 131}) {
        test_layer<float>(cell, 5, 4, 3, hidden, reverse);
        test_layer<double>(cell, 5, 4, 3, hidden, reverse);
      }
      for (const std::int64_t batch : {1, 2, 3, 8, 9, 70}) test_layer<float>(cell, batch, 11, 50, 20, reverse);
    }
}

}  // namespace regard::test
