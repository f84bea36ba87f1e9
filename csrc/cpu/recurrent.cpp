// Gated recurrent units and long short-term memory: one layer over all steps of a batch.
//
//   pack the weights, where they are not
//   for each chunk of steps, so that the input products stay in cache:
//     input products of its steps, all at once                      (parallel: linear)
//     for each item: some sequences in one direction                (parallel; nothing is shared between them)
//       for each step
//         for each block of hidden units
//           sums = h W_hidden^T, all gates of these units           (the tile engine)
//           gates, new state
//         out = state, rounded
//
// Sequences are dealt to the items by falling length, so that those still running are the first of each item. Where
// there are fewer items than threads and a step is long, threads share each step's blocks of units instead.
// The state stays in the compute type from step to step: 16-bit outputs are rounded once.
// A state is a sum of chains over the depth plus its gates' arithmetic, whatever rows it is computed beside: how the work
// is cut, and by how many threads, cannot change its bits.
//
// Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), in the form of cuDNN and PyTorch, with
// the reset after the product; Hochreiter & Schmidhuber, "Long Short-Term Memory" (1997), with forget gates (Gers 2000).

#include <algorithm>
#include <memory>
#include <numeric>
#include <vector>

#include "core/recurrent_problem.h"
#include "cpu/math.h"
#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/projection.h"
#include "cpu/strided.h"
#include "cpu/tile_simd.h"

