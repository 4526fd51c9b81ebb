// The columns of rows that are normalized: how they are read and written, and sums over a row.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cuda/angles.h"
#include "cuda/block.h"
#include "cuda/vector.h"
#include "launch.h"
#include "rotation.h"
#include "unsupported_dtype.h"

namespace rope::cuda {

// NOTE [ Sums over a row ]
//
// A row is divided into columns of two 16-byte vectors: first the rotated slice, as many pairs in
// each as a vector has elements, then the elements outside it. The last column of either may be
// incomplete; elements that it lacks count as zeros. Columns are the same whether they are accessed
// as vectors or element by element.
//
// Neighboring lanes of a warp have the columns of a row: lane i has columns i, i + lanes,
// i + 2 lanes... Their number is a power of two, at most 32, and not below the number of columns
// where that is at most 32.
//
//   column   the products of the first elements of its pairs in order, and of the second elements;
//            outside the slice, of the elements that would be first and second in a pair
//   lane     columns in order, in float64
//   row      a butterfly of shuffles among the lanes
//   mean     the rows in 32 sums, row r in sum r % 32, in order, in float64; then a butterfly
//
// Lanes without a column and sums without a row add zeros, which changes nothing. So the order
// depends on the row, its slice and its dtype alone: not on the layout, on other rows, or on how a
// launch is divided into blocks.

// ---- Weights ----

struct NormWeight {
  const void* values;  // null: none
  c10::ScalarType dtype;
  std::int64_t axis_stride;
};

struct NormParams {
  double eps;
  double weight_offset;
  bool norm_last;
  double inverse_counts[2];  // of the elements that share a mean, of each operand
  NormWeight weights[2];
};

// The weight of an operand, field by field: a reference selected at run time would be read through
// global memory.
C10_HOST_DEVICE inline NormWeight find_weight(const NormParams& params, bool is_q) {
  const auto& [q, k] = params.weights;
  return {is_q ? q.values : k.values, is_q ? q.dtype : k.dtype,
          is_q ? q.axis_stride : k.axis_stride};
}

// Calls run with a null pointer to the weight's type.
template <typename Run>
C10_HOST_DEVICE inline void dispatch_weight(c10::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case c10::ScalarType::Double:
      return run(static_cast<const double*>(nullptr));
    case c10::ScalarType::Float:
      return run(static_cast<const float*>(nullptr));
    case c10::ScalarType::Half:
      return run(static_cast<const c10::Half*>(nullptr));
    case c10::ScalarType::BFloat16:
      return run(static_cast<const c10::BFloat16*>(nullptr));
    default:
      fail_for_dtype(dtype);
  }
}

template <typename Real>
C10_HOST_DEVICE inline Real load_weight(const NormWeight& weight, std::int64_t offset) {
  Real value = 0;
  dispatch_weight(weight.dtype, [&](auto* type) {
    value = static_cast<Real>(static_cast<decltype(type)>(weight.values)[offset]);
  });
  return value;
}

template <typename Real>
C10_HOST_DEVICE inline Real reciprocal_root(Real mean) {
#ifdef __CUDA_ARCH__
  return ::rsqrt(mean);
#else
  return 1 / std::sqrt(mean);
#endif
}

// ---- Pairs of a column ----

// Pair i of a column, in registers. Missing elements are zero.
template <typename Real, int kPairs>
using Pairs = Pair<Real>[kPairs];

// A sum of products over the pairs of a column.
template <typename Real>
class ColumnSum {
 public:
  template <int kCount>
  C10_HOST_DEVICE void add(const Pairs<Real, kCount>& x, const Pairs<Real, kCount>& y) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      sum_ = {fmadd(x[n].a, y[n].a, sum_.a), fmadd(x[n].b, y[n].b, sum_.b)};
    }
  }
  C10_HOST_DEVICE Real total() const { return sum_.a + sum_.b; }

 private:
  Pair<Real> sum_ = {0, 0};
};

template <typename Real, int kPairs>
C10_HOST_DEVICE inline Real sum_products(const Pairs<Real, kPairs>& x,
                                         const Pairs<Real, kPairs>& y) {
  ColumnSum<Real> sum;
  sum.add(x, y);
  return sum.total();
}

