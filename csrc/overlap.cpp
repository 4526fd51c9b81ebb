#include "overlap.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace rope {

namespace {

// NOTE [ Exact overlap ]
//
// Whether two strided sets of addresses meet is a knapsack problem in general, and PyTorch's own
// test answers "too hard" for views with gaps, such as q and k in one packed buffer. Two proofs of
// disjointness settle every view that people make: the address ranges are disjoint; or, for some
// period T (one of the strides), all larger steps are multiples of T and what is left of the two
// views falls into disjoint parts of a window of T bytes. Only where no proof is found are the
// bytes counted one by one.

struct Dim {
  std::int64_t size;
  std::int64_t stride;  // bytes
};

// The addresses of a tensor's elements, in bytes.
struct Footprint {
  std::int64_t begin;    // first byte
  std::int64_t element;  // bytes of one element
  std::vector<Dim> dims;

  // One past the last byte.
  std::int64_t end() const { return begin + extent(dims); }

  std::int64_t extent(const std::vector<Dim>& some) const {
    std::int64_t bytes = element;
    for (const Dim& dim : some) {
      bytes += (dim.size - 1) * dim.stride;
    }
    return bytes;
  }
};

// begin is the address of the storage, or 0 to count from there.
Footprint footprint(const at::Tensor& x, std::intptr_t begin) {
  Footprint result{0, x.element_size(), {}};
  result.begin = begin + x.storage_offset() * result.element;
  for (std::int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1) {
      result.dims.push_back({x.size(d), x.stride(d) * result.element});
    }
  }
  return result;
}

// Where the memory of a tensor begins: 0 for tensors without memory, such as meta tensors.
std::intptr_t storage_address(const at::Tensor& x) {
  return reinterpret_cast<std::intptr_t>(x.storage().data());
}

// Calls visit(first byte of an element) for every element until it returns false; says whether it
// never did.
template <typename Visit>
bool visit_elements(const Footprint& elements, std::int64_t begin, std::size_t depth,
                    const Visit& visit) {
  if (depth == elements.dims.size()) {
    return visit(begin);
  }
  const Dim& dim = elements.dims[depth];
  for (std::int64_t i = 0; i < dim.size; ++i) {
    if (!visit_elements(elements, begin + i * dim.stride, depth + 1, visit)) {
      return false;
    }
  }
  return true;
}

// Marks the bytes of each element in a map of [begin, begin + map.size()); false where one is
// marked already.
class Marker {
 public:
  Marker(std::int64_t begin, std::int64_t end) : begin_(begin), marked_(end - begin, false) {}

  bool is_free(std::int64_t first, std::int64_t bytes) const {
    const auto from = std::max<std::int64_t>(first - begin_, 0);
    const auto to = std::min<std::int64_t>(first - begin_ + bytes, std::ssize(marked_));
    for (std::int64_t byte = from; byte < to; ++byte) {
      if (marked_[byte]) {
        return false;
      }
    }
    return true;
  }

  void mark(std::int64_t first, std::int64_t bytes) {
    const auto from = std::max<std::int64_t>(first - begin_, 0);
    const auto to = std::min<std::int64_t>(first - begin_ + bytes, std::ssize(marked_));
    for (std::int64_t byte = from; byte < to; ++byte) {
      marked_[byte] = true;
    }
  }

 private:
  std::int64_t begin_;
  std::vector<bool> marked_;
};

// The bytes, counted from some multiple of the period, that the steps smaller than the period
// reach; no window where they reach further than one period or a larger step is no multiple of it.
struct Window {
  std::int64_t begin;
  std::int64_t end;
  bool exists;
};

Window window(const Footprint& elements, std::int64_t period) {
  std::vector<Dim> inner;
  for (const Dim& dim : elements.dims) {
    if (dim.stride % period != 0) {
      inner.push_back(dim);
    }
  }
  const std::int64_t begin = elements.begin % period;
  const std::int64_t extent = elements.extent(inner);
  return {begin, begin + extent, extent <= period};
}

bool disjoint_in_every_period(const Footprint& x, const Footprint& y, std::int64_t period) {
  const Window a = window(x, period);
  const Window b = window(y, period);
  if (!a.exists || !b.exists) {
    return false;
  }
  // A window may run over the end of its period into the next one.
  for (const std::int64_t shift : {-period, std::int64_t{0}, period}) {
    if (a.begin < b.end + shift && b.begin + shift < a.end) {
      return false;
    }
  }
  return true;
}

}  // namespace

bool overlaps_itself(const at::Tensor& x) {
  if (x.numel() < 2 || !x.has_storage() || x.is_non_overlapping_and_dense()) {
    return false;
  }
  Footprint elements = footprint(x, 0);
  std::sort(elements.dims.begin(), elements.dims.end(),
            [](const Dim& left, const Dim& right) { return left.stride < right.stride; });
  // Each step leads past everything that the smaller steps reach: nothing is reached twice.
  std::vector<Dim> smaller;
  bool steps_over = true;
  for (const Dim& dim : elements.dims) {
    if (dim.stride == 0) {
      return true;
    }
    steps_over = steps_over && dim.stride >= elements.extent(smaller);
    smaller.push_back(dim);
  }
  if (steps_over) {
    return false;
  }
  Marker marker(elements.begin, elements.end());
  return !visit_elements(elements, elements.begin, 0, [&](std::int64_t first) {
    const bool free = marker.is_free(first, elements.element);
    marker.mark(first, elements.element);
    return free;
  });
}

bool share_memory(const at::Tensor& x, const at::Tensor& y) {
  if (x.numel() == 0 || y.numel() == 0) {
    return false;
  }
  // Under a transform of torch.func, tensors have no storage: then identity is all there is to ask.
  if (x.is_same(y)) {
    return true;
  }
  if (!x.has_storage() || !y.has_storage()) {
    return false;
  }
  // Views of one storage are compared within it; others by address, where they have one.
  const bool same_storage = x.is_alias_of(y);
  if (!same_storage && (storage_address(x) == 0 || storage_address(y) == 0)) {
    return false;
  }
  const Footprint a = footprint(x, same_storage ? 0 : storage_address(x));
  const Footprint b = footprint(y, same_storage ? 0 : storage_address(y));
  const std::int64_t begin = std::max(a.begin, b.begin);
  const std::int64_t end = std::min(a.end(), b.end());
  if (begin >= end) {
    return false;
  }
  for (const Footprint* elements : {&a, &b}) {
    for (const Dim& dim : elements->dims) {
      if (dim.stride > 0 && disjoint_in_every_period(a, b, dim.stride)) {
        return false;
      }
    }
  }
  Marker marker(begin, end);
  visit_elements(a, a.begin, 0, [&](std::int64_t first) {
    marker.mark(first, a.element);
    return true;
  });
  return !visit_elements(b, b.begin, 0,
                         [&](std::int64_t first) { return marker.is_free(first, b.element); });
}

}  // namespace rope
