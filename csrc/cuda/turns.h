// Frequencies of max_wavelength in turns, computed on the host: see NOTE [ Angles in turns ].
#pragma once

#include <c10/util/irange.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <tuple>
#include <vector>

#include "angle.h"
#include "last_results.h"
#include "launch.h"

namespace rope::cuda {

// Whether the kernel forms the launch's angles in turns. Not for positions that are not integers,
// frequencies above 1 radian (64 bits are too few), float64 x, and hosts without an extended long
// double.
inline bool uses_turns(const Launch& launch) {
  const PositionAngles& source = launch.position_angles;
  const bool is_integer = source.positions_dtype == c10::ScalarType::Int ||
                          source.positions_dtype == c10::ScalarType::Long;
  return !launch.uses_tables && source.wavelength_frequencies != nullptr && is_integer &&
         launch.dtype != c10::ScalarType::Double && source.max_wavelength >= 1 &&
         source.scale_factor >= 1 && std::numeric_limits<long double>::digits >= 64;
}

// A function of its own: a lambda is implicitly constexpr, and so device code, which has no long
// double.
inline std::vector<std::uint64_t> compute_frequencies_in_turns(const Launch& launch) {
  const PositionAngles& source = launch.position_angles;
  std::vector<std::uint64_t> result(launch.num_pairs);
  for (const auto n : c10::irange(launch.num_pairs)) {
    const long double radians =
        wavelength_frequency<long double>(source.max_wavelength, n, launch.num_pairs) /
        source.scale_factor;
    const long double turns = radians / (2 * std::numbers::pi_v<long double>);
    result[n] = static_cast<std::uint64_t>(std::llrint(std::ldexp(turns, 64)));
  }
  return result;
}

// For each pair, turns per unit of position in units of 2^-64, divided by scale_factor. Requires
// uses_turns().
inline const std::uint64_t* frequencies_in_turns(const Launch& launch) {
  const PositionAngles& source = launch.position_angles;
  using Key = std::tuple<double, double, std::int64_t>;
  thread_local LastResults<Key, std::vector<std::uint64_t>> last;
  const Key key(source.max_wavelength, source.scale_factor, launch.num_pairs);
  return last.find(key, [&] { return compute_frequencies_in_turns(launch); }).data();
}

}  // namespace rope::cuda
