#include "checks.h"

#include <c10/core/ScalarType.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/irange.h>
#include <c10/util/safe_numerics.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include "gradient_sums.h"
#include "messages.h"
#include "norm_operators.h"
#include "overlap.h"

namespace rope {

namespace {

std::string expected(const Call& call, const char* argument) {
  return rope::expected(call.name(), argument);
}

std::string expected(const SumCall& call, std::string_view argument) {
  return rope::expected(call.name(), argument);
}

bool is_supported_float(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf ||
         dtype == at::kBFloat16;
}

const char* weight_name(const Call& call) { return call.is_pair ? "q_weight" : "weight"; }

// Whether inv_freq or the tables determine rotary_dim.
bool has_columns(const Call& call) { return call.uses_tables || call.options.inv_freq.has_value(); }

// The rotary_dim that they determine.
c10::SymInt dim_of_columns(const Call& call) {
  const at::Tensor& table = call.uses_tables ? call.cos : *call.options.inv_freq;
  return call.options.full_width ? table.sym_size(-1) : table.sym_size(-1) * 2;
}

bool have_same_sizes(c10::SymIntArrayRef x, c10::SymIntArrayRef y) {
  bool same_sizes = x.size() == y.size();
  for (std::size_t d = 0; same_sizes && d < x.size(); ++d) {
    same_sizes = holds(x[d].sym_eq(y[d]));
  }
  return same_sizes;
}

bool have_same_shape(const at::Tensor& x, const at::Tensor& y) {
  return have_same_sizes(x.sym_sizes(), y.sym_sizes());
}

// The sizes of x without the embedding axis, which has been checked.
c10::SymDimVector batch_sizes(const at::Tensor& x, std::int64_t embedding_axis) {
  c10::SymDimVector sizes(x.sym_sizes().begin(), x.sym_sizes().end());
  sizes.erase(sizes.begin() + c10::maybe_wrap_dim(embedding_axis, x.dim()));
  return sizes;
}

// Whether sizes expand to target, by ordinary broadcasting. are_equal compares two sizes that may
// be symbolic.
template <typename AreEqual>
bool broadcasts_to(c10::SymIntArrayRef sizes, c10::SymIntArrayRef target,
                   const AreEqual& are_equal) {
  if (sizes.size() > target.size()) {
    return false;
  }
  for (const auto i : c10::irange(sizes.size())) {
    const c10::SymInt& size = sizes[sizes.size() - 1 - i];
    if (!TORCH_GUARD_OR_FALSE(size.sym_eq(1)) && !are_equal(size, target[target.size() - 1 - i])) {
      return false;
    }
  }
  return true;
}

// The same, as a condition that is assumed for symbolic sizes.
bool broadcasts_to(c10::SymIntArrayRef sizes, c10::SymIntArrayRef target) {
  return broadcasts_to(sizes, target, [](const c10::SymInt& size, const c10::SymInt& wanted) {
    return holds(size.sym_eq(wanted));
  });
}

// The dimension, counted from the end, where an inserted 1 would make sizes expand to target;
// `trailing` dimensions follow sizes. 0 if there is none.
std::int64_t missing_dimension(c10::SymIntArrayRef sizes, c10::SymIntArrayRef target,
                               std::int64_t trailing) {
  const auto are_known_to_be_equal = [](const c10::SymInt& size, const c10::SymInt& wanted) {
    return TORCH_GUARD_OR_FALSE(size.sym_eq(wanted));
  };
  for (std::size_t from_end = 0; from_end < sizes.size(); ++from_end) {
    c10::SymDimVector candidate(sizes.begin(), sizes.end());
    candidate.insert(candidate.end() - from_end, 1);
    if (broadcasts_to(candidate, target, are_known_to_be_equal)) {
      return -1 - trailing - static_cast<std::int64_t>(from_end);
    }
  }
  return 0;
}

// A common mistake: q and k passed one after the other, so that k lands in positions or cos.
bool looks_like_k(const Call& call, const at::Tensor& tensor) {
  const at::Tensor& q = call.q;
  return !call.is_pair && q.defined() && tensor.defined() && tensor.is_floating_point() &&
         q.dim() >= 2 && tensor.dim() == q.dim() &&
         TORCH_GUARD_OR_FALSE(tensor.sym_size(-1).sym_eq(q.sym_size(-1)));
}

std::string one_tuple(const Call& call) {
  return c10::str(" (q and k go in one tuple: ", call.name(), "((q, k), ",
                  call.normalizes ? "(q_weight, k_weight), " : "",
                  call.uses_tables ? "cos, sin" : "positions", "))");
}

std::string one_tuple_hint(const Call& call) {
  const bool is_mistake = call.uses_tables
                              ? looks_like_k(call, call.cos) &&
                                    (call.sin.dim() != call.cos.dim() || call.positions.defined())
                              : looks_like_k(call, call.positions);
  return is_mistake ? one_tuple(call) : "";
}

// The same mistake, where k is the weight. A weight without an error is no k.
std::string one_tuple_hint_of_weight(const Call& call) {
  const at::Tensor& weight = call.q_weight;
  const bool is_mistake = looks_like_k(call, weight) &&
                          TORCH_GUARD_OR_FALSE(weight.sym_size(0).sym_eq(call.q.sym_size(0)));
  return is_mistake ? one_tuple(call) : "";
}

void check_layout(const Call& call, const at::Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !tensor.is_nested() || tensor.layout() != at::kStrided, "rope::", call.name(),
      "(): expected nested tensors to have the layout torch.jagged, but got torch.strided");
}

void check_defined(const Call& call, const at::Tensor& tensor, const char* argument) {
  TORCH_CHECK_TYPE(tensor.defined(), expected(call, argument), "be a tensor, but got none");
}

void check_device(const Call& call, const at::Tensor& tensor, const char* argument) {
  TORCH_CHECK_TYPE(tensor.device() == call.q.device(), expected(call, argument), "be on ",
                   call.q.device(), " with ", call.is_pair ? "q" : "x", ", but got a tensor on ",
                   tensor.device());
}

// sizes are those of positions, or of cos without its columns.
void check_broadcasts(const Call& call, c10::SymIntArrayRef sizes, const at::Tensor& x,
                      const char* x_name) {
  const bool of_positions = call.positions.defined();
  const char* argument = of_positions ? "positions" : "cos";
  const c10::SymDimVector target = batch_sizes(x, call.options.embedding_axis);
  if (broadcasts_to(sizes, target)) {
    return;
  }
  std::string hint = one_tuple_hint(call);
  const std::int64_t missing = missing_dimension(sizes, target, of_positions ? 0 : 1);
  if (hint.empty() && missing != 0) {
    hint = of_positions ? c10::str(" (positions.unsqueeze(", missing, ") would be)")
                        : c10::str(" (cos.unsqueeze(", missing, ") and sin.unsqueeze(", missing,
                                   ") would be)");
  }
  TORCH_CHECK_VALUE(false, expected(call, argument), "be broadcastable with the shape of ", x_name,
                    " without embedding_axis, ", c10::SymIntArrayRef(target), ", but got ", sizes,
                    hint);
}

// One of the rotated tensors, and the slice of it.
void check_rotated(const Call& call, const at::Tensor& x, const char* argument) {
  const ApplyOptions& options = call.options;
  check_defined(call, x, argument);
  TORCH_CHECK_TYPE(is_supported_float(x.scalar_type()), expected(call, argument),
                   "be float64, float32, float16 or bfloat16, but got ", name_of(x.scalar_type()));
  check_device(call, x, argument);
  TORCH_CHECK_VALUE(x.dim() >= 1, expected(call, argument),
                    "have at least one dimension, but got a tensor with none");
  TORCH_CHECK_INDEX(-x.dim() <= options.embedding_axis && options.embedding_axis < x.dim(),
                    expected(call, "embedding_axis"), "be in [", -x.dim(), ", ", x.dim() - 1,
                    "] for the dimensions of ", argument, ", but got ", options.embedding_axis);

  const c10::SymInt size = x.sym_size(options.embedding_axis);
  TORCH_CHECK_VALUE(options.rotary_offset >= 0, expected(call, "rotary_offset"),
                    "be at least 0, but got ", options.rotary_offset);
  TORCH_CHECK_VALUE(holds(size.sym_ge(options.rotary_offset)), expected(call, "rotary_offset"),
                    "be at most ", size, ", the size of ", argument,
                    " along embedding_axis, but got ", options.rotary_offset);
  const c10::SymInt room = size - options.rotary_offset;
  const c10::SymInt dim = rotary_dim(call, x);
  TORCH_CHECK_VALUE(holds(dim.sym_ge(0)), expected(call, "rotary_dim"), "be at least 0, but got ",
                    dim);
  TORCH_CHECK_VALUE(holds((dim % 2).sym_eq(0)), expected(call, "rotary_dim"), "be even, but got ",
                    dim);
  if (has_columns(call)) {
    const auto doubled_tables = [&] {
      return c10::str(
          " (for tables with a column for each element, as Hugging Face's have, pass "
          "full_width=True; where both values of a pair are alike, cos[..., ",
          options.interleaved ? "::2" : ":N", "] will do)");
    };
    const c10::SymInt columns_per_pair = call.options.full_width ? 2 : 1;
    TORCH_CHECK_VALUE(holds(dim.sym_le(room)),
                      expected(call, call.uses_tables ? "cos" : "inv_freq"), "have at most ",
                      room / 2 * columns_per_pair, " columns, one for each ",
                      call.options.full_width ? "" : "pair ", "of the ", room, " elements of ",
                      argument, " from rotary_offset on",
                      call.uses_tables && !call.options.full_width ? doubled_tables() : "",
                      ", but got ", dim / 2 * columns_per_pair);
  } else {
    TORCH_CHECK_VALUE(holds(dim.sym_le(room)), expected(call, "rotary_dim"), "be at most ", room,
                      ", the elements of ", argument, " from rotary_offset on, but got ", dim);
  }
}

void check_positions_dtype(const Call& call) {
  const at::ScalarType dtype = call.positions.scalar_type();
  if (call.uses_tables) {
    TORCH_CHECK_TYPE(dtype == at::kInt || dtype == at::kLong, expected(call, "positions"),
                     "be int32 or int64, rows of cos and sin, but got ", name_of(dtype),
                     one_tuple_hint(call));
    return;
  }
  const char* reason = dtype == at::kHalf       ? " (float16 loses integers above 2048)"
                       : dtype == at::kBFloat16 ? " (bfloat16 loses integers above 256)"
                                                : "";
  TORCH_CHECK_TYPE(
      dtype == at::kInt || dtype == at::kLong || dtype == at::kFloat || dtype == at::kDouble,
      expected(call, "positions"), "be int32, int64, float32 or float64", reason, ", but got ",
      name_of(dtype), one_tuple_hint(call));
}

void check_inv_freq(const Call& call) {
  const ApplyOptions& options = call.options;
  const at::Tensor& inv_freq = *options.inv_freq;
  check_defined(call, inv_freq, "inv_freq");
  TORCH_CHECK_TYPE(inv_freq.scalar_type() == at::kFloat || inv_freq.scalar_type() == at::kDouble,
                   expected(call, "inv_freq"), "be float32 or float64, but got ",
                   name_of(inv_freq.scalar_type()), one_tuple_hint(call));
  check_device(call, inv_freq, "inv_freq");
  TORCH_CHECK_VALUE(inv_freq.dim() == 1 || inv_freq.dim() == 2, expected(call, "inv_freq"),
                    "have shape (N) or (A, N), but got ", inv_freq.sym_sizes());
  TORCH_CHECK_VALUE(inv_freq.dim() == 1 || holds(inv_freq.sym_size(0).sym_ge(1)),
                    expected(call, "inv_freq"), "have at least one row, but got ",
                    inv_freq.sym_sizes());
  if (options.rotary_dim.has_value()) {
    TORCH_CHECK_VALUE(holds((inv_freq.sym_size(-1) * 2).sym_eq(*options.rotary_dim)),
                      expected(call, "inv_freq"),
                      "have rotary_dim / 2 = ", static_cast<double>(*options.rotary_dim) / 2,
                      " columns, but got ", inv_freq.sym_sizes());
  }
  constexpr const char* kOrInvFreq = "be left at its default together with inv_freq, but got ";
  TORCH_CHECK_VALUE(options.max_wavelength == ApplyOptions().max_wavelength,
                    expected(call, "max_wavelength"), kOrInvFreq, options.max_wavelength);
  TORCH_CHECK_VALUE(options.scale_factor == ApplyOptions().scale_factor,
                    expected(call, "scale_factor"), kOrInvFreq, options.scale_factor);
}

void check_finite(const Call& call, const char* argument, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value), expected(call, argument), "be finite, but got ", value);
}

