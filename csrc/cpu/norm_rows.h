// What the norm kernel does with one row. Part of cpu/norm_kernel.cpp: compiled once for each CPU
// capability.
#pragma once

#include <cmath>
#include <tuple>

#include "cpu/angles.h"
#include "cpu/kernel.h"
#include "cpu/step.h"

namespace rope::cpu {

namespace {

// NOTE [ Gains ]
//
// A row is processed in steps (cpu/step.h): those before the rotated slice, in the slice, where
// each has two vectors of stored elements, and behind it. What multiplies or sums its elements,
// such as the weight, is laid out in the same order as the widened vectors of the steps, converted
// to the opmath type and padded with finite numbers. If the number of pairs is not a multiple of
// the step, the last step of the slice is shifted back and overlaps its predecessor, as in NOTE [
// Steps of a row ] in cpu/rows.h; a sum counts the elements of the overlap once. Without a weight
// the gains are ones.

// The steps of a row of the embedding axis.
template <typename scalar_t>
struct RowShape {
  using S = Step<scalar_t>;
  static constexpr std::int64_t kSize = S::kSize;

  std::int64_t size;    // of the axis
  std::int64_t before;  // elements outside the slice
  std::int64_t behind;
  std::int64_t num_pairs;
  bool interleaved;

  static ROPE_INLINE std::int64_t count_steps(std::int64_t elements) {
    return (elements + kSize - 1) / kSize;
  }

  ROPE_INLINE std::int64_t steps() const { return count_steps(num_pairs); }
  ROPE_INLINE bool is_short() const { return num_pairs < kSize; }
  ROPE_INLINE bool is_shifted() const { return num_pairs % kSize != 0 && !is_short(); }
  // The first pair of a step.
  ROPE_INLINE std::int64_t pair(std::int64_t step) const {
    return step == steps() - 1 && is_shifted() ? num_pairs - kSize : step * kSize;
  }
  // The first element of the two vectors of a step, in the row.
  ROPE_INLINE std::int64_t first(std::int64_t step) const {
    return before + (interleaved ? 2 : 1) * pair(step);
  }
  ROPE_INLINE std::int64_t second(std::int64_t step) const {
    return first(step) + (interleaved ? kSize : num_pairs);
  }
  // The elements of each vector of a short row.
  ROPE_INLINE std::int64_t num_first() const {
    return !interleaved ? num_pairs : 2 * num_pairs < kSize ? 2 * num_pairs : kSize;
  }
  ROPE_INLINE std::int64_t num_second() const { return 2 * num_pairs - num_first(); }

  // The slots of gains where each part begins.
  ROPE_INLINE std::int64_t slice_slot() const { return count_steps(before) * kSize; }
  ROPE_INLINE std::int64_t behind_slot() const { return slice_slot() + 2 * steps() * kSize; }

  // The slot of element i of a stored vector, among those of the vector.
  static ROPE_INLINE std::int64_t slot_in_vector(std::int64_t i) {
    return S::kDeinterleaved ? i / 2 + i % 2 * (kSize / 2) : i;
  }

  // Calls visit(element, slot, is_counted) for each slot that has an element of the row; is_counted
  // is false for the repeated elements of a shifted step.
  template <typename Visit>
  ROPE_INLINE void for_each_slot(const Visit& visit) const {
    for (std::int64_t i = 0; i < before; ++i) {
      visit(i, i / kSize * kSize + slot_in_vector(i % kSize), true);
    }
    for (std::int64_t step = 0; step < steps(); ++step) {
      for (int half = 0; half < 2; ++half) {
        const std::int64_t begin = half == 0 ? first(step) : second(step);
        const std::int64_t count = !is_short() ? kSize : half == 0 ? num_first() : num_second();
        for (std::int64_t i = 0; i < count; ++i) {
          const std::int64_t in_step = interleaved ? (half * kSize + i) / 2 : i;
          visit(begin + i, slice_slot() + (2 * step + half) * kSize + slot_in_vector(i),
                pair(step) + in_step >= step * kSize);
        }
      }
    }
    for (std::int64_t i = 0; i < behind; ++i) {
      visit(size - behind + i, behind_slot() + i / kSize * kSize + slot_in_vector(i % kSize), true);
    }
  }
};

// The same for rows of kSteps whole steps without elements outside the slice, as constants.
template <typename scalar_t, bool interleaved, int kSteps>
struct WholeShape {
  static constexpr std::int64_t kSize = Step<scalar_t>::kSize;
  static constexpr std::int64_t size = 2 * kSteps * kSize;
  static constexpr std::int64_t before = 0;
  static constexpr std::int64_t behind = 0;