namespace regard::cpu {
namespace {

// Steps of one accumulation chain.
constexpr int kRecurrentChain = 32;
constexpr std::int64_t kChunkBytes = std::int64_t{1} << 20;  // input products held at a time, for each direction
constexpr std::int64_t kChunkRows = 64;                      // but enough rows for linear to use its weights well
constexpr std::int64_t kMostRows = 64;                       // sequences an item
constexpr std::int64_t kFewRows = 4;                         // a step of fewer takes as long: it waits for the weights

template <class T> void pack(const PackRecurrentProblem& p) {
  constexpr std::int64_t units = units_per_block(dtype_of<T>());
  const std::int64_t hidden = p.hidden();
  const std::int64_t gates = gates_of(p.cell);
  const std::int64_t group = gates_per_group(p.cell);
  const std::int64_t row = group * units;
  const double work = static_cast<double>(gates * hidden) * static_cast<double>(hidden);
  parallel_for(unit_blocks(hidden, dtype_of<T>()), work, [&](std::int64_t block) {
    Scratch scratch;
    const std::int64_t length = row_length<T>(hidden);
    const auto at = scratch.template reserve<T>(units * length);
    scratch.acquire();
    T* const rows = scratch.template at<T>(at);
    const int n = static_cast<int>(std::min(units, hidden - block * units));
    for (std::int64_t g = 0; g < gates; ++g) {
      T* const to = reinterpret_cast<T*>(p.packed.data) + (block * (gates / group) + g / group) * (hidden + 1) * row + g % group * units;
      const std::int64_t first = g * hidden + block * units;
      for (int r = 0; r < n; ++r) read_row(p.w_hidden.dtype, p.w_hidden.at(first + r), p.w_hidden.stride[1], hidden, rows + r * length);
      transpose_padded(rows, length, n, static_cast<int>(hidden), to, row, static_cast<int>(units));
      T* const bias = to + hidden * row;
      std::fill_n(bias, units, T(0));
      if (p.b_hidden.present()) read_row(p.b_hidden.dtype, p.b_hidden.at(first), p.b_hidden.stride[0], n, bias);
    }
  });
}

// The sigmoid for gates: absolute errors of an epsilon count, the relative ones of its tail do not. So the argument may be
// clamped to where e^-x and the denominator's reciprocal are normal numbers; NaN stays.
template <class V> V gate(V x) {
  using T = LaneOf<V>;
  constexpr T most = sizeof(T) == 4 ? T(86) : T(700);
  return reciprocal(1 + exp_normal(-min(broadcast<V>(most), max(broadcast<V>(-most), x))));
}

// tanh, as in math.h, but with the cheaper exponential: from 20 on it is 1 to rounding.
template <class V> V squash(V x) {
  using T = LaneOf<V>;
  if constexpr (sizeof(T) == 8) {
    return tanh(x);
  } else {
    const V a = min(broadcast<V>(20), abs(x));
    const V large = fma(reciprocal(1 + exp_normal(a + a)), broadcast<V>(-2), broadcast<V>(1));
    const V y = a < T(0.625) ? tanh_small(a) : large;
    return x < 0 ? -y : y;
  }
}

// sums [rows][sums_row] = h W for one group of gates of a block of units: any number of rows, `Vectors` vectors of columns.
template <class T, int Vectors>
void multiply_columns(const T* h, std::int64_t h_row, const T* w, std::int64_t w_row, T* sums, std::int64_t sums_row, std::int64_t rows,
                      int depth) {
  constexpr int kRows = Tile<T>::kRows;
  const auto tile = [&]<int Rows>(std::int64_t r) {
    detail::multiply_tile<T, Rows, Vectors, Left::depth_contiguous, kRecurrentChain>(h + r * h_row, h_row, w, w_row, sums + r * sums_row,
                                                                                     sums_row, depth, nullptr);
  };
  std::int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) tile.template operator()<kRows>(r);
  // Reading w costs more than the arithmetic of a few rows: those that are not there are left out.
  switch (rows - r) {
    case 0: return;
    case 1: return tile.template operator()<1>(r);
    case 2: return tile.template operator()<2>(r);
    case 3:
    case 4: return tile.template operator()<4>(r);
    default: return tile.template operator()<kRows>(r);
  }
}

template <class T> class Recurrent {
  using V = Vec<T>;
  static constexpr int kW = kWidth<T>;
  static constexpr std::int64_t kUnits = units_per_block(dtype_of<T>());
  static constexpr std::int64_t kRows = Tile<T>::kRows;

 public:
  explicit Recurrent(const RecurrentProblem& problem) : p_(problem) {
    hidden_ = p_.hidden();
    blocks_ = unit_blocks(hidden_, dtype_of<T>());
    columns_ = p_.gates() * kUnits;
    group_columns_ = gates_per_group(p_.cell) * kUnits;
    products_row_ = p_.gates() * hidden_ + kUnits;  // the last block's vectors reach beyond the last gate
    state_row_ = row_length<T>(blocks_ * kUnits);
    step_work_ = static_cast<double>(std::max(p_.batch(), kFewRows) * p_.directions) * static_cast<double>(p_.gates() * hidden_) *
                 static_cast<double>(hidden_ + 32);
    plan();
  }

  void run() {
    if (p_.batch() == 0 || hidden_ == 0) return;
    prepare_states();
    const std::int64_t bytes = p_.batch() * products_row_ * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t most =
        std::clamp<std::int64_t>(std::max(kChunkBytes / bytes, divide_up(kChunkRows, p_.batch())), 1, std::max<std::int64_t>(1, longest_));
    for (int d = 0; d < p_.directions; ++d) products_[d] = Shared<T>(most * p_.batch() * products_row_);
    for (std::int64_t s0 = 0; s0 < longest_; s0 += most) {
      const std::int64_t steps = std::min(most, longest_ - s0);
      for (int d = 0; d < p_.directions; ++d) project(d, s0, steps);
      run_steps(s0, steps);
    }
    finish();
  }

 private:
  struct Item {
    int direction = 0;
    std::vector<std::int64_t> sequences;  // by falling length
    Shared<T> states;                     // [2][rows][state_row]: before and after a step
    Shared<T> cells;                      // [rows][state_row], lstm only
    std::int64_t rows = 0;                // with those that fill the last tile
    T* state(std::int64_t step, std::int64_t row) const { return states.get() + (step % 2) * rows * row; }
  };

  void plan() {
    std::vector<std::int64_t> order(static_cast<std::size_t>(p_.batch()));
    std::iota(order.begin(), order.end(), std::int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return p_.end_of(a) > p_.end_of(b); });
    longest_ = p_.batch() > 0 ? p_.end_of(order[0]) : 0;
    const std::int64_t threads = get_num_threads();
    // Fewer rows than a tile's would read the weights as often for less.
    const std::int64_t useful = std::max<std::int64_t>(1, p_.batch() / kRows);
    const std::int64_t deals = std::max(divide_up(p_.batch(), kMostRows), std::min(useful, divide_up(threads, p_.directions)));
    items_.resize(static_cast<std::size_t>(p_.batch() > 0 ? deals * p_.directions : 0));
    for (std::size_t i = 0; i < items_.size(); ++i) {
      Item& item = items_[i];
      item.direction = static_cast<int>(i) % p_.directions;
      for (std::int64_t k = static_cast<std::int64_t>(i) / p_.directions; k < p_.batch(); k += deals)
        item.sequences.push_back(order[static_cast<std::size_t>(k)]);
      item.rows = round_up(static_cast<std::int64_t>(item.sequences.size()), kRows);
    }
    const std::int64_t items = static_cast<std::int64_t>(items_.size());
    shares_ = items > 0 && items < threads && step_work_ >= kWorkWorthThreads ? std::min(blocks_, divide_up(threads, items)) : 1;
  }

