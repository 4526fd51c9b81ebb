// The mathematics of one angle and of one pair: written once, for host and device, for numbers and
// for vectors.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace rope {

// The two elements of x that turn together.
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

// What full-width tables have for a pair: a cosine and a sine for each of its elements.
template <typename Real>
struct FullRotation {
  Rotation<Real> a;
  Rotation<Real> b;
};

// a * b + c and a * b - c, rounded once. For vectors, at::vec has functions of these names.
C10_HOST_DEVICE inline float fmadd(float a, float b, float c) { return std::fma(a, b, c); }
C10_HOST_DEVICE inline double fmadd(double a, double b, double c) { return std::fma(a, b, c); }
C10_HOST_DEVICE inline float fmsub(float a, float b, float c) { return std::fma(a, b, -c); }
C10_HOST_DEVICE inline double fmsub(double a, double b, double c) { return std::fma(a, b, -c); }

// (a cos_a - b sin_a, b cos_b + a sin_b)
template <typename Real>
C10_HOST_DEVICE inline Pair<Real> rotate(const Pair<Real>& x, const FullRotation<Real>& angle) {
  return {fmsub(x.a, angle.a.cos, x.b * angle.a.sin), fmadd(x.b, angle.b.cos, x.a * angle.b.sin)};
}

// The same with one angle for both: (a cos t - b sin t, b cos t + a sin t)
template <typename Real>
C10_HOST_DEVICE inline Pair<Real> rotate(const Pair<Real>& x, const Rotation<Real>& angle) {
  return rotate(x, FullRotation<Real>{angle, angle});
}

template <typename Real>
C10_HOST_DEVICE inline FullRotation<Real> transpose(const FullRotation<Real>& angle) {
  return {{angle.a.cos, -angle.b.sin}, {angle.b.cos, -angle.a.sin}};
}

// Adds the derivatives with respect to cos t and sin t, where g is the gradient of the rotated x.
// (That with respect to sin t is also the one with respect to t, where x is what came out.)
template <typename Real>
C10_HOST_DEVICE inline Rotation<Real> add_gradient(const Pair<Real>& g, const Pair<Real>& x,
                                                   const Rotation<Real>& sum) {
  return {fmadd(g.b, x.b, fmadd(g.a, x.a, sum.cos)), fmadd(-g.a, x.b, fmadd(g.b, x.a, sum.sin))};
}

// The same for full-width tables: of the cosine and sine of each of the two elements.
template <typename Real>
C10_HOST_DEVICE inline FullRotation<Real> add_gradient(const Pair<Real>& g, const Pair<Real>& x,
                                                       const FullRotation<Real>& sum) {
  return {{fmadd(g.a, x.a, sum.a.cos), fmadd(-g.a, x.b, sum.a.sin)},
          {fmadd(g.b, x.b, sum.b.cos), fmadd(g.b, x.a, sum.b.sin)}};
}

// The transpose of a rotation turns the other way; attention_factor scales it.
template <typename Real>
C10_HOST_DEVICE inline Rotation<Real> scale(const Rotation<Real>& angle, Real attention_factor,
                                            bool conjugate) {
  return {angle.cos * attention_factor,
          angle.sin * (conjugate ? -attention_factor : attention_factor)};
}

// NOTE [ Cosine and sine of any angle ]
//
// An angle t in radians, a float64 of any size, is reduced to r = t - k * pi with |r| <= pi / 2 by
// two fused multiply-adds with pi split into a sum of two float64 numbers (Cody and Waite, 1980).
// The first is exact but for its one rounding of a result below 2; the second adds the rest of pi,
// so that r is right to some 2e-16 while k is exact, which holds below kReducible. Then float32
// minimax polynomials on the reduced range, with errors below 5e-9, give sine and cosine, and an
// odd k turns the signs of both. (To reduce to pi / 4 would spare each polynomial one term, and
// take more than that to find out which is the sine, and with what sign.) With the rounding of r to
// float32 the result is within 1.5e-7 of the truth. There is no branch and no call, so that
// compilers turn a loop of it into vector code. Angles beyond kReducible (a position of 2^31 at a
// frequency above 512) take the C library's way on the host, and that of cuda/sincos.h on a device.

