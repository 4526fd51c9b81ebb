// libFuzzer's target for the operators: bytes become the arguments of one call, which must end in a
// result or in an error of the form that messages.h describes. tests/sanitize.sh runs it under
// AddressSanitizer and UndefinedBehaviorSanitizer.
//
// The operators are called through the dispatcher, as the functions of rope/rope.h do, each in one
// line. A call is first drawn as a valid one: shapes that broadcast, any layout and values. Then up
// to three faults may be put into its tensors, and any option may be absurd.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/Backtrace.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "bytes.h"
#include "call.h"
#include "gradient_sums.h"
#include "norm_operators.h"
#include "rotate_operators.h"

namespace {

using fuzz::Bytes;
using rope::Call;
using Sizes = std::vector<std::int64_t>;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "fuzz_operators: %s\n", what.c_str());
  std::abort();
}

// Larger calls are left out: they take long and find nothing more.
constexpr std::int64_t kMostElements = 1 << 13;
constexpr std::int64_t kMostStored = 1 << 16;

// -------------------------------------------------------------------------------------------------
// Tensors

constexpr at::ScalarType kFloats[] = {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble};
constexpr at::ScalarType kIntegers[] = {at::kLong, at::kInt};
constexpr at::ScalarType kPositions[] = {at::kLong, at::kInt, at::kFloat, at::kDouble};
constexpr at::ScalarType kAnyDtype[] = {
    at::kFloat, at::kDouble, at::kHalf, at::kBFloat16,     at::kLong,         at::kInt,
    at::kShort, at::kByte,   at::kBool, at::kComplexFloat, at::kFloat8_e4m3fn};

// `length` values in a row. Nothing lies behind them in their allocation.
at::Tensor values(Bytes& bytes, std::int64_t length, at::ScalarType dtype) {
  const at::Tensor numbers = at::arange(length, at::kDouble);
  switch (bytes.below(6)) {
    case 1:
      return at::zeros({length}, dtype);
    case 2:
      return numbers.sub(length / 2).to(dtype);
    case 3:  // In turn, with plain numbers between: faults must stay in their own pair.
      if (at::isFloatingType(dtype)) {
        const double value = bytes.real();
        return at::where(numbers.remainder(3).eq(0), value, numbers).to(dtype);
      }
      return at::full({length}, bytes.integer(), at::kLong).to(dtype);
    case 4:
      return numbers.mul(1e6).to(dtype);
    case 5:
      return numbers.mul(1e-40).to(dtype);
    default:
      return numbers.remainder(7).to(dtype);
  }
}

// One past the last element in the storage, in elements, at most 2^100.
__int128 end_of(at::IntArrayRef sizes, at::IntArrayRef strides, std::int64_t offset) {
  constexpr __int128 kMost = static_cast<__int128>(1) << 100;
  __int128 last = offset;
  for (std::size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) {
      return 0;
    }
    const __int128 distance = static_cast<__int128>(sizes[d] - 1) * strides[d];
    last = std::min(last + std::min(distance, kMost), kMost);
  }
  return last + 1;
}

// A tensor in any layout, whose storage ends with its last element.
at::Tensor tensor(Bytes& bytes, const Sizes& sizes, at::ScalarType dtype,
                  bool may_be_expanded = true) {
  const auto dims = static_cast<int>(sizes.size());
  Sizes order(dims);
  for (int d = 0; d < dims; ++d) {
    order[d] = d;
  }
  const int layout = bytes.below(4);
  if (layout >= 1 && dims > 1) {
    std::swap(order[bytes.below(dims)], order[bytes.below(dims)]);
  }
  Sizes strides(dims);
  std::int64_t stride = layout == 2 ? 1 + bytes.below(3) : 1;
  for (int i = dims - 1; i >= 0; --i) {
    const std::int64_t d = order[i];
    strides[d] = stride;
    if (layout == 3 && may_be_expanded && bytes.rarely()) {
      strides[d] = 0;
      continue;
    }
    stride *= std::max<std::int64_t>(sizes[d], 1);
    stride += layout >= 2 ? bytes.below(4) : 0;
  }
  const std::int64_t offset = layout >= 2 ? bytes.below(9) : 0;
  const auto length = static_cast<std::int64_t>(end_of(sizes, strides, offset));
  TORCH_CHECK(length <= kMostStored);
  return values(bytes, length, dtype).as_strided(sizes, strides, length == 0 ? 0 : offset);
}

