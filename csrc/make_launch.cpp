#include "make_launch.h"

#include <c10/core/WrapDimMinimal.h>
#include <c10/util/SmallVector.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "checks.h"
#include "last_results.h"

namespace rope {

namespace {

// One loop of the Loops while it is being built.
template <int kArrays>
struct Loop {
  std::int64_t size;
  std::array<std::int64_t, kArrays> strides;
};

template <int kArrays>
using LoopList = c10::SmallVector<Loop<kArrays>, 5>;

// Whether the outer loop merely continues the inner one, for every array.
template <int kArrays>
bool continues(const Loop<kArrays>& outer, const Loop<kArrays>& inner) {
  for (const auto array : c10::irange(kArrays)) {
    if (outer.strides[array] != inner.strides[array] * inner.size) {
      return false;
    }
  }
  return true;
}

// Puts the loops in the order of memory, as the given array sees it, and joins those that can be
// walked as one.
template <int kArrays>
void simplify(LoopList<kArrays>& loops, int array) {
  std::stable_sort(loops.begin(), loops.end(), [=](const auto& left, const auto& right) {
    return left.strides[array] > right.strides[array];
  });
  LoopList<kArrays> joined;
  for (const Loop<kArrays>& inner : loops) {
    if (!joined.empty() && continues(joined.back(), inner)) {
      joined.back() = {joined.back().size * inner.size, inner.strides};
    } else {
      joined.push_back(inner);
    }
  }
  loops = std::move(joined);
}

template <int kArrays>
Loops<kArrays> to_loops(const LoopList<kArrays>& loops) {
  Loops<kArrays> result{};
  result.num_dims = static_cast<int>(loops.size());
  for (const auto d : c10::irange(loops.size())) {
    result.sizes[d] = loops[d].size;
    for (const auto array : c10::irange(kArrays)) {
      result.strides[array][d] = loops[d].strides[array];
    }
  }
  return result;
}

const void* advance(const void* pointer, std::int64_t bytes) {
  return static_cast<const char*>(pointer) + bytes;
}

void* advance(void* pointer, std::int64_t bytes) { return static_cast<char*>(pointer) + bytes; }

// max_wavelength^(-2n / rotary_dim) for each pair n.
const double* wavelength_frequencies(double max_wavelength, std::int64_t rotary_dim) {
  thread_local LastResults<std::pair<double, std::int64_t>, std::vector<double>> last;
  const auto& frequencies = last.find({max_wavelength, rotary_dim}, [&] {
    std::vector<double> powers(rotary_dim / 2);
    for (const auto n : c10::irange(rotary_dim / 2)) {
      powers[n] =
          std::pow(max_wavelength, -2.0 * static_cast<double>(n) / static_cast<double>(rotary_dim));
    }
    return powers;
  });
  return frequencies.data();
}

// Builds the description of a launch for one tensor of the call, or for both.
class Description {
 public:
  Description(const Call& call, std::int64_t rotary_dim) : call_(call) {
    launch_.num_pairs = rotary_dim / 2;
    launch_.rotary_offset = call.options.rotary_offset;
    launch_.interleaved = call.options.interleaved;
    launch_.conjugate = call.options.conjugate;
    launch_.uses_tables = call.uses_tables;
    if (call.uses_tables) {
      describe_tables();
    } else {
      describe_positions(rotary_dim);
    }
  }

