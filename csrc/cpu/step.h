// One step of a row: the elements of one vector, as the CPU kernel loads, widens, narrows and
// stores them. Part of cpu/rotate_kernel.cpp: compiled once for each CPU capability.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rotation.h"

#define ROPE_INLINE inline __attribute__((always_inline))
// A function of its own, so that its loop has all registers.
#define ROPE_LOOP __attribute__((noinline, flatten))

// The name of an entry: rotate_ and CPU_CAPABILITY make rotate_AVX2.
#define ROPE_CONCATENATE_(a, b) a##b
#define ROPE_CONCATENATE(a, b) ROPE_CONCATENATE_(a, b)

namespace rope::cpu {

namespace {

using at::vec::Vectorized;

template <typename Vector>
ROPE_INLINE Vector load_vector(const void* from) {
  if constexpr (requires { Vector::loadu(from); }) {
    return Vector::loadu(from);
  } else {
    Vector vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
  }
}

// Loads `bytes` bytes, at most as many as a vector has; the rest is zero.
template <typename Vector>
ROPE_INLINE Vector load_part(const void* from, std::int64_t bytes) {
  if (bytes == sizeof(Vector)) {
    return load_vector<Vector>(from);
  }
#ifdef CPU_CAPABILITY_AVX512
  const __m512i bits = _mm512_maskz_loadu_epi8((std::uint64_t{1} << bytes) - 1, from);
  return load_vector<Vector>(&bits);
#else
  char bits[sizeof(Vector)] = {};
  std::memcpy(bits, from, bytes);
  return load_vector<Vector>(bits);
#endif
}

// Stores a whole vector; with `streams` by a non-temporal store, at a multiple of its size.
template <typename Vector>
ROPE_INLINE void store_vector(const Vector& vector, void* to, bool streams) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  // Intrinsics, not memcpy: GCC would merge it with the conversion to float16 into one instruction,
  // which is slow on AMD's CPUs.
  if constexpr (sizeof(Vector) == 16) {
    const auto bits = load_vector<__m128i>(&vector);
    auto* target = static_cast<__m128i*>(to);
    streams ? _mm_stream_si128(target, bits) : _mm_storeu_si128(target, bits);
  } else if constexpr (sizeof(Vector) == 32) {
    const auto bits = load_vector<__m256i>(&vector);
    auto* target = static_cast<__m256i*>(to);
    streams ? _mm256_stream_si256(target, bits) : _mm256_storeu_si256(target, bits);
  } else {
#ifdef CPU_CAPABILITY_AVX512
    const auto bits = load_vector<__m512i>(&vector);
    auto* target = static_cast<__m512i*>(to);
    streams ? _mm512_stream_si512(target, bits) : _mm512_storeu_si512(target, bits);
#endif
  }
#else
  vector.store(to);
  (void)streams;
#endif
}

template <typename Vector>
ROPE_INLINE void store_part(const Vector& vector, void* to, std::int64_t bytes) {
  if (bytes == sizeof(Vector)) {
    store_vector(vector, to, /*streams=*/false);
  } else {
    std::memcpy(to, &vector, bytes);
  }
}

// A step of float64 or float32 (or float16 without AVX2).
template <typename scalar_t>
struct Step {
  using Vector = Vectorized<at::opmath_type<scalar_t>>;
  using Stored = Vectorized<scalar_t>;  // as in memory
  using Loaded = Stored;                // as held until all of a row is loaded
  static constexpr int kVectors = Stored::size() / Vector::size();  // of the opmath type
  static constexpr std::int64_t kSize = Stored::size();             // elements
  static constexpr bool kDeinterleaved = false;  // whether the vectors are even and odd elements