void check_not_negative(const Call& call, const char* argument, double value) {
  TORCH_CHECK_VALUE(value >= 0 && std::isfinite(value), expected(call, argument),
                    "be at least 0 and finite, but got ", value);
}

void check_positive(const Call& call, const char* argument, double value) {
  TORCH_CHECK_VALUE(value > 0 && std::isfinite(value), expected(call, argument),
                    "be positive and finite, but got ", value);
}

// The weight of one of the rotated tensors, x, which has been checked.
void check_weight(const Call& call, const at::Tensor& weight, const char* argument,
                  const at::Tensor& x, const char* x_name) {
  if (!weight.defined()) {
    return;
  }
  TORCH_CHECK_TYPE(is_supported_float(weight.scalar_type()), expected(call, argument),
                   "be float64, float32, float16 or bfloat16, but got ",
                   name_of(weight.scalar_type()));
  check_device(call, weight, argument);
  const c10::SymIntArrayRef sizes = weight.sym_sizes();
  const c10::SymInt size = x.sym_size(call.options.embedding_axis);
  const bool over_axes = call.options.norm_axes.has_value();
  const auto unflattened = [&] {
    return c10::str(" (for all heads: ", argument, ".view(-1, ", size, ") for (B, S, H, D), ",
                    argument, ".view(-1, 1, ", size, ") for (B, H, S, D))");
  };
  TORCH_CHECK_VALUE(!sizes.empty() && holds(sizes.back().sym_eq(size)), expected(call, argument),
                    "have a last dimension of size ", size, ", that of ", x_name,
                    " along embedding_axis, but got ", sizes,
                    over_axes && sizes.size() == 1 ? unflattened() : "");
  const c10::SymIntArrayRef batch = sizes.slice(0, sizes.size() - 1);
  const c10::SymDimVector target = batch_sizes(x, call.options.embedding_axis);
  if (broadcasts_to(batch, target)) {
    return;
  }
  std::string hint = one_tuple_hint_of_weight(call);
  const std::int64_t missing = missing_dimension(batch, target, 1);
  if (hint.empty() && missing != 0) {
    hint = c10::str(" (", argument, ".unsqueeze(", missing, ") would be",
                    over_axes && missing == -2 ? "; for (B, H, S, D) with norm_axes=(-3, -1)" : "",
                    ")");
  }
  TORCH_CHECK_VALUE(false, expected(call, argument),
                    "be broadcastable, without the last dimension, with ",
                    c10::SymIntArrayRef(target), ", the shape of ", x_name,
                    " without embedding_axis, but got ", sizes, hint);
}

