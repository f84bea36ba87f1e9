// Rotary position embedding: out = each pair of x turned by the angle of its token and place.
//
//   for each item: some tokens of a sequence                          (parallel)
//     their cosines and sines as compute values
//     for each head, for each token: the row turned, the rest of it copied
//
// Su et al., "RoFormer: Enhanced transformer with rotary position embedding" (2021).

#include <algorithm>
#include <cstring>

#include "cpu/operations.h"
#include "cpu/parallel.h"
#include "cpu/rotate.h"

namespace regard::cpu {
namespace {

// Elements an item: some 10 us of work, well above the cost of claiming one.
constexpr std::int64_t kElementsPerItem = 1 << 15;

template <class T> class Rotary {
 public:
  explicit Rotary(const RotaryProblem& problem) : p_(problem) {
    const std::int64_t token = std::max<std::int64_t>(1, p_.heads() * p_.dim());
    tokens_ = std::clamp<std::int64_t>(kElementsPerItem / token, 1, std::max<std::int64_t>(1, p_.len()));
    blocks_ = (p_.len() + tokens_ - 1) / tokens_;
  }

  void run() {
    if (p_.x.size() == 0) return;
    parallel_for(p_.batch() * blocks_, static_cast<double>(p_.x.size()) * 2, Rehearse::scratch, [this](std::int64_t item) {
      const std::int64_t first = item % blocks_ * tokens_;
      run_item(item / blocks_, first, std::min(p_.len(), first + tokens_));
    });
  }

 private:
  void run_item(std::int64_t b, std::int64_t first, std::int64_t last) const {
    AngleRows<T> angles(p_.angles, p_.len(), last - first);
    const std::size_t row = angles.template reserve<T>(p_.dim());
    angles.read_tokens(b, first, last);
    with_storage<T>(p_.x.dtype, [&](auto s) {
      using S = decltype(s);
      constexpr auto size = static_cast<std::int64_t>(sizeof(S));
      const bool direct = p_.x.stride[3] == size && p_.out.stride[3] == size && angles.pairs() % kWidth<T> == 0;
      for (std::int64_t h = 0; h < p_.heads(); ++h)
        for (std::int64_t i = first; i < last; ++i) {
          const char* x = p_.x.at(b, h, i);
          char* out = p_.out.at(b, h, i);
          if (direct)
            turn<S>(angles, i - first, reinterpret_cast<const S*>(x), reinterpret_cast<S*>(out));
          else
            turn_copy(angles, i - first, x, out, angles.template at<T>(row));
        }
    });
  }

  // Where whole vectors lie in place.
  template <class S> void turn(const AngleRows<T>& angles, std::int64_t i, const S* x, S* out) const {
    const std::int64_t n = angles.pairs();
    if (p_.angles.interleaved)
      rotate_neighbours(x, out, angles.cos(i), angles.sin(i), n);
    else
      rotate_halves(x, x + n, out, out + n, angles.cos(i), angles.sin(i), n);
    if (p_.dim() > 2 * n && out != x) std::memcpy(out + 2 * n, x + 2 * n, static_cast<std::size_t>(p_.dim() - 2 * n) * sizeof(S));
  }

  void turn_copy(const AngleRows<T>& angles, std::int64_t i, const char* x, char* out, T* row) const {
    const std::int64_t turned = 2 * angles.pairs();
    const auto size = static_cast<std::size_t>(size_of(p_.x.dtype));
    read_row(p_.x.dtype, x, p_.x.stride[3], turned, row);
    angles.rotate(row, i);
    write_row(p_.out.dtype, out, p_.out.stride[3], turned, row);
    // What passes through keeps its bits.
    for (std::int64_t k = turned; k < p_.dim(); ++k) std::memcpy(out + k * p_.out.stride[3], x + k * p_.x.stride[3], size);
  }

  const RotaryProblem& p_;
  std::int64_t tokens_;  // of an item
  std::int64_t blocks_;  // of a sequence
};

}  // namespace

void rotary(const RotaryProblem& problem) {
  with_compute(problem.x.dtype, [&](auto t) { Rotary<decltype(t)>(problem).run(); });
}

}  // namespace regard::cpu