  static constexpr std::int64_t steps() { return kSteps; }
  static constexpr bool is_short() { return false; }
  static constexpr bool is_shifted() { return false; }
  static constexpr std::int64_t first(std::int64_t step) {
    return (interleaved ? 2 : 1) * step * kSize;
  }
  static constexpr std::int64_t second(std::int64_t step) {
    return first(step) + (interleaved ? 1 : kSteps) * kSize;
  }
  static constexpr std::int64_t num_first() { return kSize; }
  static constexpr std::int64_t num_second() { return kSize; }
  static constexpr std::int64_t slice_slot() { return 0; }
  static constexpr std::int64_t behind_slot() { return 2 * kSteps * kSize; }
};

// The elements of a, then those of b, added in neighboring pairs.
template <typename Real>
ROPE_INLINE Vectorized<Real> add_neighbors(const Vectorized<Real>& a, const Vectorized<Real>& b) {
  const auto [even, odd] = at::vec::deinterleave2(a, b);
  return even + odd;
}

// The sum of the elements of each of as many vectors as one has elements. `vectors` is overwritten.
template <typename Real>
ROPE_INLINE Vectorized<Real> sums_of_each(Vectorized<Real> (&vectors)[Vectorized<Real>::size()]) {
  for (int count = Vectorized<Real>::size(); count > 1; count /= 2) {
    for (int i = 0; i < count / 2; ++i) {
      vectors[i] = add_neighbors(vectors[2 * i], vectors[2 * i + 1]);
    }
  }
  return vectors[0];
}

// The same sum of one vector, with the same bits.
template <typename Real>
ROPE_INLINE Real sum_of(const Vectorized<Real>& of) {
  Vectorized<Real> vector = of;
  for (int count = Vectorized<Real>::size(); count > 1; count /= 2) {
    vector = add_neighbors(vector, vector);
  }
  Real elements[Vectorized<Real>::size()];
  vector.store(elements);
  return elements[0];
}

// A sum of products, in lanes of the opmath type, several of which hide the latency of an addition.
// Those of every kChunk elements are added up in float64. The elements of a row go to the same
// lanes, in the same order, wherever it lies.
template <typename scalar_t>
class LaneSums {
 public:
  using S = Step<scalar_t>;
  using Vector = typename S::Vector;
  using Real = at::opmath_type<scalar_t>;
  static constexpr int kLanes = 4;
  static constexpr std::int64_t kChunk = 1024;

  // `lane` is a constant after unrolling.
  ROPE_INLINE void add_product(int lane, const Vector& a, const Vector& b) {
    lanes_[lane % kLanes] = fmadd(a, b, lanes_[lane % kLanes]);
  }

  // The squares of the index-th stored vector of a row, for constant indices that begin with 0.
  ROPE_INLINE void add_squares(int index, const typename S::Loaded& loaded) {
    Vector x[S::kVectors];
    S::widen(loaded, x);
    for (int v = 0; v < S::kVectors; ++v) {
      add_product(index * S::kVectors + v, x[v], x[v]);
    }
  }

  // After as many products.
  ROPE_INLINE void count(std::int64_t elements) {
    elements_ += elements;
    if (elements_ >= kChunk) [[unlikely]] {
      total_ = total();
      elements_ = 0;
      for (Vector& lane : lanes_) {
        lane = Vector(0);
      }
    }
  }

  // Whose elements add up to the sum, in rows of less than a chunk.
  ROPE_INLINE Vector vector() const { return (lanes_[0] + lanes_[1]) + (lanes_[2] + lanes_[3]); }
  ROPE_INLINE double total() const { return total_ + static_cast<double>(sum_of<Real>(vector())); }

