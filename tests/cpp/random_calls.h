// Calls drawn at random: any layout, any shape, any source of angles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "host_launch.h"
#include "host_threads.h"
#include "reference.h"

namespace host {

using Sizes = std::vector<std::int64_t>;

class Draw {
 public:
  explicit Draw(std::uint64_t seed) : random_(seed) {}

  // In [low, high].
  std::int64_t between(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(high - low + 1));
  }
  bool one_in(std::int64_t n) { return between(1, n) == 1; }

  template <typename T, std::size_t kSize>
  T one_of(const T (&values)[kSize]) {
    return values[between(0, kSize - 1)];
  }

 private:
  std::mt19937_64 random_;
};

// A copy of `values` with random strides: permuted, with gaps and steps, aligned or not, and with
// some dimensions expanded.
inline at::Tensor in_any_layout(Draw& draw, const at::Tensor& values) {
  const std::int64_t dims = values.dim();
  if (dims == 0 || draw.one_in(4)) {
    return values;
  }
  Sizes order(dims);
  for (std::int64_t d = 0; d < dims; ++d) {
    order[d] = d;
  }
  const bool is_permuted = draw.one_in(2);
  for (std::int64_t d = 0; is_permuted && d < dims; ++d) {
    std::swap(order[d], order[draw.between(d, dims - 1)]);
  }
  const bool is_aligned = draw.one_in(2);
  Sizes strides(dims);
  Sizes stored = values.sizes().vec();
  std::int64_t step = is_aligned || draw.one_in(2) ? 1 : draw.between(2, 3);
  for (std::int64_t i = dims - 1; i >= 0; --i) {
    const std::int64_t d = order[i];
    strides[d] = step;
    if (draw.one_in(8)) {
      strides[d] = 0;
      stored[d] = 1;
    }
    step *= stored[d];
    if (i == dims - 1 || draw.one_in(3)) {
      step += is_aligned ? (8 - step % 8) % 8 + draw.one_of({0, 8}) : draw.between(0, 3);
    }
  }
  const std::int64_t offset = is_aligned ? draw.one_of({0, 8}) : draw.between(0, 9);
  at::Tensor result = strided_values(values.sizes(), strides, offset, values.scalar_type());
  at::Tensor kept = result;
  at::Tensor from = values;
  for (std::int64_t d = 0; d < dims; ++d) {
    kept = kept.narrow(d, 0, stored[d]);
    from = from.narrow(d, 0, stored[d]);
  }
  kept.copy_(from);
  return result;
}

// The sizes of two tensors without their embedding axis, and of their positions or tables.
struct Shapes {
  Sizes q, k, tokens;
};

inline Shapes random_shapes(Draw& draw) {
  Shapes shapes;
  const std::int64_t dims = draw.between(0, 4);
  // Sometimes one dimension is long: blocks of several tokens, and rows divided into groups.
  const std::int64_t long_dim = draw.one_in(3) ? draw.between(0, 3) : -1;
  for (std::int64_t d = 0; d < dims; ++d) {
    shapes.q.push_back(d == long_dim ? draw.one_of({33, 70, 300, 700}) : draw.between(1, 4));
  }
  const std::int64_t token_dims = draw.between(0, dims);
  for (std::int64_t d = dims - token_dims; d < dims; ++d) {
    shapes.tokens.push_back(draw.one_in(2) ? shapes.q[d] : 1);
  }
  // k differs where positions broadcast, and may lack leading dimensions of that kind.
  const std::int64_t lacking = draw.one_in(4) ? dims - token_dims : 0;
  for (std::int64_t d = lacking; d < dims; ++d) {
    const std::int64_t token = d - (dims - token_dims);
    const bool broadcasts = token < 0 || shapes.tokens[token] == 1;
    shapes.k.push_back(broadcasts ? draw.between(1, 5) : shapes.q[d]);
  }
  return shapes;
}

inline Sizes with_dim(Sizes sizes, std::int64_t size, std::int64_t axis) {
  sizes.insert(sizes.end() + (axis + 1), size);
  return sizes;
}

// An axis of both q and k, counted from the end.
inline std::int64_t random_axis(Draw& draw, const Shapes& shapes) {
  const auto most = static_cast<std::int64_t>(std::min(shapes.q.size(), shapes.k.size())) + 1;
  return draw.one_in(2) ? -1 : -draw.between(1, most);
}

// The rotated slice. In half of all calls it and the elements outside it are whole vectors.
struct RandomSlice {
  explicit RandomSlice(Draw& draw) : step(draw.one_of({1, 8})) {
    num_pairs = draw.one_in(20) ? 0 : draw.one_in(20) ? 264 : length(draw, 1, 24);
    offset = draw.one_in(2) ? 0 : length(draw, 0, 24);
  }

