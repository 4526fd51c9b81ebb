// The math of one pair and of one angle, for host and device. Real is a scalar or an at::vec
// vector.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace rope {

// Two elements of x that rotate together.
template <typename Real>
struct Pair {
  Real a;
  Real b;
};

// The cosine and the sine of an angle.
template <typename Real>
struct Rotation {
  Real cos;
  Real sin;
};

// With full-width tables: a cosine and a sine for each element of a pair.
template <typename Real>
struct FullRotation {
  Rotation<Real> a;
  Rotation<Real> b;
};

template <typename Real, bool kFullWidth>
using PairRotation = std::conditional_t<kFullWidth, FullRotation<Real>, Rotation<Real>>;

// a * b + c and a * b - c, rounded once. at::vec has overloads for vectors.
C10_HOST_DEVICE inline float fmadd(float a, float b, float c) { return std::fma(a, b, c); }
C10_HOST_DEVICE inline double fmadd(double a, double b, double c) { return std::fma(a, b, c); }
C10_HOST_DEVICE inline float fmsub(float a, float b, float c) { return std::fma(a, b, -c); }
C10_HOST_DEVICE inline double fmsub(double a, double b, double c) { return std::fma(a, b, -c); }

// (a cos_a - b sin_a, b cos_b + a sin_b)
template <typename Real>
C10_HOST_DEVICE inline Pair<Real> rotate(const Pair<Real>& x, const FullRotation<Real>& angle) {
  return {fmsub(x.a, angle.a.cos, x.b * angle.a.sin), fmadd(x.b, angle.b.cos, x.a * angle.b.sin)};
}

// (a cos t - b sin t, b cos t + a sin t)
template <typename Real>
C10_HOST_DEVICE inline Pair<Real> rotate(const Pair<Real>& x, const Rotation<Real>& angle) {
  return rotate(x, FullRotation<Real>{angle, angle});
}

template <typename Real>
C10_HOST_DEVICE inline FullRotation<Real> transpose(const FullRotation<Real>& angle) {
  return {{angle.a.cos, -angle.b.sin}, {angle.b.cos, -angle.a.sin}};
}

// By the transposed rotation, with the bits of rotate() by the negative angle.
template <typename Real>
C10_HOST_DEVICE inline Pair<Real> rotate_back(const Pair<Real>& x,
                                              const FullRotation<Real>& angle) {
  return {fmadd(x.a, angle.a.cos, x.b * angle.b.sin), fmsub(x.b, angle.b.cos, x.a * angle.a.sin)};
}

template <typename Real>
C10_HOST_DEVICE inline Pair<Real> rotate_back(const Pair<Real>& x, const Rotation<Real>& angle) {
  return rotate_back(x, FullRotation<Real>{angle, angle});
}

// Adds the derivatives with respect to cos t and sin t; g is the gradient of the rotated pair.
// (With the rotated pair in place of x, the derivative with respect to sin t is that of t.)
template <typename Real>
C10_HOST_DEVICE inline Rotation<Real> add_gradient(const Pair<Real>& g, const Pair<Real>& x,
                                                   const Rotation<Real>& sum) {
  return {fmadd(g.b, x.b, fmadd(g.a, x.a, sum.cos)), fmadd(-g.a, x.b, fmadd(g.b, x.a, sum.sin))};
}

// The same for full-width tables, for each element's cosine and sine.
template <typename Real>
C10_HOST_DEVICE inline FullRotation<Real> add_gradient(const Pair<Real>& g, const Pair<Real>& x,
                                                       const FullRotation<Real>& sum) {
  return {{fmadd(g.a, x.a, sum.a.cos), fmadd(-g.a, x.b, sum.a.sin)},
          {fmadd(g.b, x.b, sum.b.cos), fmadd(g.b, x.a, sum.b.sin)}};
}

// Multiplies by attention_factor; conjugate transposes, which negates the angle.
template <typename Real>
C10_HOST_DEVICE inline Rotation<Real> scale(const Rotation<Real>& angle, Real attention_factor,
                                            bool conjugate) {
  return {angle.cos * attention_factor,
          angle.sin * (conjugate ? -attention_factor : attention_factor)};
}

// NOTE [ Cosine and sine of any angle ]
//
// A float64 angle t, in radians, is reduced to r = t - k * pi with |r| <= pi / 2 by two fused
// multiply-adds, with pi split into a sum of two float64 numbers (Cody and Waite, 1980). The first
// rounds once, a result below 2; the second adds the low part of pi. r is accurate to 2e-16 as long
// as k is exact, which holds below kReducible. Float32 minimax polynomials, with errors below 5e-9,
// then give sine and cosine, and an odd k flips both signs. (Reducing to pi / 4 would save one term
// of each polynomial, but cost more to select sine, cosine and signs.) Including the rounding of r
// to float32, the error is below 1.5e-7. Without branches and calls, compilers vectorize a loop of
// it. Angles beyond kReducible (a position of 2^31 at a frequency above 512) use the C library on
// the host and cuda/sincos.h on a device.

inline constexpr double kReducible = 0x1p40;

// Sets the highest bit if |t| >= kReducible or t is NaN. ORing the results tests many angles
// without a branch.
C10_HOST_DEVICE inline std::uint64_t irreducible_bit(double t) {
  constexpr std::uint64_t kAbsolute = ~std::uint64_t{0} >> 1;
  constexpr std::uint64_t kReducibleBits = std::uint64_t{1023 + 40} << 52;
  std::uint64_t bits;
  std::memcpy(&bits, &t, sizeof(bits));
  return (bits & kAbsolute) + ((std::uint64_t{1} << 63) - kReducibleBits);
}

