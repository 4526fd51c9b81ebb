#include "overlap.h"

#include <c10/util/SmallVector.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <cstdint>

namespace rope {

namespace {

// NOTE [ Overlap ]
//
// Two elements share memory where the difference of their addresses is less than an element. The
// difference is a sum of c * stride, with a bounded integer c for each dimension, so the question
// is a small integer program. It is searched from the largest stride down: what the smaller strides
// can still add bounds c, and for views people make that leaves one or two values of it. Views for
// which the search would take too long are taken for disjoint, as PyTorch takes those that it finds
// too hard (at::MemOverlap::TooHard).
constexpr int kMaxSteps = 1 << 14;

struct Term {
  std::int64_t stride;  // bytes, positive
  std::int64_t min;     // of c
  std::int64_t max;
};

using Terms = c10::SmallVector<Term, 8>;

void sort_by_stride(Terms& terms) {
  std::sort(terms.begin(), terms.end(),
            [](const Term& left, const Term& right) { return left.stride > right.stride; });
}

std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

class Search {
 public:
  // The terms, by decreasing stride.
  explicit Search(const Terms& terms) : terms_(terms), bounds_(terms.size() + 1) {
    for (auto i = std::ssize(terms) - 1; i >= 0; --i) {
      const Term& term = terms[i];
      bounds_[i] = {bounds_[i + 1].min + term.min * term.stride,
                    bounds_[i + 1].max + term.max * term.stride};
    }
  }

  // Whether the terms can sum to a number in [min, max].
  bool reaches(std::int64_t min, std::int64_t max) { return reaches(0, min, max); }

 private:
  struct Bounds {
    std::int64_t min = 0;
    std::int64_t max = 0;
  };

  bool reaches(std::size_t first, std::int64_t min, std::int64_t max) {
    if (first == terms_.size()) {
      return min <= 0 && 0 <= max;
    }
    const Term& term = terms_[first];
    const Bounds& rest = bounds_[first + 1];
    const std::int64_t begin = std::max(term.min, -floor_div(rest.max - min, term.stride));
    const std::int64_t end = std::min(term.max, floor_div(max - rest.min, term.stride));
    for (std::int64_t c = begin; c <= end && steps_ < kMaxSteps; ++c) {
      ++steps_;
      if (reaches(first + 1, min - c * term.stride, max - c * term.stride)) {
        return true;
      }
    }
    return false;
  }

  const Terms& terms_;
  c10::SmallVector<Bounds, 9> bounds_;  // of the sums of the terms from each on
  int steps_ = 0;
};

// Adds the dimensions of x: c is an index, or its negative.
void add_dims(Terms& terms, const at::Tensor& x, bool negative) {
  for (const auto d : c10::irange(x.dim())) {
    // The stride of a dimension of size 1 means nothing, and may be any number.
    if (x.size(d) == 1 || x.stride(d) == 0) {
      continue;
    }
    const std::int64_t stride = x.stride(d) * static_cast<std::int64_t>(x.element_size());
    const std::int64_t last = x.size(d) - 1;
    const auto same = std::find_if(terms.begin(), terms.end(),
                                   [=](const Term& term) { return term.stride == stride; });
    Term& term = same == terms.end() ? terms.emplace_back(Term{stride, 0, 0}) : *same;
    (negative ? term.min : term.max) += negative ? -last : last;
  }
}

}  // namespace

bool overlaps_itself(const at::Tensor& x) {
  if (x.numel() < 2 || !x.has_storage() || x.is_non_overlapping_and_dense()) {
    return false;
  }
  Terms dims;
  for (const auto d : c10::irange(x.dim())) {
    if (x.size(d) > 1 && x.stride(d) == 0) {
      return true;
    }
    if (x.size(d) > 1) {
      dims.push_back({x.stride(d), 1 - x.size(d), x.size(d) - 1});  // differences of two indices
    }
  }
  sort_by_stride(dims);
  // Of two different elements at one place, the first index that differs is the greater in one.
  for (const auto first : c10::irange(dims.size())) {
    Terms terms(dims.begin() + first, dims.end());
    terms[0].min = 1;
    if (Search(terms).reaches(0, 0)) {
      return true;
    }
  }
  return false;
}

bool overlap(const at::Tensor& x, const at::Tensor& y) {
  if (x.numel() == 0 || y.numel() == 0) {
    return false;
  }
  // Under a transform of torch.func tensors have no storage, and only identity is known.
  if (x.is_same(y)) {
    return true;
  }
  if (!x.has_storage() || !y.has_storage()) {
    return false;
  }
  const auto* x_storage = static_cast<const char*>(x.storage().data());
  const auto* y_storage = static_cast<const char*>(y.storage().data());
  const bool has_memory = x_storage != nullptr && y_storage != nullptr;
  if (!x.is_alias_of(y) && !has_memory) {
    return false;
  }
  const std::int64_t x_size = x.element_size();
  const std::int64_t y_size = y.element_size();
  const std::int64_t distance = (x.is_alias_of(y) ? 0 : x_storage - y_storage) +
                                x.storage_offset() * x_size - y.storage_offset() * y_size;
  Terms terms;
  add_dims(terms, x, /*negative=*/false);
  add_dims(terms, y, /*negative=*/true);
  sort_by_stride(terms);
  return Search(terms).reaches(1 - x_size - distance, y_size - 1 - distance);
}

}  // namespace rope
