// Calls the C++ functions with arguments that must be refused: refuse CALLS RESULTS, where CALLS is
// a list that torch.save wrote, of calls as Call has them, and RESULTS is one of the type and the
// text of what each throws.
#include <rope/rope.h>
#include <torch/serialize.h>

#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

c10::IValue load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return torch::pickle_load(std::vector<char>((std::istreambuf_iterator<char>(file)), {}));
}

// What cannot be saved: the edits of tests/refusals.py, float8 and undefined tensors.
at::Tensor edited(std::string_view edit, const at::Tensor& tensor, const at::Tensor& first) {
  if (edit == "move") {
    return at::zeros_like(tensor, at::kMeta);
  }
  if (edit == "expand") {
    return tensor.narrow(1, 0, 1).expand_as(tensor);
  }
  if (edit == "shrink") {
    at::Tensor copy = tensor.clone();
    copy.storage().unsafeGetStorageImpl()->set_nbytes(copy.nbytes() - 1);
    return copy;
  }
  if (edit == "float8") {
    return tensor.view(at::kFloat8_e4m3fn);
  }
  if (edit == "undefine") {
    return at::Tensor();
  }
  TORCH_CHECK(edit == "alias", "unknown edit ", edit);
  return first.flatten().narrow(0, 0, tensor.numel()).view(tensor.sizes());
}

// A tuple of the name of an operator, a list of its tensors, a dictionary of its options, and what
// to do to which of the tensors, if any.
class Call {
 public:
  explicit Call(const c10::ivalue::Tuple& call)
      : name_(call.elements()[0].toStringRef()),
        tensors_(call.elements()[1].toListRef().vec()),
        options_(call.elements()[2].toGenericDict()),
        is_pair_(name_.find("_qk") != std::string::npos),
        normalizes_(name_.starts_with("norm_")),
        uses_tables_(name_.find("cos_sin") != std::string::npos) {
    const std::string& edit = call.elements()[3].toStringRef();
    if (!edit.empty()) {
      c10::IValue& tensor = tensors_.at(call.elements()[4].toInt());
      tensor = edited(edit, tensor.toTensor(), tensors_[0].toTensor());
    }
  }

  void run() const {
    if (uses_tables_ && normalizes_) {
      run_tables<rope::NormCosSinOptions>();
    } else if (uses_tables_) {
      run_tables<rope::CosSinOptions>();
    } else if (normalizes_) {
      run_positions<rope::NormOptions>();
    } else {
      run_positions<rope::ApplyOptions>();
    }
  }

 private:
  at::Tensor tensor(std::size_t i) const { return tensors_.at(i).toTensor(); }

  std::optional<at::Tensor> optional(std::size_t i) const {
    return tensors_.at(i).isNone() ? std::nullopt : std::optional(tensor(i));
  }

  // Where the angles begin.
  std::size_t num_rotated() const {
    const std::size_t count = is_pair_ ? 2 : 1;
    return normalizes_ ? 2 * count : count;
  }

  template <typename Member>
  void read(const char* name, Member& member) const {
    if (options_.contains(name)) {
      member = options_.at(name).to<Member>();
    }
  }

  template <typename Options>
  void read_common(Options& options) const {
    read("embedding_axis", options.embedding_axis);
    read("rotary_dim", options.rotary_dim);
    read("rotary_offset", options.rotary_offset);
    read("interleaved", options.interleaved);
    read("conjugate", options.conjugate);
    if constexpr (requires { options.eps; }) {
      read("eps", options.eps);
      read("weight_offset", options.weight_offset);
      if (options_.contains("norm_axes")) {
        std::vector<std::int64_t>& axes = options.norm_axes.emplace();
        for (const c10::IValue& axis : options_.at("norm_axes").toListRef()) {
          axes.push_back(axis.toInt());
        }
      }
      read("norm_last", options.norm_last);
    }
  }

  template <typename Options>
  void run_positions() const {
    const std::size_t angles = num_rotated();
    Options options;
    options.inv_freq = optional(angles + 1);
    read_common(options);
    read("max_wavelength", options.max_wavelength);
    read("scale_factor", options.scale_factor);

    read("attention_factor", options.attention_factor);
    const at::Tensor positions = tensor(angles);
    if constexpr (requires { options.eps; }) {
      call(rope::norm_apply, rope::norm_apply_, rope::norm_apply_qk, rope::norm_apply_qk_,
           positions, options);
    } else {
      call(rope::apply, rope::apply_, rope::apply_qk, rope::apply_qk_, positions, options);
    }
  }

  template <typename Options>
  void run_tables() const {
    const std::size_t angles = num_rotated();
    Options options;
    options.positions = optional(angles + 2);
    read_common(options);
    read("full_width", options.full_width);
    const at::Tensor cos = tensor(angles);
    const at::Tensor sin = tensor(angles + 1);
    if constexpr (requires { options.eps; }) {
      call(rope::norm_apply_cos_sin, rope::norm_apply_cos_sin_, rope::norm_apply_cos_sin_qk,
           rope::norm_apply_cos_sin_qk_, cos, sin, options);
    } else {
      call(rope::apply_cos_sin, rope::apply_cos_sin_, rope::apply_cos_sin_qk,
           rope::apply_cos_sin_qk_, cos, sin, options);
    }
  }

  // Calls one of the four forms of an operator.
  template <typename One, typename Two, typename... Angles>
  void call(One* functional, One* in_place, Two* functional_qk, Two* in_place_qk,
            const Angles&... angles) const {
    One* const one = name_.ends_with('_') ? in_place : functional;
    Two* const two = name_.ends_with('_') ? in_place_qk : functional_qk;
    if constexpr (std::is_invocable_v<One*, at::Tensor, const Angles&...>) {
      is_pair_ ? static_cast<void>(two(tensor(0), tensor(1), angles...))
               : static_cast<void>(one(tensor(0), angles...));
    } else {
      is_pair_ ? static_cast<void>(two(tensor(0), tensor(1), optional(2), optional(3), angles...))
               : static_cast<void>(one(tensor(0), optional(1), angles...));
    }
  }

  std::string name_;
  std::vector<c10::IValue> tensors_;
  c10::impl::GenericDict options_;
  bool is_pair_;
  bool normalizes_;
  bool uses_tables_;
};

std::tuple<std::string, std::string> refusal(const Call& call) {
  try {
    call.run();
  } catch (const c10::ValueError& error) {
    return {"ValueError", error.what_without_backtrace()};
  } catch (const c10::TypeError& error) {
    return {"TypeError", error.what_without_backtrace()};
  } catch (const c10::IndexError& error) {
    return {"IndexError", error.what_without_backtrace()};
  } catch (const c10::NotImplementedError& error) {
    return {"NotImplementedError", error.what_without_backtrace()};
  } catch (const std::exception& error) {
    return {"another", error.what()};
  }
  return {"none", "the call was accepted"};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: refuse CALLS RESULTS\n";
    return 2;
  }
  try {
    std::vector<std::tuple<std::string, std::string>> results;
    const c10::IValue calls = load(argv[1]);
    for (const c10::IValue& call : calls.toListRef()) {
      results.push_back(refusal(Call(call.toTupleRef())));
    }
    const std::vector<char> bytes = torch::pickle_save(results);
    std::ofstream(argv[2], std::ios::binary)
        .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