// Whether every element lies in the storage. Tensors without memory do.
bool is_within_storage(const at::Tensor& x) {
  if (!x.defined() || x.is_meta()) {
    return true;
  }
  const __int128 end = end_of(x.sizes(), x.strides(), x.storage_offset());
  return end * static_cast<__int128>(x.itemsize()) <= static_cast<__int128>(x.storage().nbytes());
}

void put_fault(Bytes& bytes, at::Tensor& x) {
  if (!x.defined()) {
    x = tensor(bytes, Sizes(bytes.below(4), 1 + bytes.below(9)), bytes.one_of(kAnyDtype));
    return;
  }
  if (!is_within_storage(x) || x.numel() > kMostElements) {
    return;  // ATen's operators would read beyond it, or take long.
  }
  switch (bytes.below(12)) {
    case 0:
      x = at::Tensor();
      break;
    case 1:
      x = at::empty_strided(x.sizes(), x.strides(), x.options().device(at::kMeta));
      break;
    case 2:
      x = x.to(bytes.one_of(kAnyDtype));
      break;
    case 3:
      x = x.unsqueeze(bytes.below(static_cast<int>(x.dim()) + 1));
      break;
    case 4:
      if (x.dim() > 0) {
        x = x.select(bytes.below(static_cast<int>(x.dim())), 0);
      }
      break;
    case 5:
      if (x.dim() > 0) {
        const int d = bytes.below(static_cast<int>(x.dim()));
        x = x.narrow(d, 0,
                     bytes.below(static_cast<int>(std::min<std::int64_t>(x.size(d), 99)) + 1));
      }
      break;
    case 6:  // Sizes and strides that no storage has, as those of a storage that was resized.
    case 7: {
      Sizes sizes = x.sizes().vec();
      Sizes strides = x.strides().vec();
      std::int64_t offset = x.storage_offset();
      x = x.as_strided(sizes, strides, offset);  // its own sizes
      for (int count = bytes.below(3); count >= 0 && x.dim() > 0; --count) {
        Sizes& changed = bytes.flag() ? strides : sizes;
        const std::int64_t value = bytes.integer();
        changed[bytes.below(static_cast<int>(x.dim()))] = value < 0 ? ~value : value;
      }
      const std::int64_t value = bytes.rarely() ? bytes.integer() : offset;
      offset = value < 0 ? ~value : value;
      x.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset);
      break;
    }
    case 8:
      x.storage().unsafeGetStorageImpl()->set_nbytes(x.storage().nbytes() / (1 + bytes.below(4)));
      break;
    case 9: {  // a huge dimension in front that takes no memory
      Sizes sizes = x.sizes().vec();
      const std::int64_t size = bytes.integer();
      sizes.insert(sizes.begin(), size < 0 ? ~size : size);
      x = x.expand(sizes);
      break;
    }
    case 10:
      x = std::ranges::count(kFloats, x.scalar_type()) > 0 ? x._neg_view() : x;
      break;
    case 11:
      x = x.dim() > 0 ? x.slice(0, 0, 0) : x;
      break;
  }
}

// -------------------------------------------------------------------------------------------------
// Calls

constexpr std::int64_t kLengths[] = {2, 1, 3, 5, 0, 17, 33};
constexpr std::int64_t kPairs[] = {4, 1, 2, 8, 3, 9, 16, 17, 32, 33, 0, 64, 100};