// The dimensions of one of the rotated tensors, x, that share a mean.
void check_norm_axes(const Call& call, const at::Tensor& x, const char* x_name) {
  if (!call.options.norm_axes.has_value()) {
    return;
  }
  const at::IntArrayRef axes = *call.options.norm_axes;
  const std::int64_t dims = x.dim();
  std::vector<bool> is_shared(dims);
  for (const std::int64_t axis : axes) {
    TORCH_CHECK_INDEX(-dims <= axis && axis < dims, expected(call, "norm_axes"), "be in [", -dims,
                      ", ", dims - 1, "] for the dimensions of ", x_name, ", but got ", axes);
    const std::int64_t d = c10::maybe_wrap_dim(axis, dims);
    TORCH_CHECK_VALUE(!is_shared[d], expected(call, "norm_axes"), "be distinct dimensions of ",
                      x_name, ", but got ", axes);
    is_shared[d] = true;
  }
  TORCH_CHECK_VALUE(is_shared[c10::maybe_wrap_dim(call.options.embedding_axis, dims)],
                    expected(call, "norm_axes"), "contain embedding_axis, ",
                    call.options.embedding_axis, ", but got ", axes);
}

void check_norm(const Call& call, const at::Tensor& x, const char* x_name, const at::Tensor& weight,
                const char* weight_name) {
  if (call.normalizes) {
    check_norm_axes(call, x, x_name);
    check_weight(call, weight, weight_name, x, x_name);
  }
}