  static ROPE_INLINE Loaded loaded(const Stored& stored) { return stored; }
  static ROPE_INLINE void widen(const Loaded& loaded, Vector* vectors) {
    if constexpr (kVectors == 1) {
      vectors[0] = loaded;
    } else {
      const auto [first, second] = at::vec::convert_to_float<scalar_t>(loaded);
      vectors[0] = first;
      vectors[1] = second;
    }
  }
  static ROPE_INLINE Stored narrow(const Vector* vectors) {
    if constexpr (kVectors == 1) {
      return vectors[0];
    } else {
      return at::vec::convert_from_float<scalar_t>(vectors[0], vectors[1]);
    }
  }
};

// float16: as many elements as a vector of floats has, which fill half of a vector. at::vec's
// conversion of a whole one takes it apart and puts it together. Converted while it is loaded.
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <>
struct Step<c10::Half> {
  using Vector = Vectorized<float>;
#ifdef CPU_CAPABILITY_AVX512
  using Stored = __m256i;
  using Floats = __m512;
#else
  using Stored = __m128i;
  using Floats = __m256;
#endif
  using Loaded = Vector;
  static constexpr int kVectors = 1;
  static constexpr std::int64_t kSize = Vector::size();
  static constexpr bool kDeinterleaved = false;

  static ROPE_INLINE Loaded loaded(const Stored& stored) {
    Floats floats;
    at::vec::cvtfp16_fp32(stored, floats);
    return floats;
  }
  static ROPE_INLINE void widen(const Loaded& loaded, Vector* vectors) { vectors[0] = loaded; }
  static ROPE_INLINE Stored narrow(const Vector* vectors) {
    return at::vec::cvtfp32_fp16(vectors[0]);
  }
};
#endif

// NOTE [ bfloat16 in 32-bit lanes ]
//
// A 32-bit lane holds two bfloat16: shifting it left gives the even element as a float (on a little
// endian CPU), masking it the odd one. So a vector becomes one of the even elements and one of the
// odd elements without a shuffle, and the cosines and sines of a row are laid out to match (see
// for_each_slot in cpu/angles.h). Back again, 0x7fff is added to the float's bits, and its lowest
// bit is set first where the last bit to be kept is odd, so that a tie goes to even. The low bits
// of a NaN are zero here, so the addition cannot carry out of it: x is bfloat16 itself, and cosines
// and sines go through quiet().
template <>
struct Step<c10::BFloat16> {
  using Vector = Vectorized<float>;
  using Stored = Vectorized<std::int32_t>;
  using Loaded = Stored;
  static constexpr int kVectors = 2;
  static constexpr std::int64_t kSize = 2 * Stored::size();
  static constexpr bool kDeinterleaved = true;
  static constexpr auto kHighHalf = static_cast<std::int32_t>(0xffff0000);
  static constexpr int kLow = std::endian::native == std::endian::little ? 0 : 1;

  static ROPE_INLINE Loaded loaded(const Stored& stored) { return stored; }
  static ROPE_INLINE void widen(const Loaded& loaded, Vector* vectors) {
    vectors[kLow] = at::vec::cast<float>(loaded << Stored(16));
    vectors[1 - kLow] = at::vec::cast<float>(loaded & Stored(kHighHalf));
  }
  static ROPE_INLINE Stored narrow(const Vector* vectors) {
#ifdef __AVX512BF16__
    // vcvtne2ps2bf16 flushes subnormals to zero. Zeros are rare: if there is one, redo the vector
    // in integer code. (GCC keeps this constant in a register, and would not keep one of 16 bits.)
    const __m512i converted = convert(vectors[0], vectors[1]);
    if (_mm512_testn_epi16_mask(converted, Stored(0x7fff7fff)) == 0) [[likely]] {
      return converted;
    }
#endif
    const Stored low = round(vectors[kLow]);
    const Stored high = round(vectors[1 - kLow]);
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high);
#elif defined(CPU_CAPABILITY_AVX2)
    return _mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xaa);
#else
    return ((low >> Stored(16)) & Stored(0xffff)) | (high & Stored(kHighHalf));
#endif
  }
#ifdef __AVX512BF16__
  static ROPE_INLINE __m512i convert(const Vector& even, const Vector& odd) {
    alignas(64) static constexpr auto kInterleaved = [] {
      std::array<std::int16_t, kSize> from{};
      for (int i = 0; i < kSize; ++i) {
        from[i] = static_cast<std::int16_t>(i / 2 + i % 2 * (kSize / 2));
      }
      return from;
    }();
    const __m512bh halves = _mm512_cvtne2ps_pbh(odd, even);
    return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved.data()),
                                    load_vector<__m512i>(&halves));
  }