// What a valid call has, before faults.
struct Shape {
  Sizes tokens;  // of x without the embedding axis
  Sizes angles;  // sizes that broadcast with them
  std::int64_t num_pairs;
  std::int64_t axis;  // of x
  std::int64_t axis_size;
  std::int64_t offset;

  Sizes of(std::int64_t size) const {
    Sizes sizes = tokens;
    sizes.insert(sizes.begin() + axis, size);
    return sizes;
  }
};

// Sizes that broadcast with `sizes`.
Sizes broadcastable(Bytes& bytes, const Sizes& sizes) {
  const auto dims = static_cast<int>(sizes.size());
  Sizes result(sizes.begin() + bytes.below(dims + 1), sizes.end());
  const int ones = bytes.below(1 << 4);
  for (std::size_t d = 0; d < result.size(); ++d) {
    result[d] = ones >> d & 1 ? 1 : result[d];
  }
  return result;
}

Shape draw_shape(Bytes& bytes) {
  Shape shape;
  const int dims = bytes.rarely() ? bytes.below(14) : bytes.below(5);
  for (int d = 0; d < dims; ++d) {
    shape.tokens.push_back(dims > 4 ? 1 + bytes.below(2) : bytes.one_of(kLengths));
  }
  shape.angles = broadcastable(bytes, shape.tokens);
  shape.num_pairs = bytes.one_of(kPairs);
  shape.axis = dims - bytes.below(dims + 1);
  shape.offset = bytes.rarely() ? bytes.below(9) : 0;
  shape.axis_size = shape.offset + 2 * shape.num_pairs + (bytes.rarely() ? bytes.below(9) : 0);
  return shape;
}

struct Kind {
  bool uses_tables;
  bool normalizes;
  bool is_pair;
};

Sizes norm_axes(Bytes& bytes, const Shape& shape) {
  Sizes axes = {shape.axis};
  const auto dims = static_cast<std::int64_t>(shape.tokens.size()) + 1;
  for (int count = bytes.below(4); count > 0; --count) {
    axes.push_back((axes.back() + 1) % dims - (bytes.flag() ? dims : 0));
  }
  if (bytes.rarely()) {
    axes[bytes.below(static_cast<int>(axes.size()))] = bytes.integer();
  }
  return axes;
}

// A call without faults.
Call draw_call(Bytes& bytes, const Kind& kind, const Shape& shape) {
  Call call;
  call.uses_tables = kind.uses_tables;
  call.normalizes = kind.normalizes;
  call.is_pair = kind.is_pair;
  const at::ScalarType dtype = bytes.one_of(kFloats);
  call.q = tensor(bytes, shape.of(shape.axis_size), dtype);
  if (kind.is_pair) {
    Shape of_k = shape;
    for (std::size_t i = 0; i < of_k.tokens.size(); ++i) {  // other heads
      const bool is_head = i + shape.angles.size() < of_k.tokens.size();
      of_k.tokens[i] = is_head && bytes.flag() ? 1 : of_k.tokens[i];
    }
    call.k =
        tensor(bytes, of_k.of(shape.axis_size), bytes.rarely() ? bytes.one_of(kFloats) : dtype);
  }
  const auto weight = [&]() -> at::Tensor {
    if (!kind.normalizes || bytes.below(3) == 0) {
      return {};
    }
    Sizes sizes = bytes.flag() ? broadcastable(bytes, shape.tokens) : Sizes();
    sizes.push_back(shape.axis_size);
    return tensor(bytes, sizes, bytes.one_of(kFloats));
  };
  call.q_weight = weight();
  call.k_weight = kind.is_pair ? weight() : at::Tensor();

  rope::CallOptions& options = call.options;
  options.embedding_axis = shape.axis;
  options.rotary_offset = shape.offset;
  options.interleaved = bytes.flag();
  options.conjugate = bytes.flag();
  if (kind.uses_tables) {
    options.full_width = bytes.flag();
    Sizes sizes = shape.angles;
    if (bytes.flag()) {
      const int num_rows = 1 + bytes.below(9);
      call.positions = tensor(bytes, shape.angles, bytes.one_of(kIntegers));
      if (!bytes.rarely()) {
        call.positions = call.positions.remainder(num_rows);
      }
      sizes = {num_rows};
    }
    sizes.push_back(shape.num_pairs * (options.full_width ? 2 : 1));
    const at::ScalarType of_tables = bytes.one_of(kFloats);
    call.cos = tensor(bytes, sizes, of_tables);
    call.sin = tensor(bytes, sizes, of_tables);
  } else {
    Sizes sizes = shape.angles;
    switch (bytes.below(3)) {
      case 1:
        options.inv_freq =
            tensor(bytes, {shape.num_pairs}, bytes.flag() ? at::kDouble : at::kFloat);
        break;
      case 2: {
        const std::int64_t num_axes = 1 + bytes.below(4);
        sizes.insert(sizes.begin(), num_axes);
        options.inv_freq =
            tensor(bytes, {num_axes, shape.num_pairs}, bytes.flag() ? at::kDouble : at::kFloat);
        break;
      }
      default:
        options.rotary_dim = 2 * shape.num_pairs;
    }
    call.positions = tensor(bytes, sizes, bytes.one_of(kPositions));
  }
  if (kind.normalizes) {
    options.norm_last = bytes.flag();
    if (bytes.flag()) {
      options.norm_axes = norm_axes(bytes, shape);
    }
  }
  return call;
}