// The sizes of positions that broadcast with x: without the leading dimension for an (A, N)
// inv_freq.
c10::SymIntArrayRef checked_position_sizes(const Call& call) {
  const c10::SymIntArrayRef sizes = call.positions.sym_sizes();
  const auto& inv_freq = call.options.inv_freq;
  if (!inv_freq.has_value() || inv_freq->dim() == 1) {
    return sizes;
  }
  TORCH_CHECK_VALUE(!sizes.empty() && holds(sizes[0].sym_eq(inv_freq->sym_size(0))),
                    expected(call, "positions"), "have a leading dimension of size ",
                    inv_freq->sym_size(0), ", one for each row of inv_freq, but got ", sizes,
                    one_tuple_hint(call));
  return sizes.slice(1);
}

void check_tables(const Call& call) {
  for (const auto& [table, argument] : {std::pair(&call.cos, "cos"), {&call.sin, "sin"}}) {
    check_defined(call, *table, argument);
    constexpr const char* kComplexTables =
        " (a complex table is given as cos=table.real and sin=table.imag, with interleaved=True "
        "where view_as_complex made pairs)";
    TORCH_CHECK_TYPE(is_supported_float(table->scalar_type()), expected(call, argument),
                     "be float64, float32, float16 or bfloat16, but got ",
                     name_of(table->scalar_type()), table->is_complex() ? kComplexTables : "");
    check_device(call, *table, argument);
    TORCH_CHECK_VALUE(table->dim() >= 1, expected(call, argument),
                      "have at least one dimension, but got a tensor with none");
  }
  TORCH_CHECK_TYPE(call.cos.scalar_type() == call.sin.scalar_type(), expected(call, "sin"),
                   "have the dtype of cos, ", name_of(call.cos.scalar_type()), ", but got ",
                   name_of(call.sin.scalar_type()), one_tuple_hint(call));
  TORCH_CHECK_VALUE(have_same_shape(call.cos, call.sin), expected(call, "sin"),
                    "have the shape of cos, ", call.cos.sym_sizes(), ", but got ",
                    call.sin.sym_sizes(), one_tuple_hint(call));
  TORCH_CHECK_VALUE(!call.positions.defined() || call.cos.dim() == 2, expected(call, "cos"),
                    "have shape (P, N) together with positions, but got ", call.cos.sym_sizes(),
                    one_tuple_hint(call));
  if (call.options.full_width) {
    const c10::SymInt columns = call.cos.sym_size(-1);
    TORCH_CHECK_VALUE(holds((columns % 2).sym_eq(0)), expected(call, "cos"),
                      "have an even number of columns with full_width, but got ", columns);
  }
  if (call.options.rotary_dim.has_value()) {
    const std::int64_t dim = *call.options.rotary_dim;
    const c10::SymInt columns = call.cos.sym_size(-1);
    const bool is_width = !call.options.full_width && TORCH_GUARD_OR_FALSE(columns.sym_eq(dim));
    TORCH_CHECK_VALUE(holds(dim_of_columns(call).sym_eq(dim)), expected(call, "rotary_dim"), "be ",
                      dim_of_columns(call), call.options.full_width ? ", " : ", twice ",
                      "the number of columns of cos, but got ", dim,
                      is_width ? " (for tables with a column for each element, as Hugging Face's "
                                 "have, pass full_width=True)"
                               : "");
  }
}

