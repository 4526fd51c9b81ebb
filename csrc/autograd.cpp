// Derivatives. Rotation is linear in x: its backward is the same operator with conjugate flipped,
// and saves no activation. Gradients of positions, inv_freq, cos and sin are computed only when
// needed (gradients.h).
#include "autograd.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/irange.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "call.h"
#include "checks.h"
#include "decomposition.h"
#include "gradients.h"
#include "options.h"
#include "rotate_operators.h"

namespace rope {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// -------------------------------------------------------------------------------------------------
// The autograd function

void save_options(AutogradContext* ctx, const CallOptions& options) {
  visit_options(options,
                [&](const char* name, const auto& member) { ctx->saved_data[name] = member; });
}

void load_options(AutogradContext* ctx, CallOptions& options) {
  visit_options(options, [&](const char* name, auto& member) {
    member = ctx->saved_data[name].to<std::decay_t<decltype(member)>>();
  });
}

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor inv_freq_of(const Call& call) { return call.options.inv_freq.value_or(at::Tensor()); }

bool angles_require_grad(const Call& call) {
  return requires_grad(call.positions) || requires_grad(call.cos) || requires_grad(call.sin) ||
         requires_grad(inv_freq_of(call));
}

// Where only one tensor of a pair requires grad (LoRA on q alone), the other's output must not.
variable_list outputs_without_grad(const Call& call, const Outputs& outputs) {
  variable_list constant;
  if (!angles_require_grad(call)) {
    if (!requires_grad(call.q)) {
      constant.push_back(outputs.q);
    }
    if (call.is_pair && !requires_grad(call.k)) {
      constant.push_back(outputs.k);
    }
  }
  return constant;
}

struct Rotate : torch::autograd::Function<Rotate> {
  static constexpr bool is_traceable = true;

  // The order of the tensors among the arguments of forward, the saved tensors and the gradients.
  enum Argument : std::size_t { kQ, kK, kPositions, kInvFreq, kCos, kSin, kNumArguments };

  // The tensors are those of `call`, passed separately because autograd only sees arguments.
  // `to_run` is the call to carry out: another one, or null, where an in-place pair is recorded as
  // two nodes. Sets *context to the node's context.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const OptionalTensor& k,
                               const OptionalTensor& positions, const OptionalTensor& inv_freq,
                               const OptionalTensor& cos, const OptionalTensor& sin,
                               const Call& call, const Call* to_run, AutogradContext** context) {
    *context = ctx;
    const at::AutoDispatchBelowADInplaceOrView guard;
    // Nothing is recorded below autograd, whatever the grad mode. PyTorch turned it off, and a
    // compiler would then treat the mutation of an argument as one without a gradient.
    const at::AutoGradMode mode(true);
    Outputs outputs = to_run == nullptr ? Outputs() : dispatch(*to_run);
    if (call.in_place) {
      outputs = {call.q, call.k};
    }
    variable_list results{outputs.q};
    if (call.is_pair) {
      results.push_back(outputs.k);
    }
    if (call.in_place) {
      ctx->mark_dirty(results);
    }
    ctx->mark_non_differentiable(outputs_without_grad(call, outputs));
    ctx->set_materialize_grads(false);
    save_options(ctx, call.options);
    ctx->saved_data["uses_tables"] = call.uses_tables;

    // Gradients of angles need the output, gradients of tables the input, the gradient of x
    // neither.
    variable_list saved(kNumArguments);
    if (angles_require_grad(call)) {
      saved[kQ] = call.uses_tables ? q : outputs.q;
      saved[kK] = call.uses_tables ? k.value_or(at::Tensor()) : outputs.k;
    }
    saved[kPositions] = positions.value_or(at::Tensor());
    saved[kInvFreq] = inv_freq.value_or(at::Tensor());
    saved[kCos] = cos.value_or(at::Tensor());
    saved[kSin] = sin.value_or(at::Tensor());
    ctx->save_for_backward(std::move(saved));
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    Call call;
    load_options(ctx, call.options);
    call.uses_tables = ctx->saved_data["uses_tables"].toBool();
    call.positions = saved[kPositions];
    call.cos = saved[kCos];
    call.sin = saved[kSin];
    if (saved[kInvFreq].defined()) {
      call.options.inv_freq = saved[kInvFreq];
    }
    const at::Tensor& grad_q = grads[0];
    const at::Tensor grad_k = grads.size() > 1 ? grads[1] : at::Tensor();

    // Autograd numbers only the tensors that are defined.
    bool wants[kNumArguments] = {};
    std::size_t edge = 0;
    for (const std::size_t argument : c10::irange(std::size_t{kNumArguments})) {
      const bool given = argument == kQ || (argument == kK && grads.size() > 1) ||
                         (argument > kK && saved[argument].defined());
      wants[argument] = given && ctx->needs_input_grad(edge);
      edge += given ? 1 : 0;
    }

    variable_list results(kNumArguments + 3);  // the last three for call, to_run and context
    const bool wants_q = grad_q.defined() && wants[kQ];
    const bool wants_k = grad_k.defined() && wants[kK];
    if (wants_q || wants_k) {
      Call transposed = call;
      transposed.options.conjugate = !call.options.conjugate;
      if (wants_q && wants_k) {
        const Outputs outputs = dispatch(on(transposed, grad_q, grad_k));
        results[kQ] = outputs.q;
        results[kK] = outputs.k;
      } else if (wants_q) {
        results[kQ] = dispatch(on(transposed, grad_q)).q;
      } else {
        results[kK] = dispatch(on(transposed, grad_k)).q;
      }
    }

    if (wants[kPositions] || wants[kInvFreq] || wants[kCos] || wants[kSin]) {
      const at::TensorList kept = at::TensorList(saved).slice(kQ, grads.size());
      const AngleGradients gradients = angle_gradients(
          call, grads, kept, {wants[kPositions], wants[kInvFreq], wants[kCos], wants[kSin]});
      results[kPositions] = gradients.positions;
      results[kInvFreq] = gradients.inv_freq;
      results[kCos] = gradients.cos;
      results[kSin] = gradients.sin;
    }
    return results;
  }
};

