#include "make_launch.h"

#include <ATen/ATen.h>
#include <ATen/core/DimVector.h>
#include <c10/core/WrapDimMinimal.h>
#include <c10/util/SmallVector.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "angle.h"
#include "checks.h"
#include "last_results.h"
#include "options.h"

namespace rope {

namespace {

template <int kArrays>
struct Loop {
  std::int64_t size;
  std::array<std::int64_t, kArrays> strides;
};

template <int kArrays>
using LoopList = c10::SmallVector<Loop<kArrays>, 5>;

// Whether the two loops coalesce: for every array, the outer one continues the inner one.
template <int kArrays>
bool continues(const Loop<kArrays>& outer, const Loop<kArrays>& inner) {
  for (const auto array : c10::irange(kArrays)) {
    if (outer.strides[array] != inner.strides[array] * inner.size) {
      return false;
    }
  }
  return true;
}

// Sorts the loops by the strides of the given array, outermost first, and coalesces them. False
// where more than kMaxDims are left.
template <int kArrays>
bool simplify(LoopList<kArrays>& loops, int array, Loops<kArrays>& result) {
  std::stable_sort(loops.begin(), loops.end(), [=](const auto& left, const auto& right) {
    return left.strides[array] > right.strides[array];
  });
  LoopList<kArrays> coalesced;
  for (const Loop<kArrays>& inner : loops) {
    if (!coalesced.empty() && continues(coalesced.back(), inner)) {
      coalesced.back() = {coalesced.back().size * inner.size, inner.strides};
    } else {
      coalesced.push_back(inner);
    }
  }
  if (coalesced.size() > kMaxDims) {
    return false;
  }
  result.num_dims = static_cast<int>(coalesced.size());
  for (const auto d : c10::irange(coalesced.size())) {
    result.sizes[d] = coalesced[d].size;
    for (const auto a : c10::irange(kArrays)) {
      result.strides[a][d] = coalesced[d].strides[a];
    }
  }
  return true;
}

// max_wavelength^(-2n / rotary_dim) for each pair n.
const double* wavelength_frequencies(double max_wavelength, std::int64_t rotary_dim) {
  thread_local LastResults<std::pair<double, std::int64_t>, std::vector<double>> last;
  const auto& frequencies = last.find({max_wavelength, rotary_dim}, [&] {
    std::vector<double> powers(rotary_dim / 2);
    for (const auto n : c10::irange(rotary_dim / 2)) {
      powers[n] = wavelength_frequency<double>(max_wavelength, n, rotary_dim / 2);
    }
    return powers;
  });
  return frequencies.data();
}

// Builds the launch for one tensor of the call, or for both.
class LaunchBuilder {
 public:
  LaunchBuilder(const Call& call, std::int64_t rotary_dim) : call_(call) {
    launch_.num_pairs = rotary_dim / 2;
    copy_options(call.options, launch_);
    launch_.uses_tables = call.uses_tables;
    if (call.uses_tables) {
      set_tables();
    } else {
      set_positions(rotary_dim);
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

    // As in broadcasting, dimensions count from the right, without the embedding axis.
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

  // Null where there are too many loops.
  const Launch* build() {
    bool fits = simplify(tokens_, kOut, launch_.tokens);
    for (const auto index : c10::irange(launch_.num_operands)) {
      fits = fits && simplify(heads_[index], 1, launch_.operands[index].heads);
    }
    return fits ? &launch_ : nullptr;
  }

 private:
  void set_positions(std::int64_t rotary_dim) {
    const at::Tensor& positions = call_.positions;
    const auto& inv_freq = call_.options.inv_freq;
    const bool has_axes = inv_freq.has_value() && inv_freq->dim() == 2;
    PositionAngles& angles = launch_.position_angles;
    copy_options(call_.options, angles);
    angles.positions = positions.const_data_ptr();
    angles.positions_dtype = positions.scalar_type();
    angles.num_axes = has_axes ? static_cast<int>(inv_freq->size(0)) : 1;
    angles.positions_axis_stride = has_axes ? positions.stride(0) : 0;
    if (inv_freq.has_value()) {
      angles.inv_freq = inv_freq->const_data_ptr();
      angles.inv_freq_dtype = inv_freq->scalar_type();
      angles.inv_freq_axis_stride = has_axes ? inv_freq->stride(0) : 0;
      angles.inv_freq_stride = inv_freq->stride(-1);
    } else {
      angles.inv_freq_dtype = at::kDouble;
      angles.wavelength_frequencies =
          wavelength_frequencies(call_.options.max_wavelength, rotary_dim);
    }
    add_token_dims(positions, has_axes ? 1 : 0, positions.dim(), positions);
  }

  void set_tables() {
    const at::Tensor& cos = call_.cos;
    const at::Tensor& sin = call_.sin;
    TableAngles& angles = launch_.table_angles;
    copy_options(call_.options, angles);
    angles.cos = cos.const_data_ptr();
    angles.sin = sin.const_data_ptr();
    angles.dtype = cos.scalar_type();
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

  // Of the dimensions [begin, end) of `angle` and of `sin`, which has the same sizes, those over
  // which the angle differs are token dimensions. The others become heads.
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

  // The token loop of a dimension counted from the right; -1 if it belongs to the heads.
  int token_of_dim(std::int64_t from_right) const {
    return from_right < std::ssize(token_of_dim_) ? token_of_dim_[from_right] : -1;
  }

  const Call& call_;
  Launch launch_{};
  LoopList<kTokenArrays> tokens_;
  LoopList<2> heads_[2];
  c10::SmallVector<int, 5> token_of_dim_;
};

// Launches on a contiguous copy of x, and of its positions or tables expanded to all rows of x,
// whose dimensions coalesce to at most two loops.
void launch_on_copies(const Call& call, const at::Tensor& out,
                      c10::function_ref<void(const Launch&)> launch) {
  Call copies = on(call, call.q.contiguous());
  at::DimVector rows(call.q.sizes().begin(), call.q.sizes().end());
  rows.erase(rows.begin() + c10::maybe_wrap_dim(call.options.embedding_axis, call.q.dim()));
  if (call.positions.defined()) {
    at::Tensor positions = call.positions;
    const auto& inv_freq = call.options.inv_freq;
    if (inv_freq.has_value() && inv_freq->dim() == 2) {
      while (positions.dim() <= std::ssize(rows)) {
        positions = positions.unsqueeze(1);  // behind the axes
      }
      rows.insert(rows.begin(), inv_freq->size(0));
    }
    copies.positions = positions.expand(rows).contiguous();
  } else {
    rows.push_back(call.cos.size(-1));
    copies.cos = call.cos.expand(rows).contiguous();
    copies.sin = call.sin.expand(rows).contiguous();
  }
  const at::Tensor result = at::empty_like(copies.q);
  for_each_launch(copies, {result, {}}, launch);
  out.copy_(result);
}

void launch_one(const Call& call, const at::Tensor& out, std::int64_t rotary_dim,
                c10::function_ref<void(const Launch&)> launch) {
  if (call.q.numel() == 0) {
    return;
  }
  LaunchBuilder builder(call, rotary_dim);
  builder.add(call.q, out);
  if (const Launch* built = builder.build()) {
    launch(*built);
  } else {
    launch_on_copies(call, out, launch);
  }
}

}  // namespace

void for_each_launch(const Call& call, const Outputs& outputs,
                     c10::function_ref<void(const Launch&)> launch) {
  const std::int64_t dim = rotary_dim(call, call.q).expect_int();
  if (!call.is_pair) {
    launch_one(call, outputs.q, dim, launch);
    return;
  }
  if (call.q.scalar_type() == call.k.scalar_type() && call.q.numel() > 0 && call.k.numel() > 0) {
    LaunchBuilder builder(call, dim);
    builder.add(call.q, outputs.q);
    builder.add(call.k, outputs.k);
    if (const Launch* built = builder.build()) {
      launch(*built);
      return;
    }
  }
  launch_one(on_q(call), outputs.q, dim, launch);
  launch_one(on_k(call), outputs.k, dim, launch);
}

}  // namespace rope