 private:
  Vector lanes_[kLanes] = {Vector(0), Vector(0), Vector(0), Vector(0)};
  double total_ = 0;
  std::int64_t elements_ = 0;
};

// The sum of the squares of a row.
// Scalar math: sum += in[d] * in[d]
template <typename scalar_t>
ROPE_INLINE double sum_of_squares(const scalar_t* in, std::int64_t size) {
  using S = Step<scalar_t>;
  constexpr std::int64_t kSize = S::kSize;
  constexpr int kTogether = LaneSums<scalar_t>::kLanes;  // stored vectors
  LaneSums<scalar_t> sums;
  std::int64_t d = 0;
  for (; d + kTogether * kSize <= size; d += kTogether * kSize) {
    for (int i = 0; i < kTogether; ++i) {
      sums.add_squares(i, S::loaded(load_vector<typename S::Stored>(in + d + i * kSize)));
    }
    sums.count(kTogether * kSize);
  }
  for (int i = 0; i < kTogether - 1; ++i) {
    if (d + kSize <= size) {
      sums.add_squares(i, S::loaded(load_vector<typename S::Stored>(in + d)));
      d += kSize;
    }
  }
  if (d < size) {
    const auto bytes = static_cast<std::int64_t>((size - d) * sizeof(scalar_t));
    sums.add_squares(kTogether - 1, S::loaded(load_part<typename S::Stored>(in + d, bytes)));
  }
  return sums.total();
}

// The arrays of one row: each begins at element 0 of the embedding axis and is contiguous.
template <typename scalar_t>
struct NormRow {
  using Real = at::opmath_type<scalar_t>;
  const scalar_t* in;
  scalar_t* out;         // in gradients: of x, or null
  const scalar_t* grad;  // null in forward calls
  const Real* gains;
  Real* weight_grads;  // null: not wanted
};

// The angles of a token, and the lanes of a shifted step that count: see NOTE [ Gains ].
template <typename scalar_t>
struct TokenAngles {
  using Real = at::opmath_type<scalar_t>;
  const Real* cos;
  const Real* sin;
  std::int64_t half;
  const Real* counted;
};

// The vectors of one step of a row, widened: two of stored elements in the slice, one outside it.
template <typename scalar_t, int kStored>
struct Wide {
  using S = Step<scalar_t>;
  using Vector = typename S::Vector;
  static constexpr int kCount = kStored * S::kVectors;
  static constexpr std::int64_t kElements = kStored * S::kSize;
  Vector x[kCount];

  template <typename Real>
  static ROPE_INLINE Wide load(const Real* from) {
    Wide wide;
    for (int v = 0; v < kCount; ++v) {
      wide.x[v] = Vector::loadu(from + v * Vector::size());
    }
    return wide;
  }

  template <typename Real>
  ROPE_INLINE void store(Real* to) const {
    for (int v = 0; v < kCount; ++v) {
      x[v].store(to + v * Vector::size());
    }
  }

  ROPE_INLINE Wide operator*(const Wide& other) const {
    Wide product;
    for (int v = 0; v < kCount; ++v) {
      product.x[v] = x[v] * other.x[v];
    }
    return product;
  }

