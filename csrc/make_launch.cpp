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

// Sorts the loops by the strides of the given array, outermost first.
template <int kArrays>
void sort_by_stride(LoopList<kArrays>& loops, int array) {
  std::stable_sort(loops.begin(), loops.end(), [=](const auto& left, const auto& right) {
    return left.strides[array] > right.strides[array];
  });
}

// Appends the loops, coalesced among themselves, inside those that are there. False where there are
// more than kMaxDims in all.
template <int kArrays>
bool append(const LoopList<kArrays>& loops, Loops<kArrays>& result) {
  LoopList<kArrays> coalesced;
  for (const Loop<kArrays>& inner : loops) {
    if (!coalesced.empty() && continues(coalesced.back(), inner)) {
      coalesced.back() = {coalesced.back().size * inner.size, inner.strides};
    } else {
      coalesced.push_back(inner);
    }
  }
  for (const Loop<kArrays>& loop : coalesced) {
    if (result.num_dims == kMaxDims) {
      return false;
    }
    const int d = result.num_dims++;
    result.sizes[d] = loop.size;
    for (const auto array : c10::irange(kArrays)) {
      result.strides[array][d] = loop.strides[array];
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

// The stride of a weight, or of a contiguous tensor of its shape, along a dimension of x counted
// from the right without the embedding axis; 0 where it broadcasts.
std::int64_t weight_stride(at::IntArrayRef sizes, at::IntArrayRef strides,
                           std::int64_t from_right) {
  const std::int64_t d = std::ssize(sizes) - 2 - from_right;
  return d >= 0 && sizes[d] != 1 ? strides[d] : 0;
}

// The tensors of a launch's operand.
struct Tensors {
  const at::Tensor& in;
  const at::Tensor& out;     // undefined: nothing is written, for gradients of weights alone
  const at::Tensor& weight;  // undefined: none
  at::Tensor grad = {};
};

// Builds the launch for one tensor of the call, or for both.
class LaunchBuilder {
 public:
  LaunchBuilder(const Call& call, std::int64_t rotary_dim) : call_(call) {
    launch_.num_pairs = rotary_dim / 2;
    copy_options(call.options, launch_);
    launch_.uses_tables = call.uses_tables;
    launch_.normalizes = call.normalizes;
    if (call.uses_tables) {
      set_tables();
    } else {
      set_positions(rotary_dim);
    }
  }

  void add(const Tensors& tensors) {
    const at::Tensor& in = tensors.in;
    const at::Tensor& out = tensors.out.defined() ? tensors.out : in;
    const at::Tensor& grad = tensors.grad.defined() ? tensors.grad : in;
    const std::int64_t axis = c10::maybe_wrap_dim(call_.options.embedding_axis, in.dim());
    const int index = launch_.num_operands++;
    launch_.dtype = in.scalar_type();
    Operand& operand = launch_.operands[index];
    operand.in = in.const_data_ptr();
    operand.out = tensors.out.defined() ? out.mutable_data_ptr() : nullptr;
    operand.axis_size = in.size(axis);
    operand.in_axis_stride = in.stride(axis);
    operand.out_axis_stride = out.stride(axis);
    const at::Tensor& weight = tensors.weight;
    at::IntArrayRef weight_sizes;
    at::IntArrayRef weight_strides;
    at::DimVector gain_strides;
    operand.norm.num_members = 1;
    if (weight.defined()) {
      weight_sizes = weight.sizes();
      weight_strides = weight.strides();
      operand.norm.weight = weight.const_data_ptr();
      operand.norm.weight_dtype = weight.scalar_type();
      operand.norm.weight_axis_stride = weight.stride(-1);
      operand.norm.weight_numel = weight.numel();
      gain_strides = c10::contiguous_strides(weight_sizes);
    }
    if (tensors.grad.defined()) {
      operand.norm.grad = grad.const_data_ptr();
      operand.norm.grad_axis_stride = grad.stride(axis);
    }

    // As in broadcasting, dimensions count from the right, without the embedding axis.
    const auto shares_mean = norm_axes(call_, in);
    std::int64_t from_right = 0;
    for (std::int64_t d = in.dim() - 1; d >= 0; --d) {
      if (d == axis) {
        continue;
      }
      const auto token = token_of_dim(from_right);
      if (token >= 0) {
        tokens_[token].strides[kIn + 2 * index] = in.stride(d);
        tokens_[token].strides[kOut + 2 * index] = out.stride(d);
        tokens_[token].strides[kGrad + index] = grad.stride(d);
        tokens_[token].strides[kGain + index] =
            weight_stride(weight_sizes, gain_strides, from_right);
        tokens_[token].strides[kWeight + index] =
            weight_stride(weight_sizes, weight_strides, from_right);
      } else if (in.size(d) != 1) {
        Loop<kHeadArrays> loop{in.size(d), {in.stride(d), out.stride(d)}};
        if (call_.normalizes) {
          loop.strides[kHeadWeight] = weight_stride(weight_sizes, weight_strides, from_right);
          loop.strides[kHeadGrad] = grad.stride(d);
          loop.strides[kHeadGain] = weight_stride(weight_sizes, gain_strides, from_right);
        }
        if (shares_mean[d]) {
          members_[index].insert(members_[index].begin(), loop);  // in the order of x
          operand.norm.num_members *= in.size(d);
        } else {
          heads_[index].push_back(loop);
        }
      }
      ++from_right;
    }
  }

  // Null where there are too many loops.
  const Launch* build() {
    sort_by_stride(tokens_, kOut);
    bool fits = append(tokens_, launch_.tokens);
    for (const auto index : c10::irange(launch_.num_operands)) {
      Loops<kHeadArrays>& heads = launch_.operands[index].heads;
      sort_by_stride(heads_[index], kHeadOut);
      fits = fits && append(heads_[index], heads) && append(members_[index], heads);
    }
    return fits ? &launch_ : nullptr;
  }

 private:
  void set_positions(std::int64_t rotary_dim) {
    const at::Tensor& positions = call_.positions;
    const auto& inv_freq = call_.options.inv_freq;
    const bool has_axes = rope::has_axes(call_);
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
      angles.cos_row_stride = cos.numel() > 0 ? cos.stride(0) : 0;
      angles.sin_row_stride = cos.numel() > 0 ? sin.stride(0) : 0;
      add_token_dims(call_.positions, 0, call_.positions.dim(), call_.positions);
    } else {
      add_token_dims(cos, 0, cos.dim() - 1, sin);
    }
  }

  // Of the dimensions [begin, end) of `angle` and of `sin`, which has the same sizes, those over
  // which the angles differ are token dimensions. The others become heads.
  void add_token_dims(const at::Tensor& angle, std::int64_t begin, std::int64_t end,
                      const at::Tensor& sin) {
    for (std::int64_t d = end - 1; d >= begin; --d) {
      if (angles_differ(call_, end - 1 - d)) {
        token_of_dim_.push_back(static_cast<int>(tokens_.size()));
        // Tables without columns have no memory to step through.
        const bool is_empty = angle.numel() == 0;
        tokens_.push_back(
            {angle.size(d), {is_empty ? 0 : angle.stride(d), is_empty ? 0 : sin.stride(d)}});
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
  LoopList<kAllTokenArrays> tokens_;
  LoopList<kHeadArrays> heads_[2];    // that do not share a mean
  LoopList<kHeadArrays> members_[2];  // that do
  c10::SmallVector<int, 5> token_of_dim_;
};

// The gradients for q alone, or for k alone.
NormGradients gradients_of_q(const NormGradients& all) {
  return {.q = all.q, .q_weight = all.q_weight};
}
NormGradients gradients_of_k(const NormGradients& all) {
  return {.q = all.k, .q_weight = all.k_weight};
}

// The call on contiguous copies with at most three dimensions: rows that do not share a mean, rows
// that do, and the embedding axis. Its positions, tables or weight are expanded to all rows of x,
// angles to the rows that share a mean only where they differ among them.
class CopiedCall {
 public:
  explicit CopiedCall(const Call& call) : call_(on_q(call)) {
    const at::Tensor& x = call.q;
    const std::int64_t axis = c10::maybe_wrap_dim(call.options.embedding_axis, x.dim());
    const auto shares_mean = norm_axes(call, x);
    at::DimVector members;
    for (const auto d : c10::irange(x.dim())) {
      if (d != axis) {
        (shares_mean[d] ? members : order_).push_back(d);
      }
    }
    std::int64_t num_members = 1;
    for (const std::int64_t d : members) {
      num_members *= x.size(d);
    }
    order_.append(members.begin(), members.end());
    order_.push_back(axis);
    sizes_ = {x.numel() / std::max<std::int64_t>(num_members * x.size(axis), 1), num_members,
              x.size(axis)};
    for (const auto d : c10::irange(x.dim())) {
      if (d != axis) {
        rows_.push_back(x.size(d));
      }
    }
    call_.q = copy(x);
    call_.options.embedding_axis = -1;
    if (call.options.norm_axes.has_value()) {
      call_.options.norm_axes = {-2, -1};
    }
    copy_angles(members);
    if (call_.q_weight.defined()) {
      at::DimVector sizes = rows_;
      sizes.push_back(x.size(axis));
      call_.q_weight = copy(call_.q_weight.expand(sizes).movedim(-1, axis));
    }
  }

  const Call& call() const { return call_; }

  // A contiguous copy of a tensor of the shape of x, (rows, members, D).
  at::Tensor copy(const at::Tensor& x) const { return x.permute(order_).contiguous().view(sizes_); }

  // Sums a gradient of the copied weight, which has the size of x, to the shape of the weight.
  at::Tensor sum_to_weight(const at::Tensor& gradient, const at::Tensor& weight) const {
    at::DimVector sizes;  // of x, in the order of the copy
    for (const std::int64_t d : order_) {
      sizes.push_back(d == order_.back() ? sizes_[2] : rows_[d - (d > order_.back() ? 1 : 0)]);
    }
    at::DimVector inverse(order_.size());
    for (const auto i : c10::irange(order_.size())) {
      inverse[order_[i]] = static_cast<std::int64_t>(i);
    }
    return gradient.view(sizes)
        .permute(inverse)
        .movedim(order_.back(), -1)
        .sum_to_size(weight.sizes());
  }

  // Writes such a tensor to one of the shape of x.
  void copy_back(const at::Tensor& from, const at::Tensor& to) const {
    const at::Tensor target = to.permute(order_);
    target.copy_(from.view(target.sizes()));
  }

 private:
  // Of `leading` dimensions, those that broadcast with the rows of x, and `trailing` ones.
  at::Tensor copy_rows(at::Tensor x, std::int64_t leading, std::int64_t trailing) const {
    at::DimVector sizes(x.sizes().begin(), x.sizes().begin() + leading);
    sizes.append(rows_.begin(), rows_.end());
    sizes.append(x.sizes().end() - trailing, x.sizes().end());
    while (x.dim() < std::ssize(sizes)) {
      x = x.unsqueeze(leading);
    }
    // The order of the rows among themselves: that of x without the embedding axis.
    const std::int64_t axis = order_.back();
    at::DimVector order;
    for (const auto d : c10::irange(leading)) {
      order.push_back(d);
    }
    for (const auto i : c10::irange(std::ssize(order_) - 1)) {
      order.push_back(leading + order_[i] - (order_[i] > axis ? 1 : 0));
    }
    for (const auto d : c10::irange(trailing)) {
      order.push_back(std::ssize(sizes) - trailing + d);
    }
    at::DimVector result(sizes.begin(), sizes.begin() + leading);
    result.append({sizes_[0], sizes_[1]});
    result.append(sizes.end() - trailing, sizes.end());
    return x.expand(sizes).permute(order).contiguous().view(result);
  }

  void copy_angles(at::IntArrayRef members) {
    const std::int64_t axis = order_.back();
    const bool differ = std::any_of(members.begin(), members.end(), [&](std::int64_t d) {
      return angles_differ(call_, std::ssize(order_) - 1 - d - (d < axis ? 1 : 0));
    });
    const auto copy_angle = [&](const at::Tensor& angle, std::int64_t leading,
                                std::int64_t trailing) {
      const at::Tensor copy = copy_rows(angle, leading, trailing);
      return differ ? copy : copy.narrow(leading + 1, 0, 1);
    };
    if (call_.positions.defined()) {
      call_.positions = copy_angle(call_.positions, has_axes(call_) ? 1 : 0, 0);
    } else {
      const at::Tensor cos = copy_angle(call_.cos, 0, 1);
      call_.sin = copy_angle(call_.sin, 0, 1);
      call_.cos = cos;
    }
  }

  Call call_;
  at::DimVector order_;  // of the dimensions of x
  at::DimVector rows_;   // the sizes of x without the embedding axis
  at::DimVector sizes_;
};

void launch_one(const Call& call, const at::Tensor& out, std::int64_t rotary_dim,
                c10::function_ref<void(const Launch&)> launch) {
  if (call.q.numel() == 0) {
    return;
  }
  LaunchBuilder builder(call, rotary_dim);
  builder.add({call.q, out, call.q_weight});
  if (const Launch* built = builder.build()) {
    launch(*built);
    return;
  }
  const CopiedCall copied(call);
  at::Tensor result;
  if (call.normalizes) {
    result = dispatch(copied.call()).q;  // It may not be one launch: see unfused_norm.h.
  } else {
    result = at::empty_like(copied.call().q);
    for_each_launch(copied.call(), {result, {}}, launch);
  }
  copied.copy_back(result, out);
}

void launch_one(const NormGradientCall& call, const NormGradients& outputs, std::int64_t rotary_dim,
                NormGradientLaunch launch) {
  if (call.q.numel() == 0) {
    if (outputs.q_weight.defined()) {
      outputs.q_weight.zero_();
    }
    return;
  }
  LaunchBuilder builder(call, rotary_dim);
  builder.add({call.q, outputs.q, call.q_weight, call.q_grad});
  if (const Launch* built = builder.build()) {
    launch(*built, {outputs.q_weight, {}});
    return;
  }
  const CopiedCall copied(call);
  NormGradientCall on_copies = call;
  static_cast<Call&>(on_copies) = copied.call();
  on_copies.q_grad = copied.copy(call.q_grad);
  const NormGradients results = dispatch(on_copies);
  if (outputs.q.defined()) {
    copied.copy_back(results.q, outputs.q);
  }
  if (outputs.q_weight.defined()) {
    outputs.q_weight.copy_(copied.sum_to_weight(results.q_weight, call.q_weight));
  }
}

}  // namespace

c10::SmallVector<bool, 8> norm_axes(const Call& call, const at::Tensor& x) {
  c10::SmallVector<bool, 8> is_named(x.dim(), false);
  if (call.normalizes && call.options.norm_axes.has_value()) {
    for (const std::int64_t axis : *call.options.norm_axes) {
      is_named[c10::maybe_wrap_dim(axis, x.dim())] = true;
    }
  }
  return is_named;
}

bool angles_differ(const Call& call, std::int64_t from_right) {
  const auto differs = [&](const at::Tensor& angles, std::int64_t leading, std::int64_t trailing) {
    const std::int64_t d = angles.dim() - trailing - 1 - from_right;
    return d >= leading && angles.size(d) != 1 && angles.stride(d) != 0;
  };
  return call.positions.defined() ? differs(call.positions, has_axes(call) ? 1 : 0, 0)
                                  : differs(call.cos, 0, 1) || differs(call.sin, 0, 1);
}

void for_each_launch(const Call& call, const Outputs& outputs,
                     c10::function_ref<void(const Launch&)> launch) {
  const std::int64_t dim = rotary_dim(call, call.q).expect_int();
  if (!call.is_pair) {
    launch_one(call, outputs.q, dim, launch);
    return;
  }
  if (call.q.scalar_type() == call.k.scalar_type() && call.q.numel() > 0 && call.k.numel() > 0) {
    LaunchBuilder builder(call, dim);
    builder.add({call.q, outputs.q, call.q_weight});
    builder.add({call.k, outputs.k, call.k_weight});
    if (const Launch* built = builder.build()) {
      launch(*built);
      return;
    }
  }
  launch_one(on_q(call), outputs.q, dim, launch);
  launch_one(on_k(call), outputs.k, dim, launch);
}

void for_each_launch(const NormGradientCall& call, const NormGradients& outputs,
                     NormGradientLaunch launch) {
  const std::int64_t dim = rotary_dim(call, call.q).expect_int();
  if (!call.is_pair) {
    launch_one(call, outputs, dim, launch);
    return;
  }
  if (call.q.scalar_type() == call.k.scalar_type() && call.q.numel() > 0 && call.k.numel() > 0) {
    LaunchBuilder builder(call, dim);
    builder.add({call.q, outputs.q, call.q_weight, call.q_grad});
    builder.add({call.k, outputs.k, call.k_weight, call.k_grad});
    if (const Launch* built = builder.build()) {
      launch(*built, {outputs.q_weight, outputs.k_weight});
      return;
    }
  }
  launch_one(on_q(call), gradients_of_q(outputs), dim, launch);
  launch_one(on_k(call), gradients_of_k(outputs), dim, launch);
}

}  // namespace rope