void put_absurd_options(Bytes& bytes, rope::CallOptions& options) {
  for (int count = bytes.below(3); count > 0; --count) {
    switch (bytes.below(9)) {
      case 0:
        options.embedding_axis = bytes.integer();
        break;
      case 1:
        options.rotary_dim = bytes.integer();
        break;
      case 2:
        options.rotary_offset = bytes.integer();
        break;
      case 3:
        options.max_wavelength = bytes.real();
        break;
      case 4:
        options.scale_factor = bytes.real();
        break;
      case 5:
        options.attention_factor = bytes.real();
        break;
      case 6:
        options.eps = bytes.real();
        break;
      case 7:
        options.weight_offset = bytes.real();
        break;
      case 8:
        options.rotary_dim = std::nullopt;
        break;
    }
  }
}

// Those that the call's operator has arguments for.
std::vector<at::Tensor*> tensors_of(Call& call) {
  std::vector<at::Tensor*> tensors = {&call.q, &call.positions};
  if (call.is_pair) {
    tensors.push_back(&call.k);
  }
  if (call.uses_tables) {
    tensors.insert(tensors.end(), {&call.cos, &call.sin});
  }
  if (call.options.inv_freq.has_value()) {
    tensors.push_back(&*call.options.inv_freq);
  }
  if (call.normalizes) {
    tensors.push_back(&call.q_weight);
  }
  if (call.normalizes && call.is_pair) {
    tensors.push_back(&call.k_weight);
  }
  return tensors;
}

void put_faults(Bytes& bytes, const std::vector<at::Tensor*>& tensors) {
  for (int count = bytes.below(4); count > 0; --count) {
    put_fault(bytes, *tensors[bytes.below(static_cast<int>(tensors.size()))]);
  }
  if (bytes.rarely()) {  // Two arguments share memory.
    at::Tensor& x = *tensors[bytes.below(static_cast<int>(tensors.size()))];
    const at::Tensor& y = *tensors[bytes.below(static_cast<int>(tensors.size()))];
    // An empty one that is changed in place and saved for its own gradient would never be freed.
    x = y.defined() && y.numel() > 0 ? y : x;
  }
}

bool are_safe(const std::vector<at::Tensor*>& tensors) {
  return std::ranges::all_of(tensors, [](const at::Tensor* x) { return is_within_storage(*x); });
}

