// Vectors of elements: how they are loaded, converted and stored.
#pragma once

#include <ATen/OpMathType.h>
#include <c10/macros/Macros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace rope::cuda {

// kSize elements: 16 bytes, or a single element. They are held as bits in 32-bit units, the size of
// a register. Given elements of 16 or 64 bits, the compiler unpacks or moves them right after the
// load, which waits for each load before issuing the next.
template <typename scalar_t, int kSize>
struct alignas(sizeof(scalar_t) * kSize) Vector {
  using Real = at::opmath_type<scalar_t>;
  using Bits =
      std::conditional_t<sizeof(scalar_t) == 2, std::uint16_t,
                         std::conditional_t<sizeof(scalar_t) == 4, std::uint32_t, std::uint64_t>>;
  using Unit = std::conditional_t<sizeof(scalar_t) * kSize == 2, std::uint16_t, std::uint32_t>;

  Unit units[sizeof(scalar_t) * kSize / sizeof(Unit)];

  C10_HOST_DEVICE Bits bits(int i) const {
    if constexpr (sizeof(scalar_t) == 8) {
      return units[2 * i] | static_cast<Bits>(units[2 * i + 1]) << 32;
    } else {
      return static_cast<Bits>(units[i / kElementsPerUnit] >> (i % kElementsPerUnit * 16));
    }
  }

  C10_HOST_DEVICE Real get(int i) const {
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16> && kElementsPerUnit == 2) {
      // bfloat16 is the high half of a float32: one instruction.
      const std::uint32_t unit = units[i / 2];
      const std::uint32_t float_bits = i % 2 == 0 ? unit << 16 : unit & 0xffff0000;
      float element;
      std::memcpy(&element, &float_bits, sizeof(element));
      return element;
    }
    const Bits element_bits = bits(i);
    scalar_t element;
    std::memcpy(&element, &element_bits, sizeof(element));
    return static_cast<Real>(element);
  }

  // Requires that the element is zero.
  C10_HOST_DEVICE void set(int i, const Vector<scalar_t, 1>& element) {
    if constexpr (sizeof(scalar_t) == 8) {
      units[2 * i] = element.units[0];
      units[2 * i + 1] = element.units[1];
    } else {
      units[i / kElementsPerUnit] |= static_cast<Unit>(element.units[0])
                                     << (i % kElementsPerUnit * 16);
    }
  }

  C10_HOST_DEVICE static Vector round(const Real (&values)[kSize]) {
    Vector result;
#pragma unroll
    for (int i = 0; i < kSize; i += kElementsPerUnit) {
      if constexpr (kElementsPerUnit == 2) {
        result.units[i / 2] = round_two(values[i], values[i + 1]);
      } else {
        const auto element = static_cast<scalar_t>(values[i]);
        std::memcpy(&result.units[i * sizeof(element) / sizeof(Unit)], &element, sizeof(element));
      }
    }
    return result;
  }

 private:
  static constexpr int kElementsPerUnit = sizeof(scalar_t) < sizeof(Unit) ? 2 : 1;

  // Rounds two elements to one unit: one instruction on a device.
  C10_HOST_DEVICE static std::uint32_t round_two(float low, float high) {
#ifdef __CUDA_ARCH__
    std::uint32_t bits;
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
      std::memcpy(&bits, &two, sizeof(bits));
    } else {
      const __half2 two = __floats2half2_rn(low, high);
      std::memcpy(&bits, &two, sizeof(bits));
    }
    return bits;
#else
    const scalar_t two[2] = {static_cast<scalar_t>(low), static_cast<scalar_t>(high)};
    std::uint32_t bits;
    std::memcpy(&bits, two, sizeof(bits));
    return bits;
#endif
  }
};

// Neighboring elements of any kind of memory, 16 bytes at a time. Their address is a multiple of 16
// bytes, or of the size of all of them.
template <typename scalar_t, int kCount, typename Real>
C10_HOST_DEVICE inline void load_aligned(const scalar_t* from, Real (&elements)[kCount]) {
  constexpr int kOneLoad = static_cast<int>(16 / sizeof(scalar_t));
  constexpr int kSize = kCount < kOneLoad ? kCount : kOneLoad;
  using V = Vector<scalar_t, kSize>;
#pragma unroll
  for (int i = 0; i < kCount; i += kSize) {
    const V vector = *reinterpret_cast<const V*>(from + i);
#pragma unroll
    for (int n = 0; n < kSize; ++n) {
      elements[i + n] = static_cast<Real>(vector.get(n));
    }
  }
}

#ifdef __CUDACC__
// The type that loads or stores a vector by one instruction.
template <typename V>
using Transfer = std::conditional_t<
    sizeof(V) == 16, uint4,
    std::conditional_t<sizeof(V) == 8, std::uint64_t,
                       std::conditional_t<sizeof(V) == 4, std::uint32_t, std::uint16_t>>>;
#endif

// Each element is read once and written once, so loads and stores are streaming (ld.global.cs,
// st.global.cs): evicted first, they leave the caches to data that is used again.
template <typename V>
C10_HOST_DEVICE inline V load_streaming(const void* from) {
#ifdef __CUDA_ARCH__
  const auto bits = __ldcs(static_cast<const Transfer<V>*>(from));
  V vector;
  std::memcpy(&vector, &bits, sizeof(vector));
  return vector;
#else
  return *static_cast<const V*>(from);
#endif
}

template <typename V>
C10_HOST_DEVICE inline void store_streaming(void* to, const V& vector) {
#ifdef __CUDA_ARCH__
  Transfer<V> bits;
  std::memcpy(&bits, &vector, sizeof(bits));
  __stcs(static_cast<Transfer<V>*>(to), bits);
#else
  *static_cast<V*>(to) = vector;
#endif
}

}  // namespace rope::cuda