  ROPE_INLINE Wide operator*(const Vector& factor) const {
    Wide product;
    for (int v = 0; v < kCount; ++v) {
      product.x[v] = x[v] * factor;
    }
    return product;
  }
};

// Where a step is in a row: two vectors of stored elements in the slice, one outside it.
template <int kStored>
struct StepPlace {
  std::int64_t element[kStored];
  std::int64_t count[kStored];  // of elements; kSize unless `is_part`
  std::int64_t slot;            // of gains
  bool is_part;
};

// Steps that are no whole vectors, in functions of their own: they are rare, and long.
template <typename scalar_t, int kStored>
ROPE_LOOP void load_part_of_step(const scalar_t* row, const StepPlace<kStored>& place,
                                 Wide<scalar_t, kStored>& wide) {
  using S = Step<scalar_t>;
  for (int i = 0; i < kStored; ++i) {
    const auto bytes = static_cast<std::int64_t>(place.count[i] * sizeof(scalar_t));
    const auto stored = load_part<typename S::Stored>(row + place.element[i], bytes);
    S::widen(S::loaded(stored), wide.x + i * S::kVectors);
  }
}

template <typename scalar_t, int kStored>
ROPE_LOOP void store_part_of_step(const Wide<scalar_t, kStored>& wide, scalar_t* row,
                                  const StepPlace<kStored>& place) {
  using S = Step<scalar_t>;
  for (int i = 0; i < kStored; ++i) {
    const auto bytes = static_cast<std::int64_t>(place.count[i] * sizeof(scalar_t));
    store_part(S::narrow(wide.x + i * S::kVectors), row + place.element[i], bytes);
  }
}

template <typename scalar_t, int kStored>
ROPE_INLINE Wide<scalar_t, kStored> load_step(const scalar_t* row,
                                              const StepPlace<kStored>& place) {
  using S = Step<scalar_t>;
  Wide<scalar_t, kStored> wide;
  if (place.is_part) [[unlikely]] {
    Wide<scalar_t, kStored> part;  // Only what a function gets the address of lies in memory.
    load_part_of_step(row, place, part);
    return part;
  }
  for (int i = 0; i < kStored; ++i) {
    const auto stored = load_vector<typename S::Stored>(row + place.element[i]);
    S::widen(S::loaded(stored), wide.x + i * S::kVectors);
  }
  return wide;
}

template <typename scalar_t, int kStored>
ROPE_INLINE void store_step(const Wide<scalar_t, kStored>& wide, scalar_t* row,
                            const StepPlace<kStored>& place, bool streams) {
  using S = Step<scalar_t>;
  if (place.is_part) [[unlikely]] {
    const Wide<scalar_t, kStored> part = wide;
    store_part_of_step(part, row, place);
    return;
  }
  for (int i = 0; i < kStored; ++i) {
    store_vector(S::narrow(wide.x + i * S::kVectors), row + place.element[i], streams);
  }
}

// Calls outside(place) for each step outside the slice.
template <typename Shape, typename Outside>
ROPE_INLINE void for_each_step_outside(const Shape& shape, const Outside& outside) {
  constexpr std::int64_t kSize = Shape::kSize;
  for (int part = 0; part < 2; ++part) {
    const std::int64_t begin = part == 0 ? 0 : shape.size - shape.behind;
    const std::int64_t count = part == 0 ? shape.before : shape.behind;
    const std::int64_t slot = part == 0 ? 0 : shape.behind_slot();
    for (std::int64_t i = 0; i < count; i += kSize) {
      const std::int64_t left = count - i < kSize ? count - i : kSize;
      outside(StepPlace<1>{{begin + i}, {left}, slot + i, left < kSize});
    }
  }
}

template <typename Shape>
ROPE_INLINE StepPlace<2> place_of(const Shape& shape, std::int64_t step) {
  constexpr std::int64_t kSize = Shape::kSize;
  const bool is_part = shape.is_short();
  return {{shape.first(step), shape.second(step)},
          {is_part ? shape.num_first() : kSize, is_part ? shape.num_second() : kSize},
          shape.slice_slot() + 2 * step * kSize,
          is_part};
}

// Always of full width, which saves instantiations: with half = 0 both elements of a pair have the
// same angle.
template <typename scalar_t>
ROPE_INLINE StepAngles<scalar_t, /*full_width=*/true> load_angles(
    const TokenAngles<scalar_t>& angles, std::int64_t step) {
  const std::int64_t slot = step * Step<scalar_t>::kSize;
  return StepAngles<scalar_t, true>::load(angles.cos + slot, angles.sin + slot, angles.half);
}

// The rotation and the weight of a step in one, by which all rows with this weight are multiplied:
// gains of its elements multiply the columns of a rotation that follows the norm, and the rows of
// one before it.
// Scalar math: rotate(x, weighted(angle, gain)) = rotate(x * gain, angle)
//              norm_last:                         rotate(x, angle) * gain
template <bool interleaved, typename scalar_t>
ROPE_INLINE StepAngles<scalar_t, true> weighted(const StepAngles<scalar_t, true>& angles,
                                                const Wide<scalar_t, 2>& gain, bool norm_last) {
  using S = Step<scalar_t>;
  StepAngles<scalar_t, true> products;
  for (int v = 0; v < S::kVectors; ++v) {
    auto a = gain.x[interleaved ? 2 * v : v];
    auto b = gain.x[interleaved ? 2 * v + 1 : v + S::kVectors];
    if constexpr (interleaved && !S::kDeinterleaved) {
      std::tie(a, b) = at::vec::deinterleave2(a, b);
    }
    const auto& [of_a, of_b] = angles.vectors[v];
    products.vectors[v] = {{of_a.cos * a, of_a.sin * (norm_last ? a : b)},
                           {of_b.cos * b, of_b.sin * (norm_last ? b : a)}};
  }
  return products;
}

template <bool interleaved, typename scalar_t>
ROPE_INLINE StepAngles<scalar_t, true> load_weighted(const TokenAngles<scalar_t>& angles,
                                                     std::int64_t step,
                                                     const at::opmath_type<scalar_t>* gains,
                                                     bool norm_last) {
  return weighted<interleaved>(load_angles(angles, step), Wide<scalar_t, 2>::load(gains),
                               norm_last);
}

// Loads the last step of the slice if it is shifted: in place its predecessor, which it overlaps,
// is stored before its turn.
template <typename scalar_t>
ROPE_INLINE Wide<scalar_t, 2> load_shifted(const RowShape<scalar_t>& shape, const scalar_t* row) {
  return shape.is_shifted() ? load_step(row, place_of(shape, shape.steps() - 1))
                            : Wide<scalar_t, 2>();
}

// The factor of the repeated elements of a shifted step is 0.
template <typename scalar_t, typename Shape>
ROPE_INLINE Wide<scalar_t, 2> counted_once(const Wide<scalar_t, 2>& wide, const Shape& shape,
                                           std::int64_t step, const TokenAngles<scalar_t>& angles) {
  return shape.is_shifted() && step == shape.steps() - 1
             ? wide * Wide<scalar_t, 2>::load(angles.counted)
             : wide;
}

// ---- The forward call ----

// The sum of the squares of a rotated row.
template <bool interleaved, typename Shape, typename scalar_t>
ROPE_INLINE double sum_of_rotated_squares(const Shape& shape, const NormRow<scalar_t>& row,
                                          const TokenAngles<scalar_t>& angles) {
  LaneSums<scalar_t> sums;
  const auto add_squares = [&](const auto& wide) __attribute__((always_inline)) {
    for (int v = 0; v < wide.kCount; ++v) {
      sums.add_product(v, wide.x[v], wide.x[v]);
    }
    sums.count(wide.kElements);
  };
  for_each_step_outside(shape, [&](const StepPlace<1>& place) __attribute__((always_inline)) {
    add_squares(load_step(row.in, place));
  });
  for (std::int64_t step = 0; step < shape.steps(); ++step) {
    auto z = load_step(row.in, place_of(shape, step));
    rotate_vectors<interleaved, /*back=*/false>(z.x, load_angles(angles, step));
    add_squares(counted_once(z, shape, step, angles));
  }
  return sums.total();
}

// Scalar math: out = rotate(in * scale, weighted(angle, gain))
template <bool interleaved, typename scalar_t>
ROPE_INLINE void normalize_row(const RowShape<scalar_t>& shape, const NormRow<scalar_t>& row,
                               const TokenAngles<scalar_t>& angles, bool norm_last,
                               at::opmath_type<scalar_t> scale_of_row, bool streams) {
  using Vector = typename Step<scalar_t>::Vector;
  const Vector scale(scale_of_row);
  for_each_step_outside(shape, [&](const StepPlace<1>& place) __attribute__((always_inline)) {
    const auto gain = Wide<scalar_t, 1>::load(row.gains + place.slot);
    store_step(load_step(row.in, place) * scale * gain, row.out, place, streams);
  });
  const auto shifted = load_shifted(shape, row.in);
  const std::int64_t steps = shape.steps();
  for (std::int64_t step = 0; step < steps; ++step) {
    const auto place = place_of(shape, step);
    const auto rotation =
        load_weighted<interleaved>(angles, step, row.gains + place.slot, norm_last);
    auto x = shape.is_shifted() && step == steps - 1 ? shifted : load_step(row.in, place);
    x = x * scale;
    rotate_vectors<interleaved, /*back=*/false>(x.x, rotation);
    store_step(x, row.out, place, streams);
  }
}

// ---- The forward call on whole rows ----

// The rotations of the steps of a row, weighted or not.
template <typename scalar_t, int steps>
struct RowAngles {
  StepAngles<scalar_t, /*full_width=*/true> of_step[steps];