  // Fills `rows` of states or cells with what `from` [directions, batch, hidden] has, or zeros.
  void read_states(const Item& item, const Array& from, T* to) const {
    std::fill_n(to, item.rows * state_row_, T(0));
    if (!from.present()) return;
    for (std::size_t r = 0; r < item.sequences.size(); ++r)
      read_row(from.dtype, from.at(item.direction, item.sequences[r]), from.stride[2], hidden_,
               to + static_cast<std::int64_t>(r) * state_row_);
  }

  void prepare_states() {
    for (Item& item : items_) {
      item.states = Shared<T>(2 * item.rows * state_row_);
      read_states(item, p_.h0, item.state(0, state_row_));
      std::copy_n(item.states.get(), item.rows * state_row_, item.state(1, state_row_));
      if (p_.cell != Cell::lstm) continue;
      item.cells = Shared<T>(item.rows * state_row_);
      read_states(item, p_.c0, item.cells.get());
    }
  }

  std::int64_t time_of(int direction, std::int64_t step) const { return p_.backwards(direction) ? longest_ - 1 - step : step; }

  // products [step][batch][gates hidden] = x W_input^T + b_input for the chunk's steps, in time's order.
  void project(int d, std::int64_t s0, std::int64_t steps) const {
    LinearProblem q;
    q.x = p_.x;
    q.x.swap_axes(0, 1);
    q.x.data += std::min(time_of(d, s0), time_of(d, s0 + steps - 1)) * q.x.stride[0];
    q.x.shape[0] = steps;
    q.weight = p_.weights[d].w_input;
    q.packed = true;
    q.packed_out_features = p_.gates() * hidden_;
    q.out = q.x;
    q.out.data = reinterpret_cast<char*>(products_[d].get());
    q.out.dtype = dtype_of<T>();
    q.out.shape[2] = q.packed_out_features;
    q.out.stride[2] = sizeof(T);
    q.out.stride[1] = products_row_ * q.out.stride[2];
    q.out.stride[0] = p_.batch() * q.out.stride[1];
    linear(q);
  }

  void run_steps(std::int64_t s0, std::int64_t steps) {
    const std::int64_t items = static_cast<std::int64_t>(items_.size());
    if (shares_ == 1) {
      parallel_for(items, step_work_ * static_cast<double>(steps), [&](std::int64_t i) {
        for (std::int64_t k = 0; k < steps && !stop_requested(); ++k)
          step(items_[static_cast<std::size_t>(i)], s0 + k, s0, steps, 0, blocks_);
      });
      return;
    }
    for (std::int64_t k = 0; k < steps; ++k)
      parallel_for(items * shares_, step_work_, [&](std::int64_t i) {
        const std::int64_t share = i % shares_;
        step(items_[static_cast<std::size_t>(i / shares_)], s0 + k, s0, steps, share * blocks_ / shares_, (share + 1) * blocks_ / shares_);
      });
  }