inline constexpr double kReducible = 0x1p40;

// The highest bit is set where t cannot be reduced: |t| >= kReducible, or not a number. So many
// angles can be asked at once, by or, without a branch.
C10_HOST_DEVICE inline std::uint64_t irreducible_bit(double t) {
  constexpr std::uint64_t kAbsolute = ~std::uint64_t{0} >> 1;
  constexpr std::uint64_t kReducibleBits = std::uint64_t{1023 + 40} << 52;
  std::uint64_t bits;
  std::memcpy(&bits, &t, sizeof(bits));
  return (bits & kAbsolute) + ((std::uint64_t{1} << 63) - kReducibleBits);
}

// The number with its sign turned where the highest bit of `sign` is set, the only one that may be.
C10_HOST_DEVICE inline float turn_sign(float number, std::uint32_t sign) {
  std::uint32_t bits;
  std::memcpy(&bits, &number, sizeof(bits));
  bits ^= sign;
  std::memcpy(&number, &bits, sizeof(bits));
  return number;
}

// Cosine and sine of a reduced angle, |r| <= pi / 2, both with the sign flipped by `sign`.
C10_HOST_DEVICE inline Rotation<float> rotation_of_remainder(float r, std::uint32_t sign) {
  const float z = r * r;
  const float sine = fmadd(z, fmadd(z, fmadd(z, 0x1.5cf932p-19f, -0x1.9f5ff4p-13f), 0x1.110e6ap-7f),
                           -0x1.555548p-3f);
  const float cosine = fmadd(
      z, fmadd(z, fmadd(z, -0x1.194102p-22f, 0x1.9f8f5ap-16f), -0x1.6c149cp-10f), 0x1.55555p-5f);
  return {turn_sign(fmadd(z * z, cosine, fmadd(z, -0.5f, 1.0f)), sign),
          turn_sign(fmadd(r * z, sine, r), sign)};
}

// Cosine and sine of t where |t| < kReducible; meaningless numbers, but no harm, elsewhere.
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
// Consumer cards run float64 at 1/64 of the speed of float32, so the CUDA kernels form what they
// can without it. An angle is then a fraction of a whole turn, an unsigned 64-bit number of units
// of 2^-64 turns, whose arithmetic wraps exactly as turns do. An integer position times a frequency
// in turns per unit of position is such an angle, right to 2^-34 of a turn for every |position| <
// 2^31. A float32 angle m * 2^e becomes one by a product of its 24-bit m with 64 bits of 2^e / (2
// pi), of which only the fraction counts (Payne and Hanek, 1983). The nearest half turn is taken
// off, which flips both signs, and what is left is rounded to float32: the error of cosine and sine
// is below 2e-7.

C10_HOST_DEVICE inline Rotation<float> rotation_of_turns(std::uint64_t turns) {
  constexpr float kRadiansPerUnit = 0x1.921fb6p-30f;  // 2 pi / 2^32
  const auto high = static_cast<std::uint32_t>(turns >> 32);
  const std::uint32_t half_turns = (high + (std::uint32_t{1} << 30)) >> 31;
  const auto rest = static_cast<std::int32_t>(high << 1) >> 1;  // high - half_turns * 2^31
  return rotation_of_remainder(static_cast<float>(rest) * kRadiansPerUnit, half_turns << 31);
}

// Cosine and sine of any float32; NaN where t is not finite.
C10_HOST_DEVICE inline Rotation<float> rotation_of_float32(float t) {
  // The bits of 1 / (2 pi) after the point.
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
  // In two steps, since a shift by 64 is not defined.
  const std::uint64_t window = e < 0 ? kFirst >> -e : above << shift | below >> 1 >> (63 - shift);
  const std::uint64_t turns = m * window;
  return rotation_of_turns(t < 0 ? std::uint64_t{0} - turns : turns);
}

// The C library's cosine and sine.
inline Rotation<double> library_rotation(double t) { return {std::cos(t), std::sin(t)}; }

// Cosine and sine of any t, for the host; cuda/sincos.h has what a device does.
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