  static ROPE_INLINE RowAngles load(const TokenAngles<scalar_t>& angles) {
    RowAngles row;
    for (int i = 0; i < steps; ++i) {
      row.of_step[i] = load_angles(angles, i);
    }
    return row;
  }

  template <bool interleaved, typename Real>
  static ROPE_INLINE RowAngles load_weighted(const TokenAngles<scalar_t>& angles, const Real* gains,
                                             bool norm_last) {
    constexpr std::int64_t kSize = Step<scalar_t>::kSize;
    RowAngles row;
    for (int i = 0; i < steps; ++i) {
      row.of_step[i] = cpu::load_weighted<interleaved>(angles, i, gains + 2 * i * kSize, norm_last);
    }
    return row;
  }
};

// Rows of `steps` steps, without elements outside the slice, in registers. With the results of the
// functions above.
template <bool interleaved, int steps, typename scalar_t>
class WholeRow {
 public:
  using S = Step<scalar_t>;
  using Vector = typename S::Vector;
  using Real = at::opmath_type<scalar_t>;
  using Angles = RowAngles<scalar_t, steps>;
  using Shape = WholeShape<scalar_t, interleaved, steps>;
  static constexpr std::int64_t kSize = S::kSize;

  ROPE_INLINE explicit WholeRow(const scalar_t* in) {
    for (int i = 0; i < steps; ++i) {
      first_[i] = S::loaded(load_vector<typename S::Stored>(in + Shape::first(i)));
      second_[i] = S::loaded(load_vector<typename S::Stored>(in + Shape::second(i)));
    }
  }

