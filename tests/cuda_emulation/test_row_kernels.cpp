// Kernels over rows against loops in double, on buffers of exact size, in order and in random order: a recurrent step, and
// projections of rows and of windows.
//
// The mutations of test_mutations.py are compiled into this program: it is small on purpose.

#include "cuda/project.cuh"
#include "cuda/recurrent.cuh"
#include "kernel_check.h"

namespace regard::test {
namespace {

void fill(Buffer<float>& x, Random& random) {
  for (std::size_t i = 0; i < x.bytes / sizeof(float); ++i) x.data()[i] = static_cast<float>(random.uniform(-1, 1));
}

View rows_view(const void* data, std::int64_t columns, std::int64_t rows = 1) {
  return {static_cast<char*>(const_cast<void*>(data)), {rows * columns * 4, columns * 4, 4, 4}};
}
View matrix_view(const void* data, std::int64_t columns) { return {static_cast<char*>(const_cast<void*>(data)), {columns * 4, 4, 0, 0}}; }

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Steps 0 and 1 of three, the second being behind the end of some sequences.
template <bool kLstm> void test_step(int batch, int hidden) {
  constexpr int kGates = static_cast<int>(gates_of(kLstm ? Cell::lstm : Cell::gru));
  constexpr int kSteps = 3;
  Random random(7);
  const std::int64_t states = static_cast<std::int64_t>(batch) * hidden;
  Buffer<float> w(static_cast<std::int64_t>(kGates) * hidden * hidden), bias(kGates * hidden), inputs(states * kGates * kSteps);
  Buffer<float> before(states), after(states), cells(states), out(states * kSteps);
  Buffer<std::int32_t> lengths(batch);
  for (Buffer<float>* x : {&w, &bias, &inputs, &before, &cells}) fill(*x, random);
  for (int b = 0; b < batch; ++b) lengths[b] = 1 + b % 2;
  RecurrentArguments a{};
  RecurrentDirection& own = a.direction[0];
  own.w_hidden = matrix_view(w.data(), hidden);
  own.b_hidden = {reinterpret_cast<char*>(bias.data()), {4, 0, 0, 0}};
  a.out = rows_view(out.data(), hidden, kSteps);
  a.lengths = {{reinterpret_cast<char*>(lengths.data()), {4, 0, 0, 0}}, false};
  own.inputs = inputs.data();
  a.before = before.data();
  a.after = after.data();
  a.cells = cells.data();
  a.batch = batch;
  a.len = a.inputs_len = kSteps;
  a.hidden = hidden;
  own.vectors = hidden % 4 == 0;
  const std::int64_t units = (hidden + kRecurrentUnits - 1) / kRecurrentUnits;
  const std::int64_t blocks = (batch + kRecurrentRows - 1) / kRecurrentRows * units;
  for (own.time = 0; own.time < 2; ++own.time) {
    std::vector<double> want(static_cast<std::size_t>(states)), want_cells(want);
    for (int b = 0; b < batch; ++b)
      for (int u = 0; u < hidden; ++u) {
        double x[kGates], s[kGates];
        for (int g = 0; g < kGates; ++g) {
          const std::int64_t row = g * hidden + u;
          x[g] = static_cast<double>(inputs[(static_cast<std::int64_t>(b) * kSteps + own.time) * kGates * hidden + row]);
          s[g] = static_cast<double>(bias[row]);
          for (int k = 0; k < hidden; ++k)
            s[g] += static_cast<double>(w[row * hidden + k]) * static_cast<double>(before[static_cast<std::int64_t>(b) * hidden + k]);
        }
        const auto at = static_cast<std::size_t>(static_cast<std::int64_t>(b) * hidden + u);
        const auto old = static_cast<double>(before.data()[at]);
        want_cells[at] = static_cast<double>(cells.data()[at]);
        if (own.time >= lengths[b]) {
          want[at] = old;
        } else if constexpr (!kLstm) {
          const double n = std::tanh(x[2] + sigmoid(x[0] + s[0]) * s[2]);
          want[at] = n + sigmoid(x[1] + s[1]) * (old - n);
        } else {
          want_cells[at] = sigmoid(x[1] + s[1]) * want_cells[at] + sigmoid(x[0] + s[0]) * std::tanh(x[2] + s[2]);
          want[at] = sigmoid(x[3] + s[3]) * std::tanh(want_cells[at]);
        }
      }
    const int bytes = kRecurrentRows * recurrent_pitch<float>(hidden) * 4;
    launch(recurrent_step<float, kLstm>, blocks, kRecurrentThreads, bytes, nullptr, a);
    bool ok = true;
    for (std::int64_t n = 0; n < states; ++n) {
      const auto at = static_cast<std::size_t>(n);
      const double made = own.time < lengths[n / hidden] ? want[at] : 0;
      ok = ok && std::abs(static_cast<double>(after[n]) - want[at]) < 1e-4;
      ok = ok && (!kLstm || std::abs(static_cast<double>(cells[n]) - want_cells[at]) < 1e-4);
      ok = ok && std::abs(static_cast<double>(out[(n / hidden * kSteps + own.time) * hidden + n % hidden]) - made) < 1e-4;
    }
    CHECK(ok);
    std::memcpy(before.data(), after.data(), before.bytes);
  }
}

void test_rows() {
  constexpr int kRows = 70, kIn = 37, kOut = 66;
  Random random(3);
  Buffer<float> x(kRows * kIn), w(kOut * kIn), bias(kOut), added(kRows * kOut), y(kRows * kOut);
  for (Buffer<float>* b : {&x, &w, &bias, &added}) fill(*b, random);
  ProjectArguments a{};
  a.x = rows_view(x.data(), kIn, kRows);
  a.weight = matrix_view(w.data(), kIn);
  a.bias = {reinterpret_cast<char*>(bias.data()), {4, 0, 0, 0}};
  a.added = rows_view(added.data(), kOut, kRows);
  a.to = y.data();
  a.rows = a.len = kRows;
  a.in = kIn;
  a.out = kOut;
  a.tiles = 2;
  a.sharing = a.width = 1;
  launch(project_rows<float>, 2 * a.tiles, kProjectThreads, static_cast<int>(sizeof(ProjectShared<float>)), nullptr, a);
  bool ok = true;
  for (int r = 0; r < kRows; ++r)
    for (int o = 0; o < kOut; ++o) {
      auto want = static_cast<double>(bias[o]) + static_cast<double>(added[r * kOut + o]);
      for (int k = 0; k < kIn; ++k) want += static_cast<double>(x[r * kIn + k]) * static_cast<double>(w[o * kIn + k]);
      ok = ok && std::abs(static_cast<double>(y[r * kOut + o]) - want) < 1e-4;
    }
  CHECK(ok);
}

// Two queries of one sequence, two channels, an even width: one element more lies behind a window's middle than before it.
void test_windows() {
  constexpr int kQueries = 2, kChannels = 2, kLen = 45, kFilters = 5, kWidth = 12, kLeft = (kWidth - 1) / 2;
  Random random(4);
  Buffer<float> x(kQueries * kChannels * kLen), taps(kFilters * kChannels * kWidth), y(kQueries * kLen * kFilters);
  for (Buffer<float>* b : {&x, &taps}) fill(*b, random);
  ProjectArguments a{};
  a.x = {reinterpret_cast<char*>(x.data()), {0, kChannels * kLen * 4, kLen * 4, 4}};
  a.weight = {reinterpret_cast<char*>(taps.data()), {kChannels * kWidth * 4, kWidth * 4, 4, 0}};
  a.to = y.data();
  a.rows = kQueries * kLen;
  a.len = kLen;
  a.in = kChannels * kWidth;
  a.out = kFilters;
  a.tiles = 1;
  a.sharing = kQueries;
  a.width = kWidth;
  a.left = kLeft;
  launch(project_rows<float, true>, 2, kProjectThreads, static_cast<int>(sizeof(ProjectShared<float>)), nullptr, a);
  bool ok = true;
  for (int i = 0; i < kQueries; ++i)
    for (int j = 0; j < kLen; ++j)
      for (int f = 0; f < kFilters; ++f) {
        double want = 0;
        for (int c = 0; c < kChannels; ++c)
          for (int t = 0; t < kWidth; ++t)
            if (const int at = j + t - kLeft; at >= 0 && at < kLen)
              want += static_cast<double>(x[(i * kChannels + c) * kLen + at]) * static_cast<double>(taps[(f * kChannels + c) * kWidth + t]);
        ok = ok && std::abs(static_cast<double>(y[(i * kLen + j) * kFilters + f]) - want) < 1e-4;
      }
  CHECK(ok);
}

}  // namespace

void test_row_kernels() {
  try {
    for (const bool random : {false, true}) {
      emulation::settings() = {random, 5};
      test_step<false>(9, 37);
      test_step<true>(9, 36);
      test_step<false>(1, kRecurrentDepth<float> + 4);
      test_rows();
      test_windows();
    }
  } catch (const emulation::Failure& f) {
    std::printf("%s\n", f.what());
    CHECK(false);
  }
  emulation::settings() = {};
}

}  // namespace regard::test
