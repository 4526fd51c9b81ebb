// Runs a layer with the weights that Python saved: run_layer STATE SCRIPTED INPUTS OUTPUTS, where
// STATE is a state dict and INPUTS and OUTPUTS are lists of tensors, all written by torch.save, and
// SCRIPTED is a scripted layer. The outputs are those of both.
#include <rope/modules.h>
#include <torch/serialize.h>

#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

namespace {

c10::IValue load(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return torch::pickle_load(std::vector<char>((std::istreambuf_iterator<char>(file)), {}));
}

void save(const std::vector<at::Tensor>& tensors, const char* path) {
  const std::vector<char> bytes = torch::pickle_save(tensors);
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

rope::QKNormRotaryEmbedding make_layer() {
  return rope::QKNormRotaryEmbedding(
      32, rope::QKNormRotaryEmbeddingOptions{
              .max_wavelength = 5e5, .eps = 1e-3, .weight_offset = 1, .num_heads = {{4, 2}}});
}

rope::QKNormRotaryEmbedding with_state(rope::QKNormRotaryEmbedding layer, const char* path) {
  const at::NoGradGuard no_grad;
  const c10::impl::GenericDict state = load(path).toGenericDict();
  for (const auto& parameter : layer->named_parameters()) {
    parameter.value().copy_(state.at(parameter.key()).toTensor());
  }
  return layer;
}

rope::QKNormRotaryEmbedding with_archive(rope::QKNormRotaryEmbedding layer, const char* path) {
  torch::load(layer, path);
  return layer;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: run_layer STATE SCRIPTED INPUTS OUTPUTS\n";
    return 2;
  }
  try {
    const c10::IValue inputs = load(argv[3]);
    const auto tensor = [&](std::size_t i) { return inputs.toListRef()[i].toTensor(); };
    std::vector<at::Tensor> outputs;
    for (rope::QKNormRotaryEmbedding layer :
         {with_state(make_layer(), argv[1]), with_archive(make_layer(), argv[2])}) {
      const auto [q, k] = layer(tensor(0), tensor(1), tensor(2));
      outputs.insert(outputs.end(), {q, k});
    }
    save(outputs, argv[4]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
  return 0;
}