// Whether an empty tensor has sizes or strides with which ATen's own arithmetic overflows, or whose
// sums take all memory.
bool is_huge_and_empty(const at::Tensor& x) {
  const auto is_huge = [](std::int64_t number) { return number > 1 << 20; };
  return x.numel() == 0 &&
         (std::ranges::any_of(x.sizes(), is_huge) || std::ranges::any_of(x.strides(), is_huge));
}

// Whether a valid call of these would take too much time or memory, or PyTorch would read beyond a
// storage before the call gets to the library, for a copy of a lazily negated view.
bool is_left_out(const std::vector<at::Tensor*>& tensors) {
  return std::ranges::any_of(tensors, [](const at::Tensor* x) {
    if (!x->defined() || is_huge_and_empty(*x)) {
      return x->defined();
    }
    if (x->is_meta()) {
      return false;
    }
    return is_within_storage(*x) ? x->numel() > kMostElements : x->is_neg();
  });
}

std::string describe(const std::vector<at::Tensor*>& tensors) {
  std::string text;
  for (const at::Tensor* x : tensors) {
    text += x->defined() ? c10::str("\n  ", x->scalar_type(), " on ", x->device(), ", sizes ",
                                    x->sizes(), ", strides ", x->strides(), ", offset ",
                                    x->storage_offset(), ", of ", x->storage().nbytes(), " bytes")
                         : std::string("\n  undefined");
  }
  return text;
}

// -------------------------------------------------------------------------------------------------
// What a call may end in

// Of errors that are not ours: autograd's rules of calls in place, sizes too large for any result,
// and calls that do not reach a kernel for want of a tensor.
bool is_error_of_torch(const std::string& message) {
  for (const char* part : {"a leaf Variable that requires grad", "modified by an inplace operation",
                           "overflow", "There were no tensor arguments to this function"}) {
    if (message.find(part) != std::string::npos) {
      return true;
    }
  }
  return false;
}

// Runs a call on tensors. Errors begin with one of the names, of operators without namespace.
// `ends_in_aten`: or they are ATen's.
template <typename Run>
void expect_result_or_error(const std::vector<std::string>& names,
                            const std::vector<at::Tensor*>& tensors, const Run& run,
                            bool ends_in_aten = false) {
  const std::string what = "rope::" + names[0] + "() ";
  const bool is_safe = are_safe(tensors);
  try {
    run();
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    const bool has_form = std::ranges::any_of(names, [&](const std::string& name) {
      return message.starts_with("rope::" + name + "(): expected ") &&
             message.find(", but ") != std::string::npos;
    });
    const bool is_internal = message.find("INTERNAL ASSERT") != std::string::npos;
    if (is_internal || (!has_form && !ends_in_aten && !is_error_of_torch(message))) {
      fail(what + "threw: " + message + describe(tensors));
    }
    return;
  } catch (const std::exception& error) {
    fail(what + "threw something else: " + error.what());
  }
  if (!is_safe) {
    fail(what + "accepted a tensor that lies outside its storage" + describe(tensors));
  }
}

void expect_like(const at::Tensor& y, const at::Tensor& x) {
  if (y.sizes() != x.sizes() || y.scalar_type() != x.scalar_type() || y.device() != x.device()) {
    fail(c10::str("a result has sizes ", y.sizes(), " and dtype ", y.scalar_type(), " for ",
                  x.sizes(), " and ", x.scalar_type()));
  }
}

void backward(const at::Tensor& y) {
  if (y.defined() && y.requires_grad()) {
    y.backward(at::ones_like(y), /*retain_graph=*/true);
  }
}

// -------------------------------------------------------------------------------------------------
// Operators