// Negates the number if `sign` is 1 << 31; returns it as it is if `sign` is 0.
C10_HOST_DEVICE inline float flip_sign(float number, std::uint32_t sign) {
  std::uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  bits ^= sign;
  std::memcpy(&number, &bits, sizeof(bits));
  return number;
}

// Cosine and sine of r, |r| <= pi / 2, both negated if `sign` is 1 << 31.
C10_HOST_DEVICE inline Rotation<float> rotation_of_remainder(float r, std::uint32_t sign) {
  const float z = r * r;
  const float sine = fmadd(z, fmadd(z, fmadd(z, 0x1.5cf932p-19f, -0x1.9f5ff4p-13f), 0x1.110e6ap-7f),
                           -0x1.555548p-3f);
  const float cosine = fmadd(
      z, fmadd(z, fmadd(z, -0x1.194102p-22f, 0x1.9f8f5ap-16f), -0x1.6c149cp-10f), 0x1.55555p-5f);
  return {flip_sign(fmadd(z * z, cosine, fmadd(z, -0.5f, 1.0f)), sign),
          flip_sign(fmadd(r * z, sine, r), sign)};
}

// Cosine and sine of t. Requires |t| < kReducible; other results are meaningless but harmless.
C10_HOST_DEVICE inline Rotation<float> reduced_rotation(double t) {
  constexpr double kOneOverPi = 0x1.45f306dc9c883p-2;
  constexpr double kPi = 0x1.921fb54442d18p+1;
  constexpr double kPiRest = 0x1.1a62633145c07p-53;
  // Adding 1.5 * 2^52 rounds to an integer, and leaves that integer in the low bits of the sum.
  constexpr double kRound = 0x1.8p52;

  const double shifted = fmadd(t, kOneOverPi, kRound);
  const double k = shifted - kRound;
  const float r = static_cast<float>(fmadd(-k, kPiRest, fmadd(-k, kPi, t)));
  std::uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  return rotation_of_remainder(r, static_cast<std::uint32_t>(bits) << 31);
}

// NOTE [ Angles in turns ]
//
// Consumer GPUs run float64 at 1/64 of the rate of float32, so the CUDA kernels avoid it. They hold
// an angle in turns (t / 2 pi) as an unsigned 64-bit fixed-point fraction, in units of 2^-64 turns:
// whole turns overflow, as they should. An integer position times a frequency in turns per unit of
// position is such an angle, accurate to 2^-34 turns for every |position| < 2^31. A float32 angle
// m * 2^e is converted by multiplying its 24-bit m by 64 bits of 2^e / (2 pi), of which only the
// fraction matters (Payne and Hanek, 1983). Subtracting the nearest half turn flips both signs, and
// the remainder is rounded to float32: the error of cosine and sine is below 2e-7.

C10_HOST_DEVICE inline Rotation<float> rotation_of_turns(std::uint64_t turns) {
  constexpr float kRadiansPerUnit = 0x1.921fb6p-30f;  // 2 pi / 2^32
  const auto high = static_cast<std::uint32_t>(turns >> 32);
  const std::uint32_t half_turns = (high + (std::uint32_t{1} << 30)) >> 31;
  const auto rest = static_cast<std::int32_t>(high << 1) >> 1;  // high - half_turns * 2^31
  return rotation_of_remainder(static_cast<float>(rest) * kRadiansPerUnit, half_turns << 31);
}

// Cosine and sine of any float32; NaN where t is not finite.
C10_HOST_DEVICE inline Rotation<float> rotation_of_float32(float t) {
  // The binary expansion of 1 / (2 pi).
  constexpr std::uint64_t kFirst = 0x28be60db9391054a;
  constexpr std::uint64_t kSecond = 0x7f09d5f47d4d3770;
  constexpr std::uint64_t kThird = 0x36d8a5664f10e410;
  constexpr float kSmall = 1.5f;  // below pi / 2

  std::uint32_t bits;
  std::memcpy(&bits, &t, sizeof(bits));
  const auto exponent = static_cast<int>(bits >> 23 & 0xff);
  if (!(t >= kSmall || t <= -kSmall) || exponent == 0xff) {
    return rotation_of_remainder(exponent == 0xff ? t - t : t, 0);
  }
  const std::uint64_t m = (bits & 0x7fffff) | 0x800000;
  const int e = exponent - 150;  // -23 to 104
  const std::uint64_t above = e < 64 ? kFirst : kSecond;
  const std::uint64_t below = e < 64 ? kSecond : kThird;
  const int shift = e & 63;
  // Two shifts: shifting by 64 is undefined.
  const std::uint64_t window = e < 0 ? kFirst >> -e : above << shift | below >> 1 >> (63 - shift);
  const std::uint64_t turns = m * window;
  return rotation_of_turns(t < 0 ? std::uint64_t{0} - turns : turns);
}

// The C library's cosine and sine.
inline Rotation<double> library_rotation(double t) { return {std::cos(t), std::sin(t)}; }

// Cosine and sine of any t, on the host. For a device see cuda/sincos.h.
template <typename Real>
inline Rotation<Real> rotation(double t) {
  if constexpr (std::is_same_v<Real, float>) {
    if (irreducible_bit(t) >> 63 == 0) {
      return reduced_rotation(t);
    }
  }
  const Rotation<double> exact = library_rotation(t);
  return {static_cast<Real>(exact.cos), static_cast<Real>(exact.sin)};
}

}  // namespace rope