#endif
  // The high half of each lane is the bfloat16.
  static ROPE_INLINE Stored round(const Vector& vector) {
    const auto bits = at::vec::cast<std::int32_t>(vector);
    return (bits | ((bits >> Stored(16)) & Stored(1))) + Stored(0x7fff);
  }
};

// The angles of one step of pairs: Rotation or FullRotation of vectors. With full width the cosines
// and sines of the second elements of pairs are `half` behind those of the first.
template <typename scalar_t, bool full_width>
struct StepAngles {
  using S = Step<scalar_t>;
  using Vector = typename S::Vector;
  using Angle = std::conditional_t<full_width, FullRotation<Vector>, Rotation<Vector>>;

  Angle vectors[S::kVectors];

  template <typename Real>
  static ROPE_INLINE StepAngles load(const Real* cos, const Real* sin, std::int64_t half) {
    return make(cos, sin, half, Vector::size(),
                [](const Real* from)
                    __attribute__((always_inline)) { return Vector::loadu(from); });
  }
  // One angle for all elements.
  template <typename Real>
  static ROPE_INLINE StepAngles broadcast(const Real* cos, const Real* sin, std::int64_t half) {
    return make(cos, sin, half, 0,
                [](const Real* from) __attribute__((always_inline)) { return Vector(*from); });
  }

 private:
  template <typename Real, typename Load>
  static ROPE_INLINE StepAngles make(const Real* cos, const Real* sin, std::int64_t half,
                                     std::int64_t stride, const Load& load) {
    StepAngles angles;
    for (int v = 0; v < S::kVectors; ++v, cos += stride, sin += stride) {
      const Rotation<Vector> first{load(cos), load(sin)};
      if constexpr (full_width) {
        angles.vectors[v] = {first, {load(cos + half), load(sin + half)}};
      } else {
        angles.vectors[v] = first;
      }
    }
    return angles;
  }
};

template <typename scalar_t>
struct RotatedStep {
  typename Step<scalar_t>::Stored first;
  typename Step<scalar_t>::Stored second;
};

// Rotates the pairs of two widened steps, by the transposed rotation if `back`: a pair is an
// element of the first and the one at the same index of the second, or, interleaved, neighbors in
// either. Scalar math: a[n], b[n] = rotate({a[n], b[n]}, {cos[n], sin[n]})
template <bool interleaved, bool back, typename scalar_t, bool full_width>
ROPE_INLINE void rotate_vectors(typename Step<scalar_t>::Vector (&x)[2 * Step<scalar_t>::kVectors],
                                const StepAngles<scalar_t, full_width>& angles) {
  using S = Step<scalar_t>;
  using Vector = typename S::Vector;
  const auto rotate_pair = [](const Pair<Vector>& pair,
                              const auto& angle) __attribute__((always_inline)) {
    return back ? rotate_back<Vector>(pair, angle) : rotate<Vector>(pair, angle);
  };
  for (int v = 0; v < S::kVectors; ++v) {
    Vector& a = x[interleaved ? 2 * v : v];
    Vector& b = x[interleaved ? 2 * v + 1 : v + S::kVectors];
    if constexpr (interleaved && !S::kDeinterleaved) {
      const auto [even, odd] = at::vec::deinterleave2(a, b);
      const auto rotated = rotate_pair({even, odd}, angles.vectors[v]);
      const auto [left, right] = at::vec::interleave2(rotated.a, rotated.b);
      a = left;
      b = right;
    } else {
      const auto rotated = rotate_pair({a, b}, angles.vectors[v]);
      a = rotated.a;
      b = rotated.b;
    }
  }
}

template <bool interleaved, typename scalar_t, bool full_width>
ROPE_INLINE RotatedStep<scalar_t> rotate_step(const typename Step<scalar_t>::Loaded& first,
                                              const typename Step<scalar_t>::Loaded& second,
                                              const StepAngles<scalar_t, full_width>& angles) {
  using S = Step<scalar_t>;
  typename S::Vector x[2 * S::kVectors];
  S::widen(first, x);
  S::widen(second, x + S::kVectors);
  rotate_vectors<interleaved, /*back=*/false>(x, angles);
  return {S::narrow(x), S::narrow(x + S::kVectors)};
}

}  // namespace

}  // namespace rope::cpu