  // One step of an item's sequences, for the hidden units of blocks first..last.
  void step(const Item& item, std::int64_t s, std::int64_t s0, std::int64_t steps, std::int64_t first, std::int64_t last) const {
    const std::int64_t t = time_of(item.direction, s);
    std::int64_t rows = 0;  // still, or already, running
    while (rows < static_cast<std::int64_t>(item.sequences.size()) && p_.end_of(item.sequences[static_cast<std::size_t>(rows)]) > t) ++rows;
    if (rows == 0) return;
    const T* const before = item.state(s, state_row_);
    T* const after = item.state(s + 1, state_row_);
    const std::int64_t in_chunk = p_.backwards(item.direction) ? steps - 1 - (s - s0) : s - s0;
    const T* const products = products_[item.direction].get() + in_chunk * p_.batch() * products_row_;
    Scratch scratch;
    const auto sums_at = scratch.template reserve<T>(item.rows * columns_);
    scratch.acquire();
    T* const sums = scratch.template at<T>(sums_at);
    const std::int64_t groups = columns_ / group_columns_;
    for (std::int64_t block = first; block < last; ++block) {
      // All groups of the block: each is its weights and then its biases.
      const std::int64_t group = (hidden_ + 1) * group_columns_;
      const T* const w = reinterpret_cast<const T*>(p_.weights[item.direction].w_hidden.data) + block * groups * group;
      T bias[4 * kUnits];
      for (std::int64_t g = 0; g < groups; ++g) {
        multiply_group(before, w + g * group, sums + g * group_columns_, rows);
        std::copy_n(w + (g + 1) * group - group_columns_, group_columns_, bias + g * group_columns_);
      }
      for (std::int64_t r = 0; r < rows; ++r) {
        const T* const input = products + item.sequences[static_cast<std::size_t>(r)] * products_row_ + block * kUnits;
        const std::int64_t at = r * state_row_ + block * kUnits;
        if (p_.cell == Cell::gru)
          gru(input, sums + r * columns_, bias, before + at, after + at);
        else
          lstm(input, sums + r * columns_, bias, item.cells.get() + at, after + at);
      }
    }
    const std::int64_t n0 = first * kUnits;
    const std::int64_t n = std::min(last * kUnits, hidden_) - n0;
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t b = item.sequences[static_cast<std::size_t>(r)];
      write_row(p_.out.dtype, p_.out.at(b, t, item.direction * hidden_ + n0), p_.out.stride[2], n, after + r * state_row_ + n0);
      if (t != (p_.backwards(item.direction) ? 0 : p_.end_of(b) - 1)) continue;
      write_row(p_.h_n.dtype, p_.h_n.at(item.direction, b, n0), p_.h_n.stride[2], n, after + r * state_row_ + n0);
      if (p_.cell == Cell::lstm)
        write_row(p_.c_n.dtype, p_.c_n.at(item.direction, b, n0), p_.c_n.stride[2], n, item.cells.get() + r * state_row_ + n0);
    }
  }

  void multiply_group(const T* h, const T* w, T* sums, std::int64_t rows) const {
    const int vectors = static_cast<int>(group_columns_ / kW);
    const int calls = (vectors + Tile<T>::kVectors - 1) / Tile<T>::kVectors;
    const int depth = static_cast<int>(hidden_);
    for (int c = 0, v = 0; c < calls; ++c) {
      const int n = (vectors - v + calls - c - 1) / (calls - c);
      const auto multiply = [&]<int Vectors>() {
        multiply_columns<T, Vectors>(h, state_row_, w + v * kW, group_columns_, sums + v * kW, columns_, rows, depth);
      };
      if (n == 1) multiply.template operator()<1>();
      if (n == 2) multiply.template operator()<2>();
      if constexpr (Tile<T>::kVectors == 3)
        if (n == 3) multiply.template operator()<3>();
      v += n;
    }
  }

  void gru(const T* input, const T* sums, const T* bias, const T* before, T* after) const {
    for (std::int64_t u = 0; u < kUnits; u += kW) {
      const auto from_input = [&](int gate) { return load<V>(input + gate * hidden_ + u); };
      const auto from_state = [&](int gate) { return load<V>(sums + gate * kUnits + u) + load<V>(bias + gate * kUnits + u); };
      const V r = gate(from_input(0) + from_state(0));
      const V z = gate(from_input(1) + from_state(1));
      const V n = squash(fma(r, from_state(2), from_input(2)));
      store(after + u, fma(z, load<V>(before + u) - n, n));
    }
  }

  void lstm(const T* input, const T* sums, const T* bias, T* cell, T* after) const {
    for (std::int64_t u = 0; u < kUnits; u += kW) {
      const auto sum = [&](int g) {
        return load<V>(input + g * hidden_ + u) + (load<V>(sums + g * kUnits + u) + load<V>(bias + g * kUnits + u));
      };
      const V c = fma(gate(sum(1)), load<V>(cell + u), gate(sum(0)) * squash(sum(2)));
      store(cell + u, c);
      store(after + u, gate(sum(3)) * squash(c));
    }
  }

  // Zeros behind the sequences' ends; the states of those without a step.
  void finish() const {
    const std::int64_t width = p_.directions * hidden_;
    std::vector<T> zeros(static_cast<std::size_t>(width));
    parallel_for(p_.batch(), static_cast<double>(p_.batch() * p_.len()) * static_cast<double>(width) / 8, [&](std::int64_t b) {
      for (std::int64_t t = p_.end_of(b); t < p_.len(); ++t)
        write_row(p_.out.dtype, p_.out.at(b, t), p_.out.stride[2], width, zeros.data());
    });
    for (const Item& item : items_)
      for (std::size_t i = item.sequences.size(); i-- > 0 && p_.end_of(item.sequences[i]) == 0;) {
        const std::int64_t at = static_cast<std::int64_t>(i) * state_row_;
        write_row(p_.h_n.dtype, p_.h_n.at(item.direction, item.sequences[i]), p_.h_n.stride[2], hidden_, item.states.get() + at);
        if (p_.cell == Cell::lstm)
          write_row(p_.c_n.dtype, p_.c_n.at(item.direction, item.sequences[i]), p_.c_n.stride[2], hidden_, item.cells.get() + at);
      }
  }

  const RecurrentProblem& p_;
  std::int64_t hidden_, blocks_, columns_, group_columns_, products_row_, state_row_;
  std::int64_t longest_ = 0;
  std::int64_t shares_ = 1;  // of a step
  double step_work_;
  std::vector<Item> items_;
  Shared<T> products_[2];  // [step][batch][products_row]
};

}  // namespace