  void add(const at::Tensor& in, const at::Tensor& out) {
    const std::int64_t axis = c10::maybe_wrap_dim(call_.options.embedding_axis, in.dim());
    const int index = launch_.num_operands++;
    launch_.dtype = in.scalar_type();
    Operand& operand = launch_.operands[index];
    operand.in = in.const_data_ptr();
    operand.out = out.mutable_data_ptr();
    operand.axis_size = in.size(axis);
    operand.in_axis_stride = in.stride(axis);
    operand.out_axis_stride = out.stride(axis);

    // Dimensions are counted from the right, without the embedding axis, as broadcasting counts
    // them.
    std::int64_t from_right = 0;
    for (std::int64_t d = in.dim() - 1; d >= 0; --d) {
      if (d == axis) {
        continue;
      }
      const auto token = token_of_dim(from_right++);
      if (token >= 0) {
        tokens_[token].strides[kIn + 2 * index] = in.stride(d);
        tokens_[token].strides[kOut + 2 * index] = out.stride(d);
      } else if (in.size(d) != 1) {
        heads_[index].push_back({in.size(d), {in.stride(d), out.stride(d)}});
      }
    }
  }

  void launch(c10::function_ref<void(const Launch&)> run) {
    simplify(tokens_, kOut);
    for (const auto index : c10::irange(launch_.num_operands)) {
      simplify(heads_[index], 1);
    }
    split_and_launch(run);
  }

 private:
  void describe_positions(std::int64_t rotary_dim) {
    const at::Tensor& positions = call_.positions;
    const auto& inv_freq = call_.options.inv_freq;
    const bool has_axes = inv_freq.has_value() && inv_freq->dim() == 2;
    PositionAngles& angles = launch_.position_angles;
    angles.positions = positions.const_data_ptr();
    angles.positions_dtype = positions.scalar_type();
    angles.num_axes = has_axes ? static_cast<int>(inv_freq->size(0)) : 1;
    angles.positions_axis_stride = has_axes ? positions.stride(0) : 0;
    angles.scale_factor = call_.options.scale_factor;
    angles.attention_factor = call_.options.attention_factor;
    if (inv_freq.has_value()) {
      angles.inv_freq = inv_freq->const_data_ptr();
      angles.inv_freq_dtype = inv_freq->scalar_type();
      angles.inv_freq_axis_stride = has_axes ? inv_freq->stride(0) : 0;
      angles.inv_freq_stride = inv_freq->stride(-1);
    } else {
      angles.inv_freq_dtype = at::kDouble;
      angles.wavelength_frequencies =
          wavelength_frequencies(call_.options.max_wavelength, rotary_dim);
      angles.max_wavelength = call_.options.max_wavelength;
    }
    add_token_dims(positions, has_axes ? 1 : 0, positions.dim(), positions);
  }

  void describe_tables() {
    const at::Tensor& cos = call_.cos;
    const at::Tensor& sin = call_.sin;
    TableAngles& angles = launch_.table_angles;
    angles.cos = cos.const_data_ptr();
    angles.sin = sin.const_data_ptr();
    angles.dtype = cos.scalar_type();
    angles.full_width = call_.options.full_width;
    angles.cos_stride = cos.stride(-1);
    angles.sin_stride = sin.stride(-1);
    if (call_.positions.defined()) {
      angles.rows = call_.positions.const_data_ptr();
      angles.rows_dtype = call_.positions.scalar_type();
      angles.num_rows = cos.size(0);
      angles.cos_row_stride = cos.stride(0);
      angles.sin_row_stride = sin.stride(0);
      add_token_dims(call_.positions, 0, call_.positions.dim(), call_.positions);
    } else {
      add_token_dims(cos, 0, cos.dim() - 1, sin);
    }
  }

  // Dimensions [begin, end) of angle (and of sin, which has the same sizes) over which the angle
  // differs are token dimensions; over the others the angle is shared.
  void add_token_dims(const at::Tensor& angle, std::int64_t begin, std::int64_t end,
                      const at::Tensor& sin) {
    for (std::int64_t d = end - 1; d >= begin; --d) {
      if (angle.size(d) != 1 && (angle.stride(d) != 0 || sin.stride(d) != 0)) {
        token_of_dim_.push_back(static_cast<int>(tokens_.size()));
        tokens_.push_back({angle.size(d), {angle.stride(d), sin.stride(d)}});
      } else {
        token_of_dim_.push_back(-1);
      }
    }
  }