bool is_symbolic(const at::Tensor& x) {
  return x.unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

// The queries of overlap.h. With symbolic sizes and strides only two mistakes are detected: an
// expanded dimension, and views that begin at the same element.
bool is_known_to_overlap_itself(const at::Tensor& x) {
  if (!is_symbolic(x)) {
    return overlaps_itself(x);
  }
  for (const auto d : c10::irange(x.dim())) {
    if (TORCH_GUARD_OR_FALSE(x.sym_stride(d).sym_eq(0)) &&
        TORCH_GUARD_OR_FALSE(x.sym_size(d).sym_gt(1))) {
      return true;
    }
  }
  return false;
}

bool are_known_to_overlap(const at::Tensor& x, const at::Tensor& y) {
  if (!is_symbolic(x) && !is_symbolic(y)) {
    return overlap(x, y);
  }
  return x.has_storage() && y.has_storage() && x.is_alias_of(y) &&
         TORCH_GUARD_OR_FALSE(x.sym_storage_offset().sym_eq(y.sym_storage_offset())) &&
         TORCH_GUARD_OR_FALSE(x.sym_numel().sym_gt(0)) &&
         TORCH_GUARD_OR_FALSE(y.sym_numel().sym_gt(0));
}

// Whether all elements of a tensor lie in the first `bytes` of its storage.
bool lies_within(const c10::TensorImpl& x, std::int64_t bytes) {
  if (x.numel() == 0) {
    return true;
  }
  std::int64_t end = x.storage_offset();  // in elements, then in bytes
  bool overflows = false;
  const auto add = [&](std::int64_t count, std::int64_t stride) {
    std::int64_t distance = 0;
    overflows |= c10::mul_overflows(count, stride, &distance);
    overflows |= c10::add_overflows(end, distance, &end);
  };
  if (x.is_contiguous()) {
    add(x.numel(), 1);
  } else {
    const at::IntArrayRef sizes = x.sizes();
    const at::IntArrayRef strides = x.strides();
    for (const auto d : c10::irange(sizes.size())) {
      add(sizes[d] - 1, strides[d]);
    }
    add(1, 1);
  }
  overflows |= c10::mul_overflows(end, static_cast<std::int64_t>(x.itemsize()), &end);
  return !overflows && end <= bytes;
}

// Guards memory: sizes and strides stay within the storage, which may have been resized. Tensors
// without memory, such as a compiler's, are not checked.
void check_storage(const Call& call, const at::Tensor& tensor, const char* argument) {
  const c10::TensorImpl& x = *tensor.unsafeGetTensorImpl();
  if (x.has_symbolic_sizes_strides() || x.is_python_dispatch() || x.is_meta() || !x.has_storage()) {
    return;
  }
  const c10::SymInt bytes = x.unsafe_storage().unsafeGetStorageImpl()->sym_nbytes();
  TORCH_CHECK_VALUE(bytes.is_symbolic() || lies_within(x, bytes.as_int_unchecked()),
                    expected(call, argument), "lie within its storage, but got sizes ", x.sizes(),
                    " with strides ", x.strides(), " at offset ", x.storage_offset(), " in ", bytes,
                    " bytes");
}

// Checks of in-place calls only.
void check_memory(const Call& call, const at::Tensor& x, const char* argument) {
  TORCH_CHECK_VALUE(!is_known_to_overlap_itself(x), expected(call, argument),
                    "have each element at its own place in memory, but got sizes ", x.sym_sizes(),
                    " with strides ", x.sym_strides());
  const at::Tensor inv_freq = call.options.inv_freq.value_or(at::Tensor());
  for (const auto& [other, name] : {std::pair(&call.positions, "positions"),
                                    {&inv_freq, "inv_freq"},
                                    {&call.cos, "cos"},
                                    {&call.sin, "sin"},
                                    {&call.q_weight, weight_name(call)},
                                    {&call.k_weight, "k_weight"}}) {
    TORCH_CHECK_VALUE(!other->defined() || !are_known_to_overlap(x, *other),
                      expected(call, argument), "share no memory with ", name,
                      ", but got overlapping tensors");
  }
}

// A tensor of the operators of gradient_sums.h, its gradient, and the sizes of the sums.
void check_operand(const SumCall& call, std::size_t i) {
  const auto& [axis, offset] = std::pair(call.options.embedding_axis, call.options.rotary_offset);
  const at::Tensor& x = call.xs[i];
  const at::Tensor& grad = call.grads[i];
  const at::Tensor& first = call.xs[0];
  const auto x_name = [&] { return c10::str(call.xs_name(), "[", i, "]"); };
  const auto grad_name = [&] { return c10::str("grads[", i, "]"); };
  TORCH_CHECK_TYPE(x.defined(), expected(call, x_name()), "be a tensor, but got none");
  TORCH_CHECK_TYPE(grad.defined(), expected(call, grad_name()), "be a tensor, but got none");
  TORCH_CHECK_TYPE(is_supported_float(x.scalar_type()), expected(call, x_name()),
                   "be float64, float32, float16 or bfloat16, but got ", name_of(x.scalar_type()));
  TORCH_CHECK_TYPE(x.scalar_type() == first.scalar_type() && x.device() == first.device(),
                   expected(call, x_name()), "be ", name_of(first.scalar_type()), " on ",
                   first.device(), ", as ", call.xs_name(), "[0] is, but got ",
                   name_of(x.scalar_type()), " on ", x.device());
  TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
                   expected(call, grad_name()), "be ", name_of(x.scalar_type()), " on ", x.device(),
                   ", as ", x_name(), " is, but got ", name_of(grad.scalar_type()), " on ",
                   grad.device());
  TORCH_CHECK_VALUE(have_same_shape(grad, x), expected(call, grad_name()), "have the shape of ",
                    x_name(), ", ", x.sym_sizes(), ", but got ", grad.sym_sizes());
  TORCH_CHECK_INDEX(-x.dim() <= axis && axis < x.dim(), expected(call, "embedding_axis"),
                    "be a dimension of ", x_name(), ", which has ", x.dim(), ", but got ", axis);
  const c10::SymIntArrayRef sizes = call.sizes;
  const c10::SymInt size = x.sym_size(axis);
  const c10::SymInt columns = sizes.empty() ? c10::SymInt(-1) : sizes.back();
  const std::int64_t columns_per_pair = call.options.full_width ? 2 : 1;
  // Neither side of the last comparison overflows.
  TORCH_CHECK_VALUE(offset >= 0 && holds(size.sym_ge(offset)) && holds(columns.sym_ge(0)) &&
                        holds((columns % columns_per_pair).sym_eq(0)) &&
                        holds((columns / columns_per_pair).sym_le((size - offset) / 2)),
                    expected(call, "sizes"), "end in the number of ",
                    call.options.full_width ? "elements" : "pairs", " that ", x_name(),
                    " has in its ", size, " elements from rotary_offset ", offset, " on, but got ",
                    sizes);
  const c10::SymDimVector target = batch_sizes(x, axis);
  TORCH_CHECK_VALUE(broadcasts_to(sizes.slice(0, sizes.size() - 1), target),
                    expected(call, "sizes"), "be broadcastable, without the last, with ",
                    c10::SymIntArrayRef(target), ", the shape of ", x_name(),
                    " without embedding_axis, but got ", sizes);
}

