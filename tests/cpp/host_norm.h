// Calls that normalize, run on the host: how they are made, drawn and checked.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cuda/plan.h"
#include "cuda/turns.h"
#include "host_launch.h"
#include "host_threads.h"
#include "random_calls.h"
#include "reference.h"
#include "unfused_norm.h"

namespace host {

// Stands in for the frequencies in device memory.
inline const void* frequencies(const rope::Launch& launch) {
  if (launch.uses_tables || launch.position_angles.wavelength_frequencies == nullptr) {
    return nullptr;
  }
  return rope::cuda::uses_turns(launch)
             ? static_cast<const void*>(rope::cuda::frequencies_in_turns(launch))
             : launch.position_angles.wavelength_frequencies;
}

// Runs the blocks of a kernel whose work is a function of a Block, its parameters, shared memory
// and blockIdx.y.
template <typename Thread, typename RunBlock>
void run_cooperative(const typename Thread::Params& params, const rope::cuda::Plan& plan,
                     std::int64_t first_block, std::int64_t last_block, const Running& running,
                     const RunBlock& run_block) {
  const SharedMemory<Thread> shared(plan);
  for_each_block<Thread>(params, plan, first_block, last_block, running,
                         [&](std::vector<Thread>& threads, std::int64_t block_y) {
                           shared.clear();
                           HostBlock<Thread> block(threads, running);
                           run_block(block, params, shared.get(), block_y);
                         });
}

inline Call norm_apply(const at::Tensor& positions, const rope::NormOptions& options = {}) {
  return {rope::make_call(positions, options)};
}

inline Call norm_apply_cos_sin(const at::Tensor& cos, const at::Tensor& sin,
                               const rope::NormCosSinOptions& options = {}) {
  return {rope::make_call(cos, sin, options)};
}

// ---- Tensors ----

inline at::Tensor copy_with_layout(const at::Tensor& x) {
  return with_storage(storage_of(x.detach()).clone(), x);
}

// An output for x, filled with NaN, in the middle of a larger buffer of NaN.
inline at::Tensor poisoned_like(const at::Tensor& x) {
  const at::Tensor like = at::empty_like(x);
  const at::Tensor buffer = at::full({like.numel() + 2 * kGuard},
                                     std::numeric_limits<double>::quiet_NaN(), like.options());
  return buffer.as_strided(like.sizes(), like.strides(), kGuard);
}

inline rope::Outputs poisoned_outputs(const Call& call) {
  return {poisoned_like(call.q), call.is_pair ? poisoned_like(call.k) : at::Tensor()};
}

// Whether the elements of x's storage outside x are unchanged.
inline testing::AssertionResult surroundings_are(const at::Tensor& before, const at::Tensor& x) {
  at::Tensor own = at::zeros({before.numel()}, at::kBool);
  with_storage(own, x).fill_(true);
  return reference::same_bits(storage_of(x).masked_fill(own, 0), before.masked_fill(own, 0));
}

inline bool overlaps_itself(const at::Tensor& x) {
  at::Tensor count = at::zeros({storage_of(x).numel()}, at::kInt);
  const at::Tensor addresses = with_storage(at::arange(count.numel()), x).flatten();
  count.index_add_(0, addresses, at::ones({addresses.numel()}, at::kInt));
  return count.max().item<int>() > 1;
}

inline std::vector<at::Tensor> tensors(const Call& call) {
  std::vector<at::Tensor> result;
  for (const at::Tensor& tensor :
       {call.q, call.k, call.positions, call.cos, call.sin, call.q_weight, call.k_weight,
        call.options.inv_freq.value_or(at::Tensor())}) {
    if (tensor.defined()) {
      result.push_back(tensor);
    }
  }
  return result;
}

// x contiguous, unaligned, and with the embedding axis outermost or innermost in memory.
inline std::vector<at::Tensor> other_layouts(const at::Tensor& x, std::int64_t axis) {
  const at::Tensor unaligned = at::empty({x.numel() + 1}, x.options()).slice(0, 1).view(x.sizes());
  const at::Tensor axis_first = x.movedim(axis, 0).contiguous().movedim(0, axis);
  const at::Tensor axis_last = x.movedim(axis, -1).contiguous().movedim(-1, axis);
  return {x.contiguous(), unaligned.copy_(x), axis_first, axis_last};
}

// ---- Expected results ----

// The rotation of x.
inline reference::Expected expected_rotation(const Call& call, const at::Tensor& x) {
  const rope::ApplyOptions& options = call.options;
  if (!call.uses_tables) {
    return reference::apply(x, call.positions, options);
  }
  const auto positions =
      call.positions.defined() ? std::optional<at::Tensor>(call.positions) : std::nullopt;
  return reference::apply_cos_sin(x, call.cos, call.sin,
                                  {.positions = positions,
                                   .embedding_axis = options.embedding_axis,
                                   .rotary_offset = options.rotary_offset,
                                   .interleaved = options.interleaved,
                                   .conjugate = options.conjugate,
                                   .full_width = call.options.full_width});
}

// A weight as a tensor of the shape of x.
inline at::Tensor expanded_weight(const Call& call, const at::Tensor& x, const at::Tensor& weight) {
  if (!weight.defined()) {
    return {};
  }
  const at::Tensor last = x.movedim(call.options.embedding_axis, -1);
  return weight.expand(last.sizes()).movedim(-1, call.options.embedding_axis);
}

inline std::int64_t num_pairs(const Call& call, const at::Tensor& x) {
  if (call.uses_tables) {
    return call.cos.size(-1) / (call.options.full_width ? 2 : 1);
  }
  if (call.options.inv_freq.has_value()) {
    return call.options.inv_freq->size(-1);
  }
  return call.options.rotary_dim.value_or(x.size(call.options.embedding_axis) -
                                          call.options.rotary_offset) /
         2;
}

inline reference::Norm norm_of(const Call& call, const at::Tensor& x, const at::Tensor& weight) {
  return {.weight = expanded_weight(call, x, weight),
          .weight_offset = call.options.weight_offset,
          .eps = call.options.eps,
          .axes = call.options.norm_axes.value_or(
              std::vector<std::int64_t>{call.options.embedding_axis}),
          .is_last = call.options.norm_last};
}

inline reference::Slice slice_of(const Call& call) {
  return {call.options.embedding_axis, call.options.rotary_offset, call.options.interleaved};
}

inline reference::Expected expected_norm(const Call& call, const at::Tensor& x,
                                         const at::Tensor& weight) {
  // How much a rotation may lengthen a pair.
  double growth = call.options.attention_factor;
  if (call.uses_tables && call.cos.numel() > 0) {
    growth = std::hypot(call.cos.to(at::kDouble).abs().max().item<double>(),
                        call.sin.to(at::kDouble).abs().max().item<double>());
  }
  // The reference of the rotation takes the allowed error from the dtype of its input.
  const bool is_double = x.scalar_type() == at::kDouble;
  const auto rotate = [&](const at::Tensor& exact) {
    reference::Expected result = expected_rotation(call, exact);
    if (!is_double) {
      result.tolerance = reference::lengths(exact, num_pairs(call, x), slice_of(call)) *
                         (growth * reference::kFloat32Error);
    }
    return result;
  };
  return reference::norm_apply(x, norm_of(call, x, weight), rotate, num_pairs(call, x),
                               slice_of(call), growth);
}

// ---- Random calls ----

// A weight for x: (D), or with some dimensions of x in front.
inline at::Tensor random_weight(Draw& draw, const at::Tensor& x, std::int64_t axis) {
  if (draw.one_in(4)) {
    return {};
  }
  const at::Tensor last = x.movedim(axis, -1);
  Sizes sizes = {last.size(-1)};
  const std::int64_t dims = draw.one_in(2) ? 0 : draw.between(0, last.dim() - 1);
  for (std::int64_t i = 0; i < dims; ++i) {
    const std::int64_t size = last.size(last.dim() - 2 - i);
    sizes.insert(sizes.begin(), draw.one_in(2) ? size : 1);
  }
  const at::ScalarType dtype =
      draw.one_in(2) ? x.scalar_type() : draw.one_of(reference::kFloatDtypes);
  return in_any_layout(draw, reference::random_values(sizes, dtype, 11));
}

inline Call random_norm_call(Draw& draw, bool weights_may_vary) {
  Call call = random_call(draw);
  call.normalizes = true;
  call.options.eps = draw.one_of({1e-6, 1e-5, 0.5});
  call.options.weight_offset = draw.one_of({0.0, 1.0, -0.5});
  call.options.norm_last = draw.one_in(3);
  const std::int64_t axis = call.options.embedding_axis;
  call.q_weight = random_weight(draw, call.q, axis);
  if (call.is_pair) {
    call.k_weight = random_weight(draw, call.k, axis);
  }
  if (draw.one_in(3)) {
    const std::int64_t dims = std::min(call.q.dim(), call.is_pair ? call.k.dim() : call.q.dim());
    call.options.norm_axes = {axis};
    for (std::int64_t d = -dims; d < 0; ++d) {
      if (d != axis && draw.one_in(2)) {
        call.options.norm_axes->push_back(d);
      }
    }
  }
  if (rope::is_unfused(call, weights_may_vary)) {  // Not a launch.
    call.options.norm_axes = std::nullopt;
    const auto of_axis = [](const at::Tensor& weight) {
      at::Tensor row = weight;
      while (row.defined() && row.dim() > 1) {
        row = row.select(0, 0);
      }
      return row;
    };
    call.q_weight = of_axis(call.q_weight);
    call.k_weight = of_axis(call.k_weight);
  }
  return call;
}

}  // namespace host