  // The token loop of a dimension counted from the right; -1 where the angle is shared.
  int token_of_dim(std::int64_t from_right) const {
    return from_right < std::ssize(token_of_dim_) ? token_of_dim_[from_right] : -1;
  }

  // Loops beyond kMaxDims are run here, the outermost first.
  void split_and_launch(c10::function_ref<void(const Launch&)> run) {
    if (tokens_.size() > kMaxDims) {
      const auto loop = tokens_.front();
      tokens_.erase(tokens_.begin());
      for_each_turn(loop.size, run, [&] { move_token(loop.strides); });
      tokens_.insert(tokens_.begin(), loop);
      return;
    }
    for (const auto index : c10::irange(launch_.num_operands)) {
      if (heads_[index].size() > kMaxDims) {
        const auto loop = heads_[index].front();
        heads_[index].erase(heads_[index].begin());
        for_each_turn(loop.size, run, [&] { move(index, loop.strides[0], loop.strides[1]); });
        heads_[index].insert(heads_[index].begin(), loop);
        return;
      }
    }
    launch_.tokens = to_loops(tokens_);
    for (const auto index : c10::irange(launch_.num_operands)) {
      launch_.operands[index].heads = to_loops(heads_[index]);
    }
    run(launch_);
  }

  template <typename Move>
  void for_each_turn(std::int64_t size, c10::function_ref<void(const Launch&)> run,
                     const Move& move_on) {
    const Launch start = launch_;
    for (std::int64_t i = 0; i < size; ++i) {
      split_and_launch(run);
      move_on();
    }
    launch_ = start;
  }

  void move(int index, std::int64_t in_elements, std::int64_t out_elements) {
    const auto element = static_cast<std::int64_t>(c10::elementSize(launch_.dtype));
    Operand& operand = launch_.operands[index];
    operand.in = advance(operand.in, in_elements * element);
    operand.out = advance(operand.out, out_elements * element);
  }

  void move_token(const std::array<std::int64_t, kTokenArrays>& strides) {
    const auto moved = [](const void* pointer, std::int64_t elements, c10::ScalarType dtype) {
      return advance(pointer, elements * static_cast<std::int64_t>(c10::elementSize(dtype)));
    };
    TableAngles& tables = launch_.table_angles;
    PositionAngles& angles = launch_.position_angles;
    if (!launch_.uses_tables) {
      angles.positions = moved(angles.positions, strides[kAngle], angles.positions_dtype);
    } else if (tables.rows != nullptr) {
      tables.rows = moved(tables.rows, strides[kAngle], tables.rows_dtype);
    } else {
      tables.cos = moved(tables.cos, strides[kAngle], tables.dtype);
      tables.sin = moved(tables.sin, strides[kSin], tables.dtype);
    }
    for (const auto index : c10::irange(launch_.num_operands)) {
      move(index, strides[kIn + 2 * index], strides[kOut + 2 * index]);
    }
  }

  const Call& call_;
  Launch launch_{};
  LoopList<kTokenArrays> tokens_;
  LoopList<2> heads_[2];
  c10::SmallVector<int, 5> token_of_dim_;
};

}  // namespace

void for_each_launch(const Call& call, const Outputs& outputs,
                     c10::function_ref<void(const Launch&)> launch) {
  const std::int64_t dim = rotary_dim(call, call.q).expect_int();
  const bool together = call.is_pair && call.q.scalar_type() == call.k.scalar_type() &&
                        call.q.numel() > 0 && call.k.numel() > 0;
  if (call.q.numel() > 0) {
    Description description(call, dim);
    description.add(call.q, outputs.q);
    if (together) {
      description.add(call.k, outputs.k);
    }
    description.launch(launch);
  }
  if (call.is_pair && !together && call.k.numel() > 0) {
    Description description(call, dim);
    description.add(call.k, outputs.k);
    description.launch(launch);
  }
}

}  // namespace rope