  // A vector whose elements add up to the sum of squares.
  ROPE_INLINE Vector squares() const {
    static_assert(Shape::size < LaneSums<scalar_t>::kChunk);
    LaneSums<scalar_t> sums;
    for (int index = 0; index < 2 * steps; ++index) {  // in the order of the row
      sums.add_squares(index, interleaved ? index % 2 == 0 ? first_[index / 2] : second_[index / 2]
                              : index < steps ? first_[index]
                                              : second_[index - steps]);
    }
    return sums.vector();
  }

  // The same of the rotated row.
  ROPE_INLINE Vector rotated_squares(const Angles& angles) const {
    static_assert(Shape::size < LaneSums<scalar_t>::kChunk);
    LaneSums<scalar_t> sums;
    for (int i = 0; i < steps; ++i) {
      auto x = widened(i);
      rotate_vectors<interleaved, /*back=*/false>(x.x, angles.of_step[i]);
      for (int v = 0; v < x.kCount; ++v) {
        sums.add_product(v, x.x[v], x.x[v]);
      }
    }
    return sums.vector();
  }

  ROPE_INLINE void store(const Angles& weighted, Real scale_of_row, scalar_t* out,
                         bool streams) const {
    const Vector scale(scale_of_row);
    for (int i = 0; i < steps; ++i) {
      auto x = widened(i) * scale;
      rotate_vectors<interleaved, /*back=*/false>(x.x, weighted.of_step[i]);
      store_vector(S::narrow(x.x), out + Shape::first(i), streams);
      store_vector(S::narrow(x.x + S::kVectors), out + Shape::second(i), streams);
    }
  }

 private:
  ROPE_INLINE Wide<scalar_t, 2> widened(int i) const {
    Wide<scalar_t, 2> wide;
    S::widen(first_[i], wide.x);
    S::widen(second_[i], wide.x + S::kVectors);
    return wide;
  }