// What follows the sums, which have been checked.
void check_finish(const SumCall& call) {
  const auto& [factors, dim, rows, num_rows, dtype] = call.finish;
  const at::Device device = call.xs[0].device();
  if (factors.defined()) {
    TORCH_CHECK_TYPE(factors.device() == device, expected(call, "factors"), "be on ", device,
                     ", but got ", factors.device());
  }
  TORCH_CHECK_INDEX(std::ranges::all_of(dim, [](std::int64_t d) { return d < 0; }),
                    expected(call, "dim"), "count from the end, but got ", at::IntArrayRef(dim));
  TORCH_CHECK_VALUE(rows.defined() == num_rows.has_value(), expected(call, "num_rows"),
                    "be given with rows, and only then, but it is ",
                    num_rows.has_value() ? "given without" : "missing");
  if (rows.defined()) {
    const c10::SymIntArrayRef tokens = call.sizes.slice(0, call.sizes.size() - 1);
    TORCH_CHECK_TYPE((rows.scalar_type() == at::kInt || rows.scalar_type() == at::kLong) &&
                         rows.device() == device,
                     expected(call, "rows"), "be int32 or int64 on ", device, ", but got ",
                     name_of(rows.scalar_type()), " on ", rows.device());
    TORCH_CHECK_VALUE(have_same_sizes(rows.sym_sizes(), tokens), expected(call, "rows"),
                      "have the shape ", tokens, ", sizes without the last, but got ",
                      rows.sym_sizes());
    TORCH_CHECK_VALUE(holds(num_rows->sym_ge(0)), expected(call, "num_rows"),
                      "be at least 0, but got ", *num_rows);
  }
  TORCH_CHECK_TYPE(!dtype.has_value() || is_supported_float(*dtype), expected(call, "dtype"),
                   "be float64, float32, float16 or bfloat16, but got ",
                   name_of(dtype.value_or(at::kFloat)));
}

}  // namespace