void call_operator(Bytes& bytes, const Kind& kind) {
  const bool in_place = bytes.flag();
  const bool requires_grad = bytes.rarely();
  const Shape shape = draw_shape(bytes);
  Call call = draw_call(bytes, kind, shape);
  call.in_place = in_place;
  put_absurd_options(bytes, call.options);
  const std::vector<at::Tensor*> tensors = tensors_of(call);
  put_faults(bytes, tensors);
  if (is_left_out(tensors)) {
    return;
  }
  for (at::Tensor* x : tensors) {
    if (requires_grad && x->defined() && at::isFloatingType(x->scalar_type()) && !x->is_meta() &&
        is_within_storage(*x) && bytes.flag()) {
      *x = x->detach().requires_grad_();
      if (in_place && bytes.flag()) {
        *x = x->mul(1);  // no leaf
      }
    }
  }
  // Some calls in place are functional ones and a copy, for autograd and lazily negated views.
  Call functional = call;
  functional.in_place = false;
  expect_result_or_error({call.name(), functional.name()}, tensors, [&] {
    const rope::Outputs outputs = dispatch(call);
    expect_like(outputs.q, call.q);
    if (call.is_pair) {
      expect_like(outputs.k, call.k);
    }
    backward(outputs.q);
    backward(outputs.k);
  });
}

void call_decomposed(Bytes& bytes, const Kind& kind) {
  const Shape shape = draw_shape(bytes);
  Call call = draw_call(bytes, kind, shape);
  put_absurd_options(bytes, call.options);
  const std::vector<at::Tensor*> tensors = tensors_of(call);
  put_faults(bytes, tensors);
  if (is_left_out(tensors)) {
    return;
  }
  const auto run = [&]<typename Family>(Family) {
    using Decomposed = rope::RotateOperator<Family, rope::Form::kDecomposed>;
    // Its checks are those of the operator that it stands for, but for rows that do not exist.
    expect_result_or_error(
        {call.name()}, tensors, [&] { expect_like(Decomposed::dispatch(call), call.q); },
        /*ends_in_aten=*/kind.uses_tables && call.positions.defined());
  };
  if (kind.normalizes) {
    kind.uses_tables ? run(rope::Normalized<rope::AnglesFromTables>())
                     : run(rope::Normalized<rope::AnglesFromPositions>());
  } else {
    kind.uses_tables ? run(rope::AnglesFromTables()) : run(rope::AnglesFromPositions());
  }
}

void call_norm_gradient(Bytes& bytes, const Kind& kind) {
  const Shape shape = draw_shape(bytes);
  rope::NormGradientCall call;
  static_cast<Call&>(call) = draw_call(bytes, kind, shape);
  call.q_grad = tensor(bytes, call.q.sizes().vec(), call.q.scalar_type());
  if (kind.is_pair) {
    call.k_grad = tensor(bytes, call.k.sizes().vec(), call.k.scalar_type());
  }
  const int wanted = ~bytes.below(16);
  for (int i = 0; i < 4; ++i) {
    call.wants[i] = wanted >> i & 1;
  }
  put_absurd_options(bytes, call.options);
  std::vector<at::Tensor*> tensors = tensors_of(call);
  tensors.push_back(&call.q_grad);
  if (kind.is_pair) {
    tensors.push_back(&call.k_grad);
  }
  put_faults(bytes, tensors);
  if (is_left_out(tensors)) {
    return;
  }
  const auto expect_one = [](const at::Tensor& gradient, const at::Tensor& x) {
    if (gradient.defined()) {
      expect_like(gradient, x);
    }
  };
  const auto run = [&]<typename Angles>(Angles) {
    expect_result_or_error({call.name(), call.Call::name()}, tensors, [&] {
      if (kind.is_pair) {
        const auto [q, k, q_weight, k_weight] =
            rope::NormGradientOperator<Angles, rope::Form::kPair>::dispatch(call);
        expect_one(q, call.q);
        expect_one(k, call.k);
        expect_one(q_weight, call.q_weight);
        expect_one(k_weight, call.k_weight);
      } else {
        const auto [x, weight] =
            rope::NormGradientOperator<Angles, rope::Form::kSingle>::dispatch(call);
        expect_one(x, call.q);
        expect_one(weight, call.q_weight);
      }
    });
  };
  kind.uses_tables ? run(rope::AnglesFromTables()) : run(rope::AnglesFromPositions());
}

