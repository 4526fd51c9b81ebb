// Runs the model saved by export.py, without Python. The operators come from linking to rope::rope;
// the source never names them.
//
//   serve model.pt 3 1 4 1 5
//
// Prints the prompt and the generated tokens, then the scores of the last step.
#include <torch/script.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

namespace {

constexpr int kNewTokens = 12;

struct Generated {
  std::vector<std::int64_t> tokens;
  at::Tensor scores;  // of the last step: (vocabulary)
};

// Generates kNewTokens tokens greedily.
Generated generate(torch::jit::Module& model, const std::vector<std::int64_t>& prompt) {
  const c10::InferenceMode inference;
  Generated generated{prompt, {}};
  at::Tensor tokens = at::tensor(prompt).unsqueeze(0);
  c10::IValue cache = model.get_method("empty_cache")({1});
  for (int i = 0; i < kNewTokens; ++i) {
    const auto result = model.forward({tokens, cache}).toTuple();
    const at::Tensor scores = result->elements()[0].toTensor();
    cache = result->elements()[1];
    tokens = scores.argmax(-1, /*keepdim=*/true);
    generated.tokens.push_back(tokens.item<std::int64_t>());
    generated.scores = scores[0];
  }
  return generated;
}

int serve(const std::string& path, const std::vector<std::int64_t>& prompt) {
  torch::jit::Module model = torch::jit::load(path);
  const Generated generated = generate(model, prompt);
  std::printf("tokens:");
  for (const std::int64_t token : generated.tokens) {
    std::printf(" %lld", static_cast<long long>(token));
  }
  std::printf("\nscores:");
  for (std::int64_t i = 0; i < generated.scores.numel(); ++i) {
    std::printf(" %.6f", generated.scores[i].item<double>());
  }
  std::printf("\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: serve MODEL TOKEN...\n";
    return 2;
  }
  try {
    std::vector<std::int64_t> prompt;
    for (int i = 2; i < argc; ++i) {
      prompt.push_back(std::stoll(argv[i]));
    }
    return serve(argv[1], prompt);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