// Pairs whose cosines, sines and gains are in registers at the same time.
template <typename Real, int kPairs>
inline constexpr int kChunkPairs =
    kPairs < static_cast<int>(16 / sizeof(Real)) ? kPairs : static_cast<int>(16 / sizeof(Real));

// Keeps compilers from loading what the next chunk needs ahead of this one, which takes registers
// that are not there.
C10_HOST_DEVICE inline void finish_chunk() {
#ifdef __CUDA_ARCH__
  asm volatile("" ::: "memory");
#endif
}

template <typename Real, int kPairs>
C10_HOST_DEVICE inline void multiply(Pairs<Real, kPairs>& x, const Pairs<Real, kPairs>& factors) {
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
    x[n] = {x[n].a * factors[n].a, x[n].b * factors[n].b};
  }
}

template <typename Real, int kPairs>
C10_HOST_DEVICE inline void multiply(Pairs<Real, kPairs>& x, Real factor) {
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
    x[n] = {x[n].a * factor, x[n].b * factor};
  }
}

template <typename Real, int kPairs, typename AnyRotation>
C10_HOST_DEVICE inline void rotate_pairs(Pairs<Real, kPairs>& x,
                                         const AnyRotation (&rotations)[kPairs]) {
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
    x[n] = rotate<Real>(x[n], rotations[n]);
  }
}

template <typename Real>
C10_HOST_DEVICE inline Rotation<Real> transpose(const Rotation<Real>& angle) {
  return {angle.cos, -angle.sin};
}

template <typename Real, int kPairs, typename AnyRotation>
C10_HOST_DEVICE inline void rotate_back(Pairs<Real, kPairs>& x,
                                        const AnyRotation (&rotations)[kPairs]) {
#pragma unroll
  for (int n = 0; n < kPairs; ++n) {
    x[n] = rotate<Real>(x[n], transpose(rotations[n]));
  }
}

// ---- A column in memory ----

// kVectors: by 16-byte vectors, else element by element, in the order of pairs that the launch has;
// kInterleaved is ignored then.
template <typename scalar_t, bool kVectors, bool kInterleaved, typename Index>
class NormColumn {
 public:
  using Real = at::opmath_type<scalar_t>;
  static constexpr int kPairs = static_cast<int>(16 / sizeof(scalar_t));
  using V = Vector<scalar_t, kPairs>;

  template <typename AnyOperands>
  C10_HOST_DEVICE NormColumn(const AnyOperands& operands, Index rotated_columns, Index column)
      : is_rotated_(column < rotated_columns),
        interleaved_(operands.interleaved),
        num_pairs_(operands.num_pairs),
        rotary_offset_(operands.rotary_offset),
        first_(is_rotated_ ? column * kPairs : 2 * (column - rotated_columns) * kPairs) {
    if constexpr (kVectors) {
      begin_[0] =
          is_rotated_ ? rotary_offset_ + (kInterleaved ? 2 * first_ : first_) : skip_slice(first_);
      begin_[1] = is_rotated_ ? begin_[0] + (kInterleaved ? Index{kPairs} : num_pairs_)
                              : skip_slice(first_ + kPairs);
    }
  }

  C10_HOST_DEVICE bool is_rotated() const { return is_rotated_; }

  // The place in the row of element e of vector v. Without vectors, v is 0 for first elements of
  // pairs and 1 for second ones.
  C10_HOST_DEVICE Index position(int v, int e) const {
    if constexpr (kVectors) {
      return begin(v) + e;
    } else if (is_rotated_) {
      const Index n = first_ + e;
      return rotary_offset_ + (interleaved_ ? 2 * n + v : v * num_pairs_ + n);
    } else {
      return skip_slice(first_ + (interleaved_ ? 2 * e + v : v * kPairs + e));
    }
  }

  // Whether a row of the size has that element.
  C10_HOST_DEVICE bool exists(int v, int e, Index size) const {
    if constexpr (kVectors) {
      return begin(v) < size;
    } else {
      return is_rotated_ ? first_ + e < num_pairs_ : position(v, e) < size;
    }
  }