  typename S::Loaded first_[steps];
  typename S::Loaded second_[steps];
};

// ---- Gradients: see NOTE [ Norms ] in launch.h ----
//
// norm_last is a bool, or std::false_type where it is known.

// What is normalized, x or the rotated x, and the gradient of the weighted, t, for one step.
template <typename scalar_t, int kStored>
struct Normalized {
  Wide<scalar_t, kStored> x;
  Wide<scalar_t, kStored> t;
};

template <typename scalar_t>
ROPE_INLINE Normalized<scalar_t, 1> load_normalized(const NormRow<scalar_t>& row,
                                                    const StepPlace<1>& place) {
  return {load_step(row.in, place), load_step(row.grad, place)};
}

template <bool interleaved, typename scalar_t, typename NormLast>
ROPE_INLINE Normalized<scalar_t, 2> load_normalized(
    const NormRow<scalar_t>& row, const StepPlace<2>& place,
    const StepAngles<scalar_t, /*full_width=*/true>& angles, NormLast norm_last) {
  Normalized<scalar_t, 2> step{load_step(row.in, place), load_step(row.grad, place)};
  if (norm_last) {
    rotate_vectors<interleaved, /*back=*/false>(step.x.x, angles);
  } else {
    rotate_vectors<interleaved, /*back=*/true>(step.t.x, angles);
  }
  return step;
}

// The sum of the products that the mean in the gradient of x is of.
// Scalar math: sum += t * gain * x
template <bool interleaved, typename Shape, typename scalar_t, typename NormLast>
ROPE_INLINE double sum_of_products(const Shape& shape, const NormRow<scalar_t>& row,
                                   const TokenAngles<scalar_t>& angles, NormLast norm_last) {
  LaneSums<scalar_t> sums;
  const auto add_products = [&](const auto& weighted, const auto& x)
                                __attribute__((always_inline)) {
                                  for (int v = 0; v < x.kCount; ++v) {
                                    sums.add_product(v, weighted.x[v], x.x[v]);
                                  }
                                  sums.count(x.kElements);
                                };
  for_each_step_outside(shape, [&](const StepPlace<1>& place) __attribute__((always_inline)) {
    const auto step = load_normalized(row, place);
    add_products(step.t * Wide<scalar_t, 1>::load(row.gains + place.slot), step.x);
  });
  for (std::int64_t i = 0; i < shape.steps(); ++i) {
    const auto place = place_of(shape, i);
    const auto step = load_normalized<interleaved>(row, place, load_angles(angles, i), norm_last);
    const auto weighted = step.t * Wide<scalar_t, 2>::load(row.gains + place.slot);
    add_products(counted_once(weighted, shape, i, angles), step.x);
  }
  return sums.total();
}

// Adds to the gradient of the weight.
// Scalar math: weight_grads += t * (x * scale)
template <typename scalar_t, int kStored>
ROPE_INLINE void add_weight_grads(const Normalized<scalar_t, kStored>& step,
                                  const StepPlace<kStored>& place,
                                  const typename Step<scalar_t>::Vector& scale,
                                  at::opmath_type<scalar_t>* weight_grads) {
  auto sum = Wide<scalar_t, kStored>::load(weight_grads + place.slot);
  for (int v = 0; v < sum.kCount; ++v) {
    sum.x[v] = fmadd(step.t.x[v], step.x.x[v] * scale, sum.x[v]);
  }
  sum.store(weight_grads + place.slot);
}

// Scalar math: d = scale * (t * gain - x * correction)
template <typename scalar_t, int kStored>
ROPE_INLINE Wide<scalar_t, kStored> gradient_of_normalized(
    const Normalized<scalar_t, kStored>& step, const StepPlace<kStored>& place,
    const at::opmath_type<scalar_t>* gains, const typename Step<scalar_t>::Vector& scale,
    const typename Step<scalar_t>::Vector& correction) {
  const auto gain = Wide<scalar_t, kStored>::load(gains + place.slot);
  Wide<scalar_t, kStored> gradient;
  for (int v = 0; v < gradient.kCount; ++v) {
    gradient.x[v] = fmsub(step.t.x[v], gain.x[v], step.x.x[v] * correction) * scale;
  }
  return gradient;
}

// The gradients of a row, after its sums. correction = scale^2 * sum of products / count
template <bool interleaved, typename Shape, typename scalar_t, typename NormLast>
ROPE_INLINE void differentiate_row(const Shape& shape, const NormRow<scalar_t>& row,
                                   const TokenAngles<scalar_t>& angles, NormLast norm_last,
                                   at::opmath_type<scalar_t> scale_of_row,
                                   at::opmath_type<scalar_t> correction_of_row, bool streams) {
  using Vector = typename Step<scalar_t>::Vector;
  const Vector scale(scale_of_row);
  const Vector correction(correction_of_row);
  for_each_step_outside(shape, [&](const StepPlace<1>& place) __attribute__((always_inline)) {
    const auto step = load_normalized(row, place);
    if (row.weight_grads != nullptr) {
      add_weight_grads(step, place, scale, row.weight_grads);
    }
    if (row.out != nullptr) {
      store_step(gradient_of_normalized(step, place, row.gains, scale, correction), row.out, place,
                 streams);
    }
  });
  for (std::int64_t i = 0; i < shape.steps(); ++i) {
    const auto place = place_of(shape, i);
    const auto step_angles = load_angles(angles, i);
    const auto step = load_normalized<interleaved>(row, place, step_angles, norm_last);
    if (row.weight_grads != nullptr) {
      add_weight_grads(step, place, scale, row.weight_grads);
    }
    if (row.out != nullptr) {
      auto gradient = gradient_of_normalized(step, place, row.gains, scale, correction);
      if (norm_last) {
        rotate_vectors<interleaved, /*back=*/true>(gradient.x, step_angles);
      }
      store_step(gradient, row.out, place, streams);
    }
  }
}

}  // namespace

}  // namespace rope::cpu
