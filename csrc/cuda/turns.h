// Frequencies of max_wavelength in turns: see NOTE [ Angles in turns ]. Plain host code.
#pragma once

#include <c10/util/irange.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <tuple>
#include <vector>

#include "last_results.h"
#include "launch.h"

namespace rope::cuda {

// Whether a launch takes frequencies in turns: not where a float64 product is what there is: of
// positions that are not integers, of frequencies above 1 radian, which would take more bits, and
// on hosts whose long double has too few.
inline bool has_turns(const Launch& launch) {
  const PositionAngles& source = launch.position_angles;
  const bool is_integer = source.positions_dtype == c10::ScalarType::Int ||
                          source.positions_dtype == c10::ScalarType::Long;
  return !launch.uses_tables && source.wavelength_frequencies != nullptr && is_integer &&
         launch.dtype != c10::ScalarType::Double && source.max_wavelength >= 1 &&
         source.scale_factor >= 1 && std::numeric_limits<long double>::digits >= 64;
}

// Turns per unit of position in units of 2^-64, for each pair of a launch that has_turns, from an
// exact max_wavelength^(-2n / rotary_dim) / scale_factor.
inline const std::uint64_t* turns_of_wavelength(const Launch& launch) {
  const PositionAngles& source = launch.position_angles;
  using Key = std::tuple<double, double, std::int64_t>;
  thread_local LastResults<Key, std::vector<std::uint64_t>> last;
  const Key key(source.max_wavelength, source.scale_factor, launch.num_pairs);
  const auto& all_turns = last.find(key, [&] {
    std::vector<std::uint64_t> result(launch.num_pairs);
    for (const auto n : c10::irange(launch.num_pairs)) {
      const long double exponent =
          -static_cast<long double>(n) / static_cast<long double>(launch.num_pairs);
      const long double radians =
          std::pow(static_cast<long double>(source.max_wavelength), exponent) / source.scale_factor;
      const long double turns = radians / (2 * std::numbers::pi_v<long double>);
      result[n] = static_cast<std::uint64_t>(std::llrint(std::ldexp(turns, 64)));
    }
    return result;
  });
  return all_turns.data();
}

}  // namespace rope::cuda