  C10_HOST_DEVICE void load(const scalar_t* row, Index size, Index stride, V (&vectors)[2]) const {
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if constexpr (kVectors) {
        vectors[v] = begin_[v] < size ? load_streaming<V>(row + begin_[v]) : V{};
      } else {
        vectors[v] = V{};
#pragma unroll
        for (int e = 0; e < kPairs; ++e) {
          if (exists(v, e, size)) {
            vectors[v].set(e, load_streaming<One>(row + position(v, e) * stride));
          }
        }
      }
    }
  }

  C10_HOST_DEVICE static void unpack(const V (&vectors)[2], Pairs<Real, kPairs>& pairs) {
    unpack(vectors, 0, pairs);
  }

  // Some of the pairs, from the first on.
  template <int kCount>
  C10_HOST_DEVICE static void unpack(const V (&vectors)[2], int first, Pairs<Real, kCount>& pairs) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int a = register_of(first + n, 0);
      const int b = register_of(first + n, 1);
      pairs[n] = {vectors[a / kPairs].get(a % kPairs), vectors[b / kPairs].get(b % kPairs)};
    }
  }

  C10_HOST_DEVICE void store(scalar_t* row, Index size, Index stride,
                             const Pairs<Real, kPairs>& pairs) const {
    if constexpr (kVectors) {
      Real elements[2][kPairs];
#pragma unroll
      for (int n = 0; n < kPairs; ++n) {
        const int a = register_of(n, 0);
        const int b = register_of(n, 1);
        elements[a / kPairs][a % kPairs] = pairs[n].a;
        elements[b / kPairs][b % kPairs] = pairs[n].b;
      }
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        if (begin_[v] < size) {
          store_streaming(row + begin_[v], V::round(elements[v]));
        }
      }
    } else {
      for_each_element(0, pairs, [&](int v, int e, const Real& element) {
        if (exists(v, e, size)) {
          const Real one[1] = {element};
          store_streaming(row + position(v, e) * stride, One::round(one));
        }
      });
    }
  }

  // weight_offset + weight for some pairs, from the first on, of a row whose weights begin at the
  // offset.
  template <int kCount>
  C10_HOST_DEVICE void load_gains(const NormWeight& weight, Real weight_offset, Index offset,
                                  Index size, int first, Pairs<Real, kCount>& gains) const {
    dispatch_weight(weight.dtype, [&](auto* type) {
      const auto* row = static_cast<decltype(type)>(weight.values) + offset;
      for_each_element(first, gains, [&](int v, int e, Real& gain) {
        gain = exists(v, e, size) ? static_cast<Real>(row[position(v, e) * weight.axis_stride])
                                  : Real(0);
      });
    });
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      gains[n] = {gains[n].a + weight_offset, gains[n].b + weight_offset};
    }
  }

  // Calls visit(v, e, element of pairs) for each element of some pairs, from the first on.
  template <typename AnyPairs, typename Visit>
  C10_HOST_DEVICE static void for_each_element(int first, AnyPairs& pairs, const Visit& visit) {
    constexpr int kCount = std::extent_v<AnyPairs>;
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int a = register_of(first + n, 0);
      const int b = register_of(first + n, 1);
      visit(a / kPairs, a % kPairs, pairs[n].a);
      visit(b / kPairs, b % kPairs, pairs[n].b);
    }
  }

  // Where element i of pair n is among the elements of both vectors.
  C10_HOST_DEVICE static constexpr int register_of(int n, int i) {
    return kVectors && kInterleaved ? 2 * n + i : i * kPairs + n;
  }

 private:
  using One = Vector<scalar_t, 1>;

  // No index that is only known at run time: the array would be in local memory.
  C10_HOST_DEVICE Index begin(int v) const { return v == 0 ? begin_[0] : begin_[1]; }

  C10_HOST_DEVICE Index skip_slice(Index outside) const {
    return outside < rotary_offset_ ? outside : outside + 2 * num_pairs_;
  }

  bool is_rotated_;
  bool interleaved_;
  Index num_pairs_;
  Index rotary_offset_;
  Index first_;          // pair, or element outside the slice
  Index begin_[2] = {};  // of each vector
};

}  // namespace rope::cuda