void call_sums(Bytes& bytes, bool uses_tables) {
  const Shape shape = draw_shape(bytes);
  const at::ScalarType dtype = bytes.one_of(kFloats);
  const int count = 1 + bytes.below(3);
  std::vector<at::Tensor> grads;
  std::vector<at::Tensor> xs;
  for (int i = 0; i < count; ++i) {
    grads.push_back(tensor(bytes, shape.of(shape.axis_size), dtype));
    xs.push_back(tensor(bytes, shape.of(shape.axis_size), dtype));
  }
  rope::CallOptions options;
  options.embedding_axis = shape.axis;
  options.rotary_offset = shape.offset;
  options.interleaved = bytes.flag();
  options.conjugate = bytes.flag();
  options.full_width = uses_tables && bytes.flag();
  put_absurd_options(bytes, options);
  std::vector<c10::SymInt> sizes(shape.angles.begin(), shape.angles.end());
  sizes.emplace_back(shape.num_pairs * (options.full_width ? 2 : 1));
  if (bytes.rarely()) {
    sizes[bytes.below(static_cast<int>(sizes.size()))] = bytes.integer();
  }

  rope::SumCall call;
  call.uses_tables = uses_tables;
  copy_options(options, call.options);
  if (bytes.rarely()) {
    call.finish.dtype = bytes.one_of(kAnyDtype);
  }
  call.wants = {!bytes.flag(), !bytes.flag()};
  if (uses_tables && bytes.flag()) {
    const int num_rows = 1 + bytes.below(9);
    call.finish.num_rows = bytes.rarely() ? -bytes.below(9) : num_rows;
    call.finish.rows = tensor(bytes, shape.angles, bytes.one_of(kIntegers)).remainder(num_rows);
  } else if (!uses_tables && bytes.flag()) {
    call.finish.factors = tensor(bytes, {shape.num_pairs}, bytes.one_of(kPositions));
    call.finish.dim = {-1};
    if (bytes.rarely()) {
      call.finish.dim = {bytes.integer()};
    }
  }
  std::vector<at::Tensor*> tensors = {&call.finish.rows, &call.finish.factors};
  for (int i = 0; i < count; ++i) {
    tensors.insert(tensors.end(), {&grads[i], &xs[i]});
  }
  put_faults(bytes, tensors);
  if (is_left_out(tensors) || !are_safe(tensors)) {
    return;
  }
  call.grads = at::TensorList(grads).slice(0, grads.size() - (bytes.rarely() ? 1 : 0));
  call.xs = xs;
  call.sizes = sizes;
  // What follows the sums is checked by the ATen operators that carry it out.
  const auto run = [&] {
    if (uses_tables) {
      rope::CosSinGradient::dispatch(call);
    } else {
      rope::AngleGradient::dispatch(call);
    }
  };
  expect_result_or_error({call.name()}, tensors, run, /*ends_in_aten=*/true);
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  at::set_num_threads(1);
  // Unwinding for each error would take most of the time.
  c10::SetStackTraceFetcher([] { return std::string(); });
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Bytes bytes(data, size);
  const int family = bytes.below(4);
  const Kind kind = {
      .uses_tables = family % 2 == 1, .normalizes = family >= 2, .is_pair = bytes.flag()};
  try {
    switch (bytes.below(8)) {
      default:
        call_operator(bytes, kind);
        break;
      case 5:
        call_decomposed(bytes, {kind.uses_tables, kind.normalizes, /*is_pair=*/false});
        break;
      case 6:
        call_norm_gradient(bytes, {kind.uses_tables, /*normalizes=*/true, kind.is_pair});
        break;
      case 7:
        call_sums(bytes, kind.uses_tables);
        break;
    }
  } catch (const c10::Error&) {
    return -1;  // PyTorch made no such arguments.
  }
  return 0;
}
