// Times the CPU kernels alone: nanoseconds for a row, its share of the angles counted in.
//   bench_kernel                                          every case
//   bench_kernel --benchmark_filter=AVX2/bfloat16         those with this in their name
//   bench_kernel --benchmark_repetitions=9 --benchmark_enable_random_interleaving=true
#include <benchmark/benchmark.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "cpu/kernel.h"

namespace rope::cpu {

namespace {

using Kernel = void (*)(const Launch&, const Workspace&, const Block&);

struct Case {
  std::int64_t tokens;
  std::int64_t heads;
  std::int64_t head_dim;
  bool tokens_inside;  // (B, H, S, D) instead of (B, S, H, D)
  bool in_place;
};

constexpr std::int64_t kCacheLine = 64;  // bytes

// Memory that begins at a cache line.
template <typename Number>
class Aligned {
 public:
  explicit Aligned(std::int64_t size) : memory_(size + kCacheLine / sizeof(Number) + 1) {}

  Number* data() {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    return reinterpret_cast<Number*>((address + kCacheLine - 1) / kCacheLine * kCacheLine);
  }

 private:
  std::vector<Number> memory_;
};

template <typename scalar_t>
Launch describe(const Case& x, const scalar_t* in, scalar_t* out, const std::int64_t* positions,
                const double* frequencies) {
  Launch launch{};
  launch.dtype = c10::CppTypeToScalarType<scalar_t>::value;
  launch.num_operands = 1;
  launch.num_pairs = x.head_dim / 2;
  const std::int64_t token_stride = x.tokens_inside ? x.head_dim : x.heads * x.head_dim;
  const std::int64_t head_stride = x.tokens_inside ? x.tokens * x.head_dim : x.head_dim;
  launch.operands[0] = {in, out, x.head_dim, 1, 1, {1, {x.heads}, {{head_stride}, {head_stride}}}};
  launch.tokens.num_dims = 1;
  launch.tokens.sizes[0] = x.tokens;
  launch.tokens.strides[kAngle][0] = 1;
  launch.tokens.strides[kIn][0] = launch.tokens.strides[kOut][0] = token_stride;
  PositionAngles& angles = launch.position_angles;
  angles.positions = positions;
  angles.positions_dtype = c10::ScalarType::Long;
  angles.num_axes = 1;
  angles.inv_freq_dtype = c10::ScalarType::Double;
  angles.wavelength_frequencies = frequencies;
  angles.scale_factor = 1.0;
  angles.attention_factor = 1.0;
  return launch;
}

template <typename scalar_t>
void rotate(benchmark::State& state, Kernel kernel, const Case& x) {
  const std::int64_t size = x.tokens * x.heads * x.head_dim;
  Aligned<scalar_t> in(size);
  Aligned<scalar_t> out(x.in_place ? 0 : size);
  std::generate_n(in.data(), size,
                  [n = 0]() mutable { return static_cast<scalar_t>(++n % 997 / 500.0f - 1.0f); });
  std::vector<std::int64_t> positions(x.tokens);
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<double> frequencies(x.head_dim / 2);
  for (std::size_t n = 0; n < frequencies.size(); ++n) {
    frequencies[n] = std::pow(10000.0, -2.0 * static_cast<double>(n) / x.head_dim);
  }
  const Launch launch = describe(x, in.data(), x.in_place ? in.data() : out.data(),
                                 positions.data(), frequencies.data());

  const std::int64_t length = padded(launch.num_pairs);
  Aligned<double> cos(kMaxBlockTokens * length), sin(kMaxBlockTokens * length);
  Aligned<double> sums(length), factors(length), row(2 * length);
  std::vector<std::int64_t> token_offsets(kMaxBlockTokens * kTokenArrays);
  std::vector<std::int64_t> head_offsets(kMaxHeads * 2);
  const Workspace workspace{cos.data(),          sin.data(),          sums.data(),
                            factors.data(),      row.data(),          token_offsets.data(),
                            head_offsets.data(), /*may_stream=*/false};
  for ([[maybe_unused]] auto _ : state) {
    for (std::int64_t begin = 0; begin < x.tokens; begin += kMaxBlockTokens) {
      kernel(launch, workspace, {begin, std::min(begin + kMaxBlockTokens, x.tokens), 0, 1});
    }
  }
  using benchmark::Counter;
  state.counters["row"] = Counter(static_cast<double>(x.tokens * x.heads),
                                  Counter::kIsIterationInvariantRate | Counter::kInvert);
}

constexpr Case kCases[] = {
    {1, 32, 128, false, true},   {64, 40, 128, false, true},   {64, 40, 128, false, false},
    {512, 40, 128, false, true}, {512, 40, 128, false, false}, {512, 40, 128, true, true},
    {512, 40, 128, true, false}, {4096, 40, 128, true, true},  {4096, 40, 128, false, true},
    {512, 1, 128, false, true},  {512, 40, 256, false, true},  {512, 40, 96, false, true},
    {512, 40, 80, false, true},
};

template <typename scalar_t>
void add(const std::string& capability, const std::string& dtype, Kernel kernel) {
  for (const Case& x : kCases) {
    const std::string name = capability + "/" + dtype + "/" + (x.tokens_inside ? "BHSD" : "BSHD") +
                             "/" + std::to_string(x.tokens) + "x" + std::to_string(x.heads) + "x" +
                             std::to_string(x.head_dim) + (x.in_place ? "/in_place" : "/out");
    benchmark::RegisterBenchmark(name.c_str(), rotate<scalar_t>, kernel, x);
  }
}

void add_all(const std::string& capability, Kernel kernel, Kernel kernel_of_bfloat16) {
  add<float>(capability, "float32", kernel);
  add<c10::BFloat16>(capability, "bfloat16", kernel_of_bfloat16);
  add<c10::Half>(capability, "float16", kernel);
}

}  // namespace

}  // namespace rope::cpu

int main(int argc, char** argv) {
  using rope::cpu::add_all;
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    const bool has_bfloat16 = __builtin_cpu_supports("avx512bf16");
    add_all("AVX512", rope::cpu::rotate_AVX512,
            has_bfloat16 ? rope::cpu::rotate_AVX512_BF16 : rope::cpu::rotate_AVX512);
  }
  if (__builtin_cpu_supports("avx2")) {
    add_all("AVX2", rope::cpu::rotate_AVX2, rope::cpu::rotate_AVX2);
  }
#endif
  add_all("DEFAULT", rope::cpu::rotate_DEFAULT, rope::cpu::rotate_DEFAULT);
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
