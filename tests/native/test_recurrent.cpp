// Recurrent layers against their equations in double, every array in a heap block of exactly its size: under
// AddressSanitizer a read or write past an end is an error.

#include <vector>

#include "arrays.h"
#include "check.h"
#include "cpu/operations.h"

namespace regard::test {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

template <class T>
void test_layer(Cell cell, std::int64_t batch, std::int64_t length, std::int64_t features, std::int64_t hidden, bool reverse) {
  Random random(static_cast<std::uint64_t>(batch * 1000 + hidden));
  const std::int64_t rows = gates_of(cell) * hidden;
  constexpr DType type = dtype_of<T>();
  const Owned x = make(type, {batch, length, features}, random);
  const Owned h0 = make(type, {1, batch, hidden}, random), c0 = make(type, {1, batch, hidden}, random);
  const Owned w_input = make(type, {rows, features}, random), w_hidden = make(type, {rows, hidden}, random);
  const Owned b_input = make(type, {rows}, random), b_hidden = make(type, {rows}, random);
  const Owned out = make(type, {batch, length, hidden}, random);
  const Owned h_n = make(type, {1, batch, hidden}, random), c_n = make(type, {1, batch, hidden}, random);
  std::vector<std::int64_t> lengths(static_cast<std::size_t>(batch));
  for (std::int64_t b = 0; b < batch; ++b) lengths[static_cast<std::size_t>(b)] = (b * 7 + 3) % (length + 1);

  RecurrentProblem p;
  p.cell = cell;
  p.x = x.view;
  p.h0 = h0.view;
  if (cell == Cell::lstm) p.c0 = c0.view;
  p.lengths = view_of(lengths, DType::int64, {batch});
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
      h[static_cast<std::size_t>(j)] = value_at(h0.view, 0, b, j);
      c[static_cast<std::size_t>(j)] = value_at(c0.view, 0, b, j);
    }
    for (std::int64_t step = 0; step < end; ++step) {
      const std::int64_t t = reverse ? end - 1 - step : step;
      for (std::int64_t r = 0; r < rows; ++r) {
        double from_x = value_at(b_input.view, r), from_h = value_at(b_hidden.view, r);
        for (std::int64_t k = 0; k < features; ++k) from_x += value_at(w_input.view, r, k) * value_at(x.view, b, t, k);
        for (std::int64_t k = 0; k < hidden; ++k) from_h += value_at(w_hidden.view, r, k) * h[static_cast<std::size_t>(k)];
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
        CHECK(std::abs(value_at(out.view, b, t, j) - state) <= near);
      }
    }
    for (std::int64_t j = 0; j < hidden; ++j) {
      CHECK(std::abs(value_at(h_n.view, 0, b, j) - h[static_cast<std::size_t>(j)]) <= near);
      if (cell == Cell::lstm) CHECK(std::abs(value_at(c_n.view, 0, b, j) - c[static_cast<std::size_t>(j)]) <= near);
      for (std::int64_t t = end; t < length; ++t) CHECK(value_at(out.view, b, t, j) == 0);
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
