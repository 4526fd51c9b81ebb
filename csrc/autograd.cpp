// Derivatives. Rotation is linear in x: its backward is the same operator with conjugate flipped,
// and saves no activation. What also normalizes saves x and the weights, and has operators of its
// own for their gradients (norm_operators.h). Gradients of positions, inv_freq, cos and sin are
// computed only when needed (gradients.h).
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
#include "norm_operators.h"
#include "options.h"
#include "rotate_operators.h"

namespace rope {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// -------------------------------------------------------------------------------------------------
// The autograd function

template <typename Options>
void save(AutogradContext* ctx, const Options& options) {
  visit_options(options,
                [&](const char* name, const auto& member) { ctx->saved_data[name] = member; });
}

template <typename Options>
void load(AutogradContext* ctx, Options& options) {
  visit_options(options, [&](const char* name, auto& member) {
    member = ctx->saved_data[name].to<std::decay_t<decltype(member)>>();
  });
}

// What a call is apart from its tensors.
void save_call(AutogradContext* ctx, const Call& call) {
  ctx->saved_data["uses_tables"] = call.uses_tables;
  ctx->saved_data["normalizes"] = call.normalizes;
  if (call.normalizes) {
    save<CallOptions>(ctx, call.options);
  } else {
    save<RotateOptions>(ctx, call.options);
  }
}

Call load_call(AutogradContext* ctx) {
  Call call;
  call.uses_tables = ctx->saved_data["uses_tables"].toBool();
  call.normalizes = ctx->saved_data["normalizes"].toBool();
  if (call.normalizes) {
    load<CallOptions>(ctx, call.options);
  } else {
    load<RotateOptions>(ctx, call.options);
  }
  return call;
}

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor inv_freq_of(const Call& call) { return call.options.inv_freq.value_or(at::Tensor()); }

bool angles_require_grad(const Call& call) {
  return requires_grad(call.positions) || requires_grad(call.cos) || requires_grad(call.sin) ||
         requires_grad(inv_freq_of(call));
}

bool q_requires_grad(const Call& call) {
  return requires_grad(call.q) || requires_grad(call.q_weight);
}
bool k_requires_grad(const Call& call) {
  return requires_grad(call.k) || requires_grad(call.k_weight);
}

// Where only one tensor of a pair requires grad (LoRA on q alone), the other's output must not.
variable_list outputs_without_grad(const Call& call, const Outputs& outputs) {
  variable_list constant;
  if (!angles_require_grad(call)) {
    if (!q_requires_grad(call)) {
      constant.push_back(outputs.q);
    }
    if (call.is_pair && !k_requires_grad(call)) {
      constant.push_back(outputs.k);
    }
  }
  return constant;
}

struct Rotate : torch::autograd::Function<Rotate> {
  static constexpr bool is_traceable = true;

  // The order of the tensors among the arguments of forward, the saved tensors and the gradients.
  enum Argument : std::size_t {
    kQ,
    kK,
    kQWeight,
    kKWeight,
    kPositions,
    kInvFreq,
    kCos,
    kSin,
    kNumArguments
  };

  // The tensors are those of `call`, passed separately because autograd only sees arguments.
  // `to_run` is the call to carry out: another one, or null, where an in-place pair is recorded as
  // two nodes. Sets *context to the node's context.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const OptionalTensor& k,
                               const OptionalTensor& q_weight, const OptionalTensor& k_weight,
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
    save_call(ctx, call);

    // Of what only rotates, gradients of angles need the output, gradients of tables the input, the
    // gradient of x neither. What normalizes needs the input.
    variable_list saved(kNumArguments);
    if (call.normalizes || (angles_require_grad(call) && call.uses_tables)) {
      saved[kQ] = q;
      saved[kK] = k.value_or(at::Tensor());
    } else if (angles_require_grad(call)) {
      saved[kQ] = outputs.q;
      saved[kK] = outputs.k;
    }
    saved[kQWeight] = q_weight.value_or(at::Tensor());
    saved[kKWeight] = k_weight.value_or(at::Tensor());
    saved[kPositions] = positions.value_or(at::Tensor());
    saved[kInvFreq] = inv_freq.value_or(at::Tensor());
    saved[kCos] = cos.value_or(at::Tensor());
    saved[kSin] = sin.value_or(at::Tensor());
    ctx->save_for_backward(std::move(saved));
    return results;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    Call call = load_call(ctx);
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
    if (call.normalizes) {
      call = grads.size() > 1 ? on(call, saved[kQ], saved[kK]) : on(call, saved[kQ]);
      call.q_weight = saved[kQWeight];
      call.k_weight = saved[kKWeight];
      NormGradientCall gradient_call{call, grad_q, grad_k};
      gradient_call.wants = {wants_q, wants_k, grad_q.defined() && wants[kQWeight],
                             grad_k.defined() && wants[kKWeight]};
      const NormGradients gradients = norm_gradients(gradient_call);
      results[kQ] = gradients.q;
      results[kK] = gradients.k;
      results[kQWeight] = gradients.q_weight;
      results[kKWeight] = gradients.k_weight;
    } else if (wants_q || wants_k) {
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
      const WantedGradients wanted{wants[kPositions], wants[kInvFreq], wants[kCos], wants[kSin]};
      const AngleGradients gradients =
          call.normalizes
              ? angle_gradients_of_norm(call, grads, wanted)
              : angle_gradients(call, grads, at::TensorList(saved).slice(kQ, grads.size()), wanted);
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
  return has_tangent(call.q) || has_tangent(call.k) || has_tangent(call.q_weight) ||
         has_tangent(call.k_weight) || has_tangent(call.positions) ||
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
      Rotate::apply(call.q, as_optional(call.k), as_optional(call.q_weight),
                    as_optional(call.k_weight), as_optional(call.positions), call.options.inv_freq,
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
  if (call.in_place) {
    // Check before anything is written: more than one call may follow.
    check(call);
    check_may_change(call.q);
    check_may_change(call.k);
    const auto check_inplace = [&](const at::Tensor& x, bool requires_grad) {
      torch::autograd::check_inplace(x, at::GradMode::is_enabled() && (angles || requires_grad));
    };
    check_inplace(call.q, q_requires_grad(call));
    if (call.is_pair) {
      check_inplace(call.k, k_requires_grad(call));
    }
    if (angles || tangent || call.normalizes) {
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