c10::SymInt rotary_dim(const Call& call, const at::Tensor& x) {
  if (call.options.rotary_dim.has_value()) {
    return *call.options.rotary_dim;
  }
  if (has_columns(call)) {
    return dim_of_columns(call);
  }
  return x.sym_size(call.options.embedding_axis) - call.options.rotary_offset;
}

void check(const Call& call) {
  const char* q_name = call.is_pair ? "q" : "x";
  const at::Tensor inv_freq = call.options.inv_freq.value_or(at::Tensor());
  const std::pair<const at::Tensor&, const char*> tensors[] = {{call.q, q_name},
                                                               {call.k, "k"},
                                                               {call.positions, "positions"},
                                                               {inv_freq, "inv_freq"},
                                                               {call.cos, "cos"},
                                                               {call.sin, "sin"},
                                                               {call.q_weight, weight_name(call)},
                                                               {call.k_weight, "k_weight"}};
  for (const auto& [tensor, argument] : tensors) {
    if (tensor.defined()) {
      check_layout(call, tensor);
      check_storage(call, tensor, argument);
    }
  }
  check_defined(call, call.q, q_name);
  if (call.normalizes) {
    check_not_negative(call, "eps", call.options.eps);
    check_finite(call, "weight_offset", call.options.weight_offset);
  }
  if (call.uses_tables) {
    check_tables(call);
  } else {
    check_defined(call, call.positions, "positions");
    check_positive(call, "max_wavelength", call.options.max_wavelength);
    check_positive(call, "scale_factor", call.options.scale_factor);
    check_finite(call, "attention_factor", call.options.attention_factor);
    if (call.options.inv_freq.has_value()) {
      check_inv_freq(call);
    }
  }
  if (call.positions.defined()) {
    check_positions_dtype(call);
    check_device(call, call.positions, "positions");
  }

  const c10::SymIntArrayRef broadcast_sizes =
      call.positions.defined() ? checked_position_sizes(call)
                               : call.cos.sym_sizes().slice(0, call.cos.dim() - 1);
  check_rotated(call, call.q, q_name);
  check_broadcasts(call, broadcast_sizes, call.q, q_name);
  check_norm(call, call.q, q_name, call.q_weight, weight_name(call));
  if (call.is_pair) {
    check_rotated(call, call.k, "k");
    check_broadcasts(call, broadcast_sizes, call.k, "k");
    check_norm(call, call.k, "k", call.k_weight, "k_weight");
    if (!call.options.rotary_dim.has_value() && !has_columns(call)) {
      const c10::SymInt q_dim = rotary_dim(call, call.q);
      const c10::SymInt k_dim = rotary_dim(call, call.k);
      TORCH_CHECK_VALUE(holds(q_dim.sym_eq(k_dim)), expected(call, "rotary_dim"),
                        "be given where q and k have slices of different sizes, whose frequencies "
                        "would differ (",
                        q_dim, " and ", k_dim, " elements), but got None");
    }
  }
  if (call.in_place) {
    check_memory(call, call.q, q_name);
    if (call.is_pair) {
      check_memory(call, call.k, "k");
      TORCH_CHECK_VALUE(!are_known_to_overlap(call.q, call.k), expected(call, "q and k"),
                        "share no element, but got overlapping views of one memory");
    }
  }
}

