// Cosine and sine of any float64 angle on a CUDA device. The CUDA library's functions contain a
// call and an array for large angles, which would cost the kernel local memory and registers; these
// do not. Also host code, for tests.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rotation.h"

namespace rope::cuda {

// The high 64 bits of a * b.
C10_HOST_DEVICE inline std::uint64_t multiply_high(std::uint64_t a, std::uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  __extension__ using uint128 = unsigned __int128;
  return static_cast<std::uint64_t>((static_cast<uint128>(a) * b) >> 64);
#endif
}

// NOTE [ Angles of any size ]
//
// An angle t beyond kReducible is m * 2^e with an integer m < 2^53, which is m * (2^e / (2 pi))
// turns. Only the fraction of the second factor matters: m times an integer is whole turns (Payne
// and Hanek, Radian Reduction for Trigonometric Functions, 1983). 128 bits of the fraction are
// taken from the binary expansion of 1 / (2 pi); in their product with m whole turns overflow, and
// the rest is accurate to 2^-63 turns.

// Returns an angle in [-pi, pi] with the cosine and sine of t; NaN if t is not finite. Requires |t|
// >= kReducible.
C10_HOST_DEVICE inline double fold(double t) {
  // 64 zeros, then the binary expansion of 1 / (2 pi): enough for the largest float64.
  static constexpr std::uint64_t kTurnsPerRadian[] = {
      0x0000000000000000, 0x28be60db9391054a, 0x7f09d5f47d4d3770, 0x36d8a5664f10e410,
      0x7f9458eaf7aef158, 0x6dc91b8e909374b8, 0x01924bba82746487, 0x3f877ac72c4a69cf,
      0xba208d7d4baed121, 0x3a671c09ad17df90, 0x4e64758e60d4ce7d, 0x272117e2ef7e4a0e,
      0xc7fe25fff7816603, 0xfbcbc462d6829b47, 0xdb4d9fb3c9f2c26d, 0xd3d18fd9a797fa8b,
      0x5d49eeb1faf97c5e, 0xcf41ce7de294a4ba, 0x9afed7ec47e35742};
  constexpr double kRadiansPerUnit = 0x1.921fb54442d18p-62;  // 2 pi / 2^64

  std::uint64_t bits;
  std::memcpy(&bits, &t, sizeof(bits));
  const auto exponent = static_cast<int>(bits >> 52 & 0x7ff);
  if (exponent == 0x7ff) {
    return t - t;
  }
  constexpr std::uint64_t kOne = std::uint64_t{1} << 52;
  const std::uint64_t m = (bits & (kOne - 1)) | kOne;
  const int first_bit = exponent - 1023 - 52 + 64;  // At least 40 - 52 + 64.
  const std::uint64_t* bits_of_turns = kTurnsPerRadian + first_bit / 64;
  const int shift = first_bit % 64;
  // Two shifts: shifting by 64 is undefined.
  const std::uint64_t high = bits_of_turns[0] << shift | bits_of_turns[1] >> 1 >> (63 - shift);
  const std::uint64_t low = bits_of_turns[1] << shift | bits_of_turns[2] >> 1 >> (63 - shift);
  const std::uint64_t turns = m * high + multiply_high(m, low);  // times 2^64
  const double radians = static_cast<double>(static_cast<std::int64_t>(turns)) * kRadiansPerUnit;
  return t < 0 ? -radians : radians;
}

// Cosine and sine of t by the reduction of NOTE [ Cosine and sine of any angle ] and Taylor series,
// whose first omitted terms are below 3e-18. Requires |t| < kReducible.
C10_HOST_DEVICE inline Rotation<double> reduced_rotation_of_double(double t) {
  constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
  constexpr double kHalfPi = 0x1.921fb54442d18p+0;
  constexpr double kHalfPiRest = 0x1.1a62633145c07p-54;
  constexpr double kRound = 0x1.8p52;

  const double shifted = t * kTwoOverPi + kRound;
  const double k = shifted - kRound;
  const double r = fmadd(-k, kHalfPiRest, fmadd(-k, kHalfPi, t));
  std::uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const auto quarter = static_cast<std::uint32_t>(bits);

  const double z = r * r;
  double sine = 1.0 / 355687428096000.0;   // 1 / 17!
  double cosine = 1.0 / 20922789888000.0;  // 1 / 16!
  sine = fmadd(sine, z, -1.0 / 1307674368000.0);
  cosine = fmadd(cosine, z, -1.0 / 87178291200.0);
  sine = fmadd(sine, z, 1.0 / 6227020800.0);
  cosine = fmadd(cosine, z, 1.0 / 479001600.0);
  sine = fmadd(sine, z, -1.0 / 39916800.0);
  cosine = fmadd(cosine, z, -1.0 / 3628800.0);
  sine = fmadd(sine, z, 1.0 / 362880.0);
  cosine = fmadd(cosine, z, 1.0 / 40320.0);
  sine = fmadd(sine, z, -1.0 / 5040.0);
  cosine = fmadd(cosine, z, -1.0 / 720.0);
  sine = fmadd(sine, z, 1.0 / 120.0);
  cosine = fmadd(cosine, z, 1.0 / 24.0);
  sine = fmadd(sine, z, -1.0 / 6.0);
  cosine = fmadd(cosine, z, -0.5);
  const double sin_r = fmadd(r * z, sine, r);
  const double cos_r = fmadd(z, cosine, 1.0);

  const double cos_t = (quarter & 1) ? sin_r : cos_r;
  const double sin_t = (quarter & 1) ? cos_r : sin_r;
  return {((quarter + 1) & 2) ? -cos_t : cos_t, (quarter & 2) ? -sin_t : sin_t};
}

// Cosines and sines of several angles, each divided by scale_factor first.
template <typename Real, int kCount>
C10_HOST_DEVICE inline void find_rotations(double (&angles)[kCount], double scale_factor,
                                           Rotation<Real> (&rotations)[kCount]) {
  std::uint64_t irreducible = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    irreducible |= irreducible_bit(angles[i]);
  }
  if (scale_factor != 1.0 || irreducible >> 63 != 0) {
    // Rare, and long code, so not unrolled. The angles are in registers, which cannot be indexed:
    // select each by comparing.
#pragma unroll 1
    for (int selected = 0; selected < kCount; ++selected) {
      double t = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        t = i == selected ? angles[i] : t;
      }
      t = t / scale_factor;
      t = irreducible_bit(t) >> 63 == 0 ? t : fold(t);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        angles[i] = i == selected ? t : angles[i];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<Real, float>) {
      rotations[i] = reduced_rotation(angles[i]);
    } else {
      rotations[i] = reduced_rotation_of_double(angles[i]);
    }
  }
}

}  // namespace rope::cuda
