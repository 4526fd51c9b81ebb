// NOTE [ Operators ]
//
// An operator is described by traits: its name, its result and its arguments. Each argument has its
// name in the schema, its type in the C++ signature and get(call), the member of a packed call that
// holds it. From these Operator makes the signature, the schema, the dispatcher's handle and the
// kernels: Kernel packs the arguments for a function over calls, forwarding_kernel<Function> leaves
// them as they came, for dispatch keys that mostly pass a call on.
//
//   struct Traits {
//     using Call, Result;
//     static std::string name();
//     static Call empty_call();              // with what the operator's name implies
//     static constexpr auto arguments();     // a tuple of Argument, in the schema's order
//     static Result results(auto outputs);   // of what functions over calls return
//   };
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/OptionalArrayRef.h>
#include <c10/util/StringUtil.h>
#include <torch/library.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "options.h"

namespace rope {

// -------------------------------------------------------------------------------------------------
// Arguments

// How the schema writes a type.
template <typename Type>
inline constexpr const char* kSchemaType = nullptr;
template <>
inline constexpr const char* kSchemaType<const at::Tensor&> = "Tensor";
template <>
inline constexpr const char* kSchemaType<const std::optional<at::Tensor>&> = "Tensor?";
template <>
inline constexpr const char* kSchemaType<at::TensorList> = "Tensor[]";
template <>
inline constexpr const char* kSchemaType<std::int64_t> = "int";
template <>
inline constexpr const char* kSchemaType<std::optional<std::int64_t>> = "int?";
template <>
inline constexpr const char* kSchemaType<at::IntArrayRef> = "int[]";
template <>
inline constexpr const char* kSchemaType<at::OptionalIntArrayRef> = "int[]?";
template <>
inline constexpr const char* kSchemaType<const std::optional<c10::SymInt>&> = "SymInt?";
template <>
inline constexpr const char* kSchemaType<c10::SymIntArrayRef> = "SymInt[]";
template <>
inline constexpr const char* kSchemaType<double> = "float";
template <>
inline constexpr const char* kSchemaType<bool> = "bool";
template <>
inline constexpr const char* kSchemaType<std::array<bool, 2>> = "bool[2]";
template <>
inline constexpr const char* kSchemaType<std::array<bool, 4>> = "bool[4]";
template <>
inline constexpr const char* kSchemaType<std::optional<at::ScalarType>> = "ScalarType?";

// The type of the argument for an option, whose member has type Member.
template <typename Member>
using ArgumentType =
    std::conditional_t<std::is_same_v<Member, std::optional<std::vector<std::int64_t>>>,
                       at::OptionalIntArrayRef, Member>;

// Get is the type of get, a lambda without captures. The same lambda for several operators makes
// one type of argument, which saves much of the time that these headers take to compile.
template <typename TypeInSignature, typename Get, bool is_option = false>
struct Argument {
  using Type = TypeInSignature;
  static constexpr bool kIsOption = is_option;  // its default is that of the member
  static constexpr Get get{};
  const char* name;
  const char* default_text = nullptr;  // null: that of an option, or none
  const char* schema_type = kSchemaType<TypeInSignature>;
  bool is_keyword = false;