void check(const NormGradientCall& call) {
  check(static_cast<const Call&>(call));
  const auto check_grad = [&](const at::Tensor& grad, const char* argument, const at::Tensor& x,
                              const char* x_name) {
    check_defined(call, grad, argument);
    check_storage(call, grad, argument);
    TORCH_CHECK_TYPE(grad.scalar_type() == x.scalar_type() && grad.device() == x.device(),
                     expected(call, argument), "be ", name_of(x.scalar_type()), " on ", x.device(),
                     ", as ", x_name, " is, but got ", name_of(grad.scalar_type()), " on ",
                     grad.device());
    TORCH_CHECK_VALUE(have_same_shape(grad, x), expected(call, argument), "have the shape of ",
                      x_name, ", ", x.sym_sizes(), ", but got ", grad.sym_sizes());
  };
  if (call.is_pair) {
    check_grad(call.q_grad, "grad_q", call.q, "q");
    check_grad(call.k_grad, "grad_k", call.k, "k");
  } else {
    check_grad(call.q_grad, "grad", call.q, "x");
  }
}

void check(const SumCall& call) {
  const std::size_t count = call.xs.size();
  TORCH_CHECK_VALUE(count == 1 || count == 2, expected(call, call.xs_name()),
                    "be one tensor or two, but got ", count);
  TORCH_CHECK_VALUE(call.grads.size() == count, expected(call, "grads"), "be as many as ",
                    call.xs_name(), ", ", count, ", but got ", call.grads.size());
  for (const auto i : c10::irange(count)) {
    check_operand(call, i);
  }
  check_finish(call);
}

void check_rows_exist(const Call& call) {
  if (!call.uses_tables || !call.positions.defined() || call.positions.numel() == 0) {
    return;
  }
  const std::int64_t num_rows = call.cos.size(0);
  const at::Tensor positions = call.positions.to(at::kLong).contiguous();
  const auto* rows = positions.const_data_ptr<std::int64_t>();
  for (const auto i : c10::irange(positions.numel())) {
    TORCH_CHECK_INDEX(0 <= rows[i] && rows[i] < num_rows, expected(call, "positions"), "be in [0, ",
                      num_rows, "), the rows of cos and sin, but got ", rows[i]);
  }
}

}  // namespace rope