void pack_recurrent(const PackRecurrentProblem& problem) {
  with_compute(problem.w_hidden.dtype, [&](auto t) { pack<decltype(t)>(problem); });
}

void recurrent(const RecurrentProblem& problem) {
  with_compute(problem.x.dtype, [&](auto t) {
    using T = decltype(t);
    if (problem.packed) return Recurrent<T>(problem).run();
    RecurrentProblem q = problem;
    q.packed = true;
    q.packed_hidden = problem.hidden();
    Shared<T> memory[2][2];
    for (int d = 0; d < problem.directions; ++d) {
      RecurrentProblem::Weights& w = q.weights[d];
      PackProblem input{w.w_input, w.b_input, packed_array(w.w_input.shape[0], w.w_input.shape[1], dtype_of<T>())};
      PackRecurrentProblem hidden{problem.cell, w.w_hidden, w.b_hidden, packed_recurrent_array(problem.cell, q.hidden(), dtype_of<T>())};
      memory[d][0] = Shared<T>(input.packed.size());
      memory[d][1] = Shared<T>(hidden.packed.size());
      input.packed.data = reinterpret_cast<char*>(memory[d][0].get());
      hidden.packed.data = reinterpret_cast<char*>(memory[d][1].get());
      pack_linear(input);
      pack<T>(hidden);
      w = {input.packed, hidden.packed, {}, {}};
    }
    Recurrent<T>(q).run();
  });
}

}  // namespace regard::cpu