  std::int64_t axis_size(Draw& draw) const {
    const std::int64_t rest = draw.one_in(2) ? 0 : length(draw, 0, 40);
    return std::max<std::int64_t>(offset + 2 * num_pairs + rest, 1);
  }

  std::int64_t step, num_pairs, offset;

 private:
  std::int64_t length(Draw& draw, std::int64_t least, std::int64_t most) const {
    return step * draw.between(least, most / step);
  }
};

inline Call random_call(Draw& draw) {
  const Shapes shapes = random_shapes(draw);
  const std::int64_t axis = random_axis(draw, shapes);
  const RandomSlice slice(draw);
  const std::int64_t num_pairs = slice.num_pairs;
  const std::int64_t offset = slice.offset;
  const std::int64_t q_size = slice.axis_size(draw);
  const std::int64_t k_size = slice.axis_size(draw);

  const at::ScalarType dtype = draw.one_of(reference::kFloatDtypes);
  rope::ApplyOptions options{.embedding_axis = axis,
                             .rotary_dim = 2 * num_pairs,
                             .rotary_offset = offset,
                             .interleaved = draw.one_in(2),
                             .conjugate = draw.one_in(2)};
  const auto positions_of = [&](const Sizes& sizes, at::ScalarType of, std::int64_t low,
                                std::int64_t high) {
    return in_any_layout(draw, reference::random_positions(sizes, of, low, high));
  };
  const auto any_positions = [&](const Sizes& sizes) {
    return positions_of(sizes,
                        draw.one_of({at::kInt, at::kLong, at::kLong, at::kFloat, at::kDouble}),
                        -65536, 65536);
  };
  const auto call = [&]() -> Call {
    switch (num_pairs == 0 ? 0 : draw.between(0, 4)) {
      case 0:
      case 1:
        options.max_wavelength = draw.one_of({1e4, 5e5, 0.5});
        options.scale_factor = draw.one_of({1.0, 8.0});
        options.attention_factor = draw.one_of({1.0, 1.25});
        return apply(any_positions(shapes.tokens), options);
      case 2: {
        const std::int64_t axes = draw.between(0, 3);
        const Sizes sizes = axes == 0 ? Sizes{num_pairs} : Sizes{axes, num_pairs};
        const at::Tensor inv_freq =
            reference::random_inv_freq(sizes, draw.one_of({at::kFloat, at::kFloat, at::kDouble}));
        Sizes of_positions = shapes.tokens;
        if (axes > 0) {
          of_positions.insert(of_positions.begin(), axes);
        }
        options.rotary_dim = std::nullopt;
        options.inv_freq = in_any_layout(draw, inv_freq);
        options.attention_factor = draw.one_of({1.0, 1.25});
        return apply(any_positions(of_positions), options);
      }
      default: {
        rope::CosSinOptions of_tables{.embedding_axis = axis,
                                      .rotary_offset = offset,
                                      .interleaved = options.interleaved,
                                      .conjugate = options.conjugate,
                                      .full_width = draw.one_in(2)};
        Sizes sizes = shapes.tokens;
        if (draw.one_in(2)) {
          of_tables.positions =
              positions_of(shapes.tokens, draw.one_of({at::kInt, at::kLong}), 0, 7);
          sizes = {7};
        }
        sizes.push_back(of_tables.full_width ? 2 * num_pairs : num_pairs);
        const at::ScalarType of = draw.one_of(reference::kFloatDtypes);
        const at::Tensor cos = in_any_layout(draw, reference::random_values(sizes, of, 1));
        const at::Tensor sin = in_any_layout(draw, reference::random_values(sizes, of, 2));
        return apply_cos_sin(cos, sin, of_tables);
      }
    }
  }();
  const auto tensor = [&](const Sizes& others, std::int64_t size, std::uint64_t seed) {
    return in_any_layout(draw, reference::random_values(with_dim(others, size, axis), dtype, seed));
  };
  const at::Tensor q = tensor(shapes.q, q_size, 3);
  return draw.one_in(2) ? call.on(q) : call.on(q, tensor(shapes.k, k_size, 4));
}

inline std::string describe(const Call& call) {
  const auto text = [](const at::Tensor& x) {
    return x.defined() ? c10::str(x.scalar_type(), x.sizes(), " of strides ", x.strides())
                       : std::string("none");
  };
  const rope::ApplyOptions& options = call.options;
  return c10::str(
      "q: ", text(call.q), ", k: ", text(call.k), ", positions: ", text(call.positions),
      ", cos: ", text(call.cos), ", inv_freq: ", text(options.inv_freq.value_or(at::Tensor())),
      ", axis = ", options.embedding_axis, ", rotary_dim = ", options.rotary_dim.value_or(-1),
      ", offset = ", options.rotary_offset, ", interleaved = ", options.interleaved,
      ", conjugate = ", options.conjugate, ", full_width = ", call.options.full_width);
}

}  // namespace host
