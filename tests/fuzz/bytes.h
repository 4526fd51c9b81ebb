// An input of the fuzzer, read as numbers.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace fuzz {

// Reads front to back; after the end, zeros. Zero stands for the plainest choice everywhere, so an
// empty input is a valid call and each byte adds one deviation.
class Bytes {
 public:
  Bytes(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}

  bool is_at_end() const { return size_ == 0; }

  // In [0, bound), bound at most 256.
  int below(int bound) { return byte() % bound; }
  bool flag() { return byte() % 2 == 1; }
  // Rare in random bytes.
  bool rarely() { return byte() % 8 == 7; }

  template <typename T, std::size_t kSize>
  T one_of(const T (&values)[kSize]) {
    return values[below(kSize)];
  }

  // Any integer, most often near 0 or near an end of a type.
  std::int64_t integer() {
    constexpr std::int64_t kMin = std::numeric_limits<std::int64_t>::min();
    constexpr std::int64_t kMax = std::numeric_limits<std::int64_t>::max();
    constexpr std::int64_t kCenters[] = {0,         0,          0,
                                         0,         8,          64,
                                         256,       1LL << 31,  -(1LL << 31),
                                         1LL << 32, 1LL << 40,  1LL << 61,
                                         1LL << 62, kMin + 128, kMax - 127};
    const int kind = below(16);
    if (kind == 15) {
      std::int64_t value = 0;
      for (int i = 0; i < 8; ++i) {
        value = static_cast<std::int64_t>(static_cast<std::uint64_t>(value) << 8 | byte());
      }
      return value;
    }
    return kCenters[kind] + static_cast<std::int8_t>(byte());
  }

  double real() {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    constexpr double kValues[] = {1.0,
                                  0.0,
                                  -0.0,
                                  0.5,
                                  -1.0,
                                  1e4,
                                  kInfinity,
                                  -kInfinity,
                                  std::numeric_limits<double>::quiet_NaN(),
                                  std::numeric_limits<double>::max(),
                                  std::numeric_limits<double>::lowest(),
                                  std::numeric_limits<double>::denorm_min(),
                                  std::numeric_limits<float>::max(),
                                  1e-30,
                                  1e300};
    const int kind = below(16);
    if (kind == 15) {
      const std::int64_t bits = integer();
      double value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
    return kValues[kind];
  }

 private:
  std::uint8_t byte() {
    if (size_ == 0) {
      return 0;
    }
    --size_;
    return *data_++;
  }

  const std::uint8_t* data_;
  std::size_t size_;
};

}  // namespace fuzz