  constexpr Argument as_keyword() const {
    Argument keyword = *this;
    keyword.is_keyword = true;
    return keyword;
  }
};

template <typename Type, typename Get>
constexpr Argument<Type, Get> argument(const char* name, Get /*get*/,
                                       const char* default_text = nullptr) {
  return {name, default_text};
}

// One that the operator changes, of type "Tensor(a!)", or "Tensor(b!)" for a second.
template <typename Get>
constexpr Argument<const at::Tensor&, Get> mutable_argument(const char* name, Get /*get*/,
                                                            const char* schema_type) {
  return {name, nullptr, schema_type};
}

template <typename GetOption, typename GetOptions>
struct GetOptionOfCall {
  constexpr auto& operator()(auto& call) const { return GetOption{}(GetOptions{}(call)); }
};

// The arguments for those options that Options has. get_options(call) is the call's own struct.
template <typename Options, typename GetOptions>
constexpr auto option_arguments(GetOptions /*get_options*/, bool are_keywords) {
  const auto argument_of = [=](const auto& option) {
    using GetOption = decltype(option.get);
    if constexpr (std::is_invocable_v<GetOption, Options&>) {
      using Type = ArgumentType<std::decay_t<std::invoke_result_t<GetOption, Options&>>>;
      return std::tuple{Argument<Type, GetOptionOfCall<GetOption, GetOptions>, true>{
          option.name, nullptr, kSchemaType<Type>, are_keywords}};
    } else {
      return std::tuple{};
    }
  };
  return std::apply([&](const auto&... option) { return std::tuple_cat(argument_of(option)...); },
                    all_options());
}

// -------------------------------------------------------------------------------------------------
// Between an argument and the member that holds it. A member that is an undefined tensor is None.

template <typename Member, typename Value>
void store(Member& member, const Value& value) {
  if constexpr (std::is_same_v<Member, at::Tensor> &&
                std::is_same_v<Value, std::optional<at::Tensor>>) {
    if (value.has_value()) {
      member = *value;
    }
  } else if constexpr (std::is_same_v<Value, at::OptionalIntArrayRef>) {
    if (value.has_value()) {
      member = value->vec();
    }
  } else {
    member = value;
  }
}

// An undefined tensor is none.
inline std::optional<at::Tensor> as_optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

template <typename Type, typename Member>
decltype(auto) load(const Member& member) {
  if constexpr (std::is_same_v<Type, const std::optional<at::Tensor>&> &&
                std::is_same_v<Member, at::Tensor>) {
    return as_optional(member);
  } else if constexpr (std::is_same_v<Type, at::OptionalIntArrayRef>) {
    return member.has_value() ? at::OptionalIntArrayRef(*member) : at::OptionalIntArrayRef();
  } else {
    return static_cast<Type>(member);
  }
}

// -------------------------------------------------------------------------------------------------
// The schema

inline std::string to_text(bool value) { return value ? "True" : "False"; }
inline std::string to_text(std::int64_t value) { return std::to_string(value); }
inline std::string to_text(double value) { return c10::str(value); }
inline std::string to_text(const std::vector<std::int64_t>& values) {
  return c10::str(at::IntArrayRef(values));
}
template <typename Value>
std::string to_text(const std::optional<Value>& value) {
  return value.has_value() ? to_text(*value) : "None";
}

// An argument as the schema writes it.
struct SchemaArgument {
  const char* type;
  const char* name;
  bool is_keyword;
  std::string default_text;  // empty: none
};

inline std::string schema_of(const std::string& name, const std::vector<SchemaArgument>& arguments,
                             const char* result_type) {
  std::string text;
  bool has_keywords = false;
  for (const SchemaArgument& argument : arguments) {
    text += text.empty() ? "" : ", ";
    if (argument.is_keyword && !std::exchange(has_keywords, true)) {
      text += "*, ";
    }
    text += c10::str(argument.type, " ", argument.name);
    text += argument.default_text.empty() ? "" : "=" + argument.default_text;
  }
  return c10::str(name, "(", text, ") -> ", result_type);
}

// -------------------------------------------------------------------------------------------------
// Operators

template <typename Traits, typename Arguments = decltype(Traits::arguments())>
struct Operator;

template <typename OperatorTraits, typename... Arguments>
struct Operator<OperatorTraits, std::tuple<Arguments...>> {
  using Traits = OperatorTraits;
  using Call = typename Traits::Call;
  using Result = typename Traits::Result;
  using Signature = Result(typename Arguments::Type...);

  static std::string name() { return Traits::name(); }

  static std::string schema() {
    const Call defaults = Traits::empty_call();
    const auto in_schema = [&](const auto& argument) {
      SchemaArgument text{argument.schema_type, argument.name, argument.is_keyword, ""};
      if constexpr (std::decay_t<decltype(argument)>::kIsOption) {
        text.default_text = to_text(argument.get(defaults));
      } else if (argument.default_text != nullptr) {
        text.default_text = argument.default_text;
      }
      return text;
    };
    return schema_of(name(),
                     std::apply(
                         [&](const auto&... argument) {
                           return std::vector<SchemaArgument>{in_schema(argument)...};
                         },
                         Traits::arguments()),
                     result_type());
  }

  // The operator in the dispatcher, looked up once.
  static const c10::TypedOperatorHandle<Signature>& handle() {
    static const auto handle = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow(("rope::" + name()).c_str(), "")
                                   .template typed<Signature>();
    return handle;
  }

  static Call pack(typename Arguments::Type... values) {
    Call call = Traits::empty_call();
    (store(Arguments::get(call), values), ...);
    return call;
  }

  // Calls the operator through the dispatcher.
  static Result dispatch(const Call& call) {
    return handle().call(load<typename Arguments::Type>(Arguments::get(call))...);
  }

  // The function is no template argument: PyTorch's wrappers around a kernel are compiled for each
  // type, and there are as many kernels as operators times dispatch keys.
  template <typename Outputs>
  struct Kernel {
    Outputs (*function)(const Call&);
    Result operator()(typename Arguments::Type... values) const {
      return Traits::results(function(pack(values...)));
    }
  };

  // Function::run<Operator>(values...) is the kernel.
  template <typename Function>
  static Result forwarding_kernel(typename Arguments::Type... values) {
    return Function::template run<Operator>(values...);
  }

 private:
  static const char* result_type() {
    if constexpr (std::is_void_v<Result>) {
      return "()";
    } else if constexpr (std::is_same_v<Result, at::Tensor>) {
      return "Tensor";
    } else {
      return std::tuple_size_v<Result> == 2 ? "(Tensor, Tensor)"
                                            : "(Tensor, Tensor, Tensor, Tensor)";
    }
  }
};

template <typename... Operators>
struct OperatorList {
  template <typename... More>
  constexpr OperatorList<Operators..., More...> operator+(OperatorList<More...>) const {
    return {};
  }

  static void define(torch::Library& library) {
    (library.def(Operators::schema().c_str(), {at::Tag::pt2_compliant_tag}), ...);
  }

  template <typename Outputs, typename Call>
  static void implement(torch::Library& library, Outputs (*function)(const Call&)) {
    (library.impl(Operators::name().c_str(),
                  typename Operators::template Kernel<Outputs>{function}),
     ...);
  }

  template <typename Function>
  static void implement_forwarding(torch::Library& library) {
    (library.impl(Operators::name().c_str(),
                  TORCH_FN(Operators::template forwarding_kernel<Function>)),
     ...);
  }
};

}  // namespace rope