// -------------------------------------------------------------------------------------------------
// The kernel of the Autograd key

bool any_has_tangent(const Call& call) {
  return has_tangent(call.q) || has_tangent(call.k) || has_tangent(call.positions) ||
         has_tangent(inv_freq_of(call)) || has_tangent(call.cos) || has_tangent(call.sin);
}

// PyTorch's own check, which bump_version makes, before anything is written.
void check_may_change(const at::Tensor& x) {
  TORCH_CHECK(
      !x.defined() || !x.is_inference() || c10::InferenceMode::is_enabled(),
      "Inplace update to inference tensor outside InferenceMode is not allowed. You can make "
      "a clone to get a normal tensor before doing inplace update.");
}

// Calls the autograd function, of which at least one tensor must require grad.
Outputs record(const Call& call, const Call* to_run) {
  AutogradContext* context = nullptr;
  const variable_list outputs =
      Rotate::apply(call.q, as_optional(call.k), as_optional(call.positions), call.options.inv_freq,
                    as_optional(call.cos), as_optional(call.sin), call, to_run, &context);
  // Both have taken effect, and compiled autograd only accepts nodes without them.
  context->mark_dirty({});
  context->mark_non_differentiable({});
  return {outputs[0], call.is_pair ? outputs[1] : at::Tensor()};
}

// A call that has a derivative.
Outputs rotate_with_autograd(const Call& call) {
  const bool tangent = any_has_tangent(call);
  const bool angles = angles_require_grad(call);
  const bool records =
      at::GradMode::is_enabled() && (angles || requires_grad(call.q) || requires_grad(call.k));
  if (call.in_place) {
    // Check before anything is written: more than one call may follow.
    check(call);
    check_may_change(call.q);
    check_may_change(call.k);
    torch::autograd::check_inplace(call.q, records);
    if (call.is_pair) {
      torch::autograd::check_inplace(call.k, records);
    }
    if (angles || tangent) {
      return rotate_and_copy(call);
    }
  }
  if (tangent || is_transformed()) {
    // C++ autograd functions support neither; ATen operators do.
    return rotate_decomposed(call);
  }
  if (call.is_pair && !angles && call.in_place) {
    // Autograd lets only functions with a single output modify views, such as q and k of a packed
    // buffer: record two, of which the first rotates both.
    const Call* to_run = &call;
    for (const at::Tensor& x : {call.q, call.k}) {
      if (requires_grad(x)) {
        record(in_place(on(call, x)), to_run);
        to_run = nullptr;
      } else {
        torch::autograd::impl::bump_version(x);
      }
    }
    return {call.q, call.k};
  }
  return record(call, &call);
}

bool has_derivative(const at::Tensor& tensor) {
  return (at::GradMode::is_enabled() && requires_grad(tensor)) || has_tangent(tensor);
}
bool has_derivative(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && has_derivative(*tensor);
}
template <typename Option>
bool has_derivative(const Option&) {
  return false;
}

struct DifferentiateOrForward {
  template <typename Operator, typename... Values>
  static typename Operator::Result run(const Values&... values) {
    if ((has_derivative(values) || ...)) {
      return Operator::Traits::results(rotate_with_autograd(Operator::pack(values...)));
    }
    const at::AutoDispatchBelowAutograd guard;
    return Operator::handle().call(values...);
  }
};

// -------------------------------------------------------------------------------------------------
// The kernel of the ADInplaceOrView key

struct ForwardAndBumpVersions {
  template <typename Operator, typename... Values>
  static void run(const Values&... values) {
    const auto rotated = [&] {
      const auto all = std::tie(values...);
      if constexpr (Operator::Traits::kIsPair) {
        return std::tie(std::get<0>(all), std::get<1>(all));
      } else {
        return std::tie(std::get<0>(all));
      }
    }();
    std::apply([](const auto&... x) { (check_may_change(x), ...); }, rotated);
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      Operator::handle().call(values...);
    }
    std::apply([](const auto&... x) { (torch::autograd::impl::bump_version(x), ...); }, rotated);
  }
};

}  // namespace

bool requires_grad(const at::Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

bool has_tangent(const at::Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}

bool is_transformed() {
  return c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerBackMode);
}

bool is_plain(const at::Tensor& tensor) {
  return !tensor.defined() ||
         (!tensor.unsafeGetTensorImpl()->is_python_dispatch() && !has_tangent(tensor) &&
          !(at::GradMode::is_enabled() && requires_grad(tensor)));
}

}  // namespace rope

// In C++, because register_autograd is Python only.
TORCH_LIBRARY_IMPL(rope, Autograd, library) {
  rope::AllOperators::implement_forwarding<rope::DifferentiateOrForward>(library);
}

// Without a kernel here, backward would silently use a saved tensor that was overwritten.
TORCH_LIBRARY_IMPL(rope, ADInplaceOrView, library) {
  rope::InPlaceOperators::implement_forwarding<rope::ForwardAndBumpVersions>(library);
}
