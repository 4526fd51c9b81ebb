// The CPU kernel, in at::vec. This file is compiled once for each CPU capability, with the
// instructions of that capability: it must let no symbol out but its entry, since the linker would
// share an inline function of the same name with code for older processors (the build asserts it).
// Hence raw pointers and no containers.
#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "angle.h"
#include "cpu/kernel.h"
#include "rotation.h"
#include "unsupported_dtype.h"

// Everything is inlined into the entry, what other files define too, but for the loops over rows,
// which get all registers to themselves.
#define ROPE_INLINE inline __attribute__((always_inline))
#define ROPE_ENTRY __attribute__((flatten))
#define ROPE_LOOP __attribute__((noinline, flatten))

namespace rope::cpu {

namespace {

using at::vec::Vectorized;

// NOTE [ bfloat16 in words ]
//
// Two bfloat16 sit in one 32-bit word: shifting gives the even element as a float, masking the odd
// one. So a vector of words becomes a vector of the even elements and one of the odd ones, with no
// shuffle across the vector, and back again: a little less than half a unit of the last place is
// added to the float's bits, of which the lowest is set where the last place is odd, so that a tie
// goes to the even one, and the halves are merged. A NaN's low bits are zero here, so that the
// addition does not carry out of it: x is bfloat16 itself, and cosines and sines are cleaned by
// quiet(). The cosines and sines of a row are laid out in the order in which its vectors come: see
// for_each_place.
//
// Where the CPU has an instruction that rounds two vectors of floats to one of bfloat16, it does
// the same in less time, but for subnormal numbers, which are done again. It leaves the elements of
// the first vector in front of those of the second. So a vector is parted into its first half and
// its second one, each spread by one shuffle, and into even and odd elements only where those are
// the pairs.

// NOTE [ Last step of a row ]
//
// A row that is no whole number of steps ends in a step that overlaps the one before: it begins
// where the row has one step left. In place, the step before writes what the last one reads, so
// that the last one is loaded first of all. Its cosines and sines have a place of their own behind
// those of the whole steps. Rows shorter than a step are loaded and stored in part. Every element
// is the result of the same operations on the same numbers in all of these cases.

// Stores a vector past the caches, at a multiple of its size.
template <typename Vector, typename scalar_t>
ROPE_INLINE void stream(const Vector& vector, scalar_t* to) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512i bits;
  std::memcpy(&bits, &vector, sizeof(bits));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits);
#elif defined(CPU_CAPABILITY_AVX2)
  __m256i bits;
  std::memcpy(&bits, &vector, sizeof(bits));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits);
#else
  vector.store(to);
#endif
}

template <typename Vector, typename scalar_t>
ROPE_INLINE void store(const Vector& vector, scalar_t* to, bool streams) {
  if (streams) {
    stream(vector, to);
  } else {
    vector.store(to);
  }
}

// float16 by as many elements as a vector of floats has, which fill half of a vector: at::vec's
// conversion of a whole one takes it apart and puts it together.
#if defined(CPU_CAPABILITY_AVX512)
#define ROPE_FLOAT16_BY_HALVES 1
using Floats = __m512;
using HalfOfVector = __m256i;
ROPE_INLINE void store_half(HalfOfVector* to, HalfOfVector half, bool streams) {
  streams ? _mm256_stream_si256(to, half) : _mm256_storeu_si256(to, half);
}
#elif defined(CPU_CAPABILITY_AVX2)
#define ROPE_FLOAT16_BY_HALVES 1
using Floats = __m256;
using HalfOfVector = __m128i;
ROPE_INLINE void store_half(HalfOfVector* to, HalfOfVector half, bool streams) {
  streams ? _mm_stream_si128(to, half) : _mm_storeu_si128(to, half);
}
#endif

#ifdef ROPE_FLOAT16_BY_HALVES
ROPE_INLINE Vectorized<float> load_float16(const c10::Half* from, std::int64_t count) {
  HalfOfVector half{};
  if (count < Vectorized<float>::size()) {
    std::memcpy(&half, from, count * sizeof(c10::Half));
  } else {
    std::memcpy(&half, from, sizeof(half));
  }
  Floats floats;
  at::vec::cvtfp16_fp32(half, floats);
  return floats;
}

ROPE_INLINE void store_float16(const Vectorized<float>& vector, c10::Half* to, std::int64_t count,
                               bool streams) {
  const HalfOfVector half = at::vec::cvtfp32_fp16(vector);
  if (count < Vectorized<float>::size()) {
    std::memcpy(to, &half, count * sizeof(c10::Half));
  } else {
    // (A memcpy would become one instruction with the conversion, which AMD's CPUs are slow at.)
    store_half(reinterpret_cast<HalfOfVector*>(to), half, streams);
  }
}
#endif

// A step of a row: as many elements as one vector of the storage type holds (of float16, half of
// one), as vectors of the computation type, in the order of memory or parted into the even elements
// and the odd ones.
template <typename scalar_t, bool interleaved>
struct Step {
  using Real = at::opmath_type<scalar_t>;
  using Vector = Vectorized<Real>;
  static constexpr bool kInWords =
      std::is_same_v<scalar_t, c10::BFloat16> && std::endian::native == std::endian::little;
#ifdef __AVX512BF16__
  static constexpr bool kParted = kInWords && interleaved;
#else
  static constexpr bool kParted = kInWords;
#endif
#ifdef ROPE_FLOAT16_BY_HALVES
  static constexpr bool kByHalves = std::is_same_v<scalar_t, c10::Half>;
#else
  static constexpr bool kByHalves = false;
#endif
  static constexpr int kVectors = kByHalves ? 1 : sizeof(Real) / sizeof(scalar_t);
  static constexpr std::int64_t kSize = kVectors * Vector::size();

  Vector vectors[kVectors];

  static ROPE_INLINE Step load(const scalar_t* from, std::int64_t count) {
    if constexpr (kInWords) {
      Words words;
      if (count < kSize && count % 2 == 0) {
        words = Words::loadu(from, count / 2);
      } else if (count < kSize) {
        scalar_t elements[kSize] = {};
        std::memcpy(elements, from, count * sizeof(scalar_t));
        words = Words::loadu(elements);
      } else {
        words = Words::loadu(from);
      }
      return widened(words);
#ifdef ROPE_FLOAT16_BY_HALVES
    } else if constexpr (kByHalves) {
      return {{load_float16(from, count)}};
#endif
    } else {
      const auto stored = count < kSize ? Vectorized<scalar_t>::loadu(from, count)
                                        : Vectorized<scalar_t>::loadu(from);
      if constexpr (kVectors == 1) {
        return {{stored}};
      } else {
        const auto [first, second] = at::vec::convert_to_float<scalar_t>(stored);
        return {{first, second}};
      }
    }
  }

  ROPE_INLINE void store(scalar_t* to, std::int64_t count, bool streams) const {
    if constexpr (kInWords) {
      const Words words = narrowed(vectors[0], vectors[1]);
      if (count < kSize && count % 2 == 0) {
        words.store(to, static_cast<int>(count / 2));
      } else if (count < kSize) {
        scalar_t elements[kSize];
        words.store(elements);
        std::memcpy(to, elements, count * sizeof(scalar_t));
      } else {
        cpu::store(words, to, streams);
      }
#ifdef ROPE_FLOAT16_BY_HALVES
    } else if constexpr (kByHalves) {
      store_float16(vectors[0], to, count, streams);
#endif
    } else {
      Vectorized<scalar_t> stored;
      if constexpr (kVectors == 1) {
        stored = vectors[0];
      } else {
        stored = at::vec::convert_from_float<scalar_t>(vectors[0], vectors[1]);
      }
      if (count < kSize) {
        stored.store(to, static_cast<int>(count));
      } else {
        cpu::store(stored, to, streams);
      }
    }
  }

 private:
  using Words = Vectorized<std::int32_t>;
  static constexpr auto kHighHalf = static_cast<std::int32_t>(0xffff0000);

  static ROPE_INLINE Step widened(const Words& words) {
#ifdef __AVX512BF16__
    if constexpr (!kParted) {
      return {{spread<0>(words), spread<kSize / 2>(words)}};
    }
#endif
    return {
        {at::vec::cast<float>(words << Words(16)), at::vec::cast<float>(words & Words(kHighHalf))}};
  }

  static ROPE_INLINE Words narrowed(const Vectorized<float>& first,
                                    const Vectorized<float>& second) {
#ifdef __AVX512BF16__
    const Words words = converted(first, second);
    // The instruction makes zeros of subnormal numbers. Zeros are seldom, so that they may be
    // these. (GCC keeps this constant in a register, and would not keep one of 16 bits.)
    if (_mm512_testn_epi16_mask(words, Words(0x7fff7fff)) == 0) [[likely]] {
      return words;
    }
#endif
    return merged(rounded(first), rounded(second));
  }

  static ROPE_INLINE Words rounded(const Vectorized<float>& value) {
    const Words bits = at::vec::cast<std::int32_t>(value);
    return (bits | ((bits >> Words(16)) & Words(1))) + Words(0x7fff);
  }

  // The high halves of both.
  static ROPE_INLINE Words merged(const Words& first, const Words& second) {
#ifdef __AVX512BF16__
    if constexpr (!kParted) {
      return _mm512_permutex2var_epi16(first, places([](int i) { return 2 * i + 1; }), second);
    }
#endif
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second);
#elif defined(CPU_CAPABILITY_AVX2)
    return _mm256_blend_epi16(_mm256_srli_epi32(first, 16), second, 0xaa);
#else
    return ((first >> Words(16)) & Words(0xffff)) | (second & Words(kHighHalf));
#endif
  }

#ifdef __AVX512BF16__
  // Where each of the 16-bit elements of a vector comes from.
  template <typename From>
  static ROPE_INLINE __m512i places(const From&) {
    alignas(64) static constexpr auto kPlaces = [] {
      std::array<std::int16_t, kSize> result{};
      for (int i = 0; i < kSize; ++i) {
        result[i] = static_cast<std::int16_t>(From()(i));
      }
      return result;
    }();
    return _mm512_load_si512(kPlaces.data());
  }

  // Half of the elements, from the given one on, as floats.
  template <int begin>
  static ROPE_INLINE Vectorized<float> spread(const Words& words) {
    constexpr __mmask32 kHighHalves = 0xaaaaaaaa;
    const __m512i from = places([](int i) { return begin + i / 2; });
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kHighHalves, from, words));
  }

  // The elements of both, in the order of memory, but zero where they are subnormal.
  static ROPE_INLINE Words converted(const Vectorized<float>& first,
                                     const Vectorized<float>& second) {
    const __m512bh halves = _mm512_cvtne2ps_pbh(second, first);
    __m512i bits;
    std::memcpy(&bits, &halves, sizeof(bits));
    if constexpr (kParted) {
      return _mm512_permutexvar_epi16(places([](int i) { return i / 2 + i % 2 * (kSize / 2); }),
                                      bits);
    }
    return bits;
  }
#endif
};

// Pairs that one turn of the loop over a row rotates.
template <typename scalar_t, bool interleaved>
constexpr std::int64_t kPairsPerStep =
    interleaved ? Step<scalar_t, true>::Vector::size() : Step<scalar_t, false>::kSize;

// Calls visit(place, n) for each place of a row's cosines that one is wanted at, and for the pair n
// it belongs to.
template <typename scalar_t, bool interleaved, typename Visit>
ROPE_INLINE void for_each_place(std::int64_t num_pairs, const Visit& visit) {
  constexpr std::int64_t kPairs = kPairsPerStep<scalar_t, interleaved>;
  for (std::int64_t place = 0; place < num_pairs; place += kPairs) {
    const bool is_last = num_pairs < place + kPairs;
    const std::int64_t begin = is_last && num_pairs > kPairs ? num_pairs - kPairs : place;
    const std::int64_t count = num_pairs < kPairs ? num_pairs : kPairs;
    if (Step<scalar_t, interleaved>::kParted && !interleaved) {
      for (std::int64_t i = 0; i < count; ++i) {
        visit(place + i / 2 + i % 2 * (kPairs / 2), begin + i);
      }
    } else {
      for (std::int64_t i = 0; i < count; ++i) {
        visit(place + i, begin + i);
      }
    }
  }
}

// Where a row is read and where it is written.
template <typename scalar_t>
struct Row {
  const scalar_t* in;
  scalar_t* out;
};

// Rows of the embedding axis: those of some tokens times those that share the angles of a token.
template <typename scalar_t>
struct Rows {
  using Real = at::opmath_type<scalar_t>;
  Row<scalar_t> first;
  const std::int64_t* token_offsets;  // (num_tokens, kTokenArrays), beginning with in and out
  std::int64_t num_tokens;
  const std::int64_t* shared_offsets;  // (num_shared, 2): in and out
  std::int64_t num_shared;
  const Real* cos;  // (num_tokens, angles_stride)
  const Real* sin;
  std::int64_t angles_stride;
  std::int64_t num_tokens_of_thread;  // these and those that follow; others are not asked for
  std::int64_t read_ahead;            // bytes
  std::int64_t tokens_read_ahead;     // whose rows begin within so many bytes
  // Elements before and behind the rotated slice, out of place to be copied with it.
  std::int64_t before = 0;
  std::int64_t behind = 0;

  // How far ahead of the rows of a token memory is asked for.
  ROPE_INLINE std::int64_t ahead_of(std::int64_t token) const {
    return token + tokens_read_ahead < num_tokens_of_thread ? read_ahead : 0;
  }

  // Calls visit(row, token) for each row.
  template <typename Visit>
  ROPE_INLINE void for_each(const Visit& visit) const {
    for (std::int64_t token = 0; token < num_tokens; ++token) {
      for_each_of(token, [&](const Row<scalar_t>& row)
                             __attribute__((always_inline)) { visit(row, token); });
    }
  }

  // Calls visit(row) for each row of a token.
  template <typename Visit>
  ROPE_INLINE void for_each_of(std::int64_t token, const Visit& visit) const {
    const scalar_t* in = first.in + token_offsets[token * kTokenArrays];
    scalar_t* out = first.out + token_offsets[token * kTokenArrays + 1];
    for (std::int64_t shared = 0; shared < num_shared; ++shared) {
      visit({in + shared_offsets[2 * shared], out + shared_offsets[2 * shared + 1]});
    }
  }
};

// Stretches of memory that are walked together where the tokens of a head lie side by side: angles
// are loaded once for a row of each. A head in place is one stretch, out of place two.
constexpr std::int64_t kStretchesAtATime = 8;

// How far ahead of the row at hand memory is asked for, in bytes: in the one stretch that is
// walked, or in each of several. All that is under way has to fit into a first-level cache.
constexpr std::int64_t kReadAheadInOne = 8192;
constexpr std::int64_t kReadAheadInEach = 2048;
constexpr std::int64_t kCacheLine = 64;

template <typename scalar_t>
ROPE_INLINE void prefetch(const scalar_t* in, std::int64_t size, std::int64_t ahead) {
  const std::int64_t bytes = size * static_cast<std::int64_t>(sizeof(scalar_t));
  for (std::int64_t byte = 0; byte < bytes; byte += kCacheLine) {
    __builtin_prefetch(reinterpret_cast<const char*>(in) + byte + ahead);
  }
}

// Whether `size` elements can be streamed: whether they are whole lines of the caches. A line of
// which a part is streamed alone would be written twice.
template <typename scalar_t>
ROPE_INLINE bool can_stream(const scalar_t* out, std::int64_t size) {
  constexpr std::int64_t kLine = kCacheLine / sizeof(scalar_t);
  return size % kLine == 0 && reinterpret_cast<std::uintptr_t>(out) % kCacheLine == 0;
}

// Copies elements that are contiguous and do not overlap: std::memcpy, without a call for so few.
template <typename scalar_t>
ROPE_INLINE void copy(scalar_t* out, const scalar_t* in, std::int64_t count, bool may_stream) {
  using Vector = Vectorized<scalar_t>;
  constexpr std::int64_t kSize = Vector::size();
  if (count < kSize) {
    if (count > 0) {
      std::memcpy(out, in, count * sizeof(scalar_t));
    }
    return;
  }
  const bool streams = may_stream && can_stream(out, count);
  for (std::int64_t i = 0; i < count - kSize; i += kSize) {
    store(Vector::loadu(in + i), out + i, streams);
  }
  store(Vector::loadu(in + count - kSize), out + count - kSize, streams);
}

// Asks for what comes `ahead` bytes after a row, and copies what is around its slice.
template <bool copies, typename scalar_t>
ROPE_INLINE void begin_row(const Rows<scalar_t>& rows, const Row<scalar_t>& row, std::int64_t slice,
                           std::int64_t ahead, bool may_stream) {
  prefetch(row.in - rows.before, rows.before + slice + rows.behind, ahead);
  if constexpr (copies) {
    copy(row.out - rows.before, row.in - rows.before, rows.before, may_stream);
    copy(row.out + slice, row.in + slice, rows.behind, may_stream);
  }
}

// The angles of `size` vectors of pairs.
template <typename Vector, int size>
struct Angles {
  Rotation<Vector> vectors[size];

  template <typename Real>
  static ROPE_INLINE Angles load(const Real* cos, const Real* sin, std::int64_t /*half*/ = 0) {
    Angles loaded;
    for (int v = 0; v < size; ++v) {
      loaded.vectors[v] = {Vector::loadu(cos + v * Vector::size()),
                           Vector::loadu(sin + v * Vector::size())};
    }
    return loaded;
  }
};

// Likewise of full-width tables, whose second elements have theirs `half` behind the first.
template <typename Vector, int size>
struct FullAngles {
  FullRotation<Vector> vectors[size];

  template <typename Real>
  static ROPE_INLINE FullAngles load(const Real* cos, const Real* sin, std::int64_t half) {
    FullAngles loaded;
    const auto a = Angles<Vector, size>::load(cos, sin);
    const auto b = Angles<Vector, size>::load(cos + half, sin + half);
    for (int v = 0; v < size; ++v) {
      loaded.vectors[v] = {a.vectors[v], b.vectors[v]};
    }
    return loaded;
  }
};

// What one turn of the loop over a row holds. `count` is the number of pairs from n on.
// Scalar math: out[n], out[n + N] = rotate({in[n], in[n + N]}, {cos[n], sin[n]})
template <typename scalar_t>
struct Halves {
  using S = Step<scalar_t, false>;
  using Vector = typename S::Vector;
  using TurnAngles = Angles<Vector, S::kVectors>;
  using TurnFullAngles = FullAngles<Vector, S::kVectors>;
  S a;
  S b;

  static ROPE_INLINE Halves load(const scalar_t* in, std::int64_t n, std::int64_t num_pairs,
                                 std::int64_t count) {
    return {S::load(in + n, count), S::load(in + num_pairs + n, count)};
  }
  template <typename AnglesOfTurn>
  ROPE_INLINE void turn(const AnglesOfTurn& angles) {
    for (int v = 0; v < S::kVectors; ++v) {
      const auto turned = rotate<Vector>({a.vectors[v], b.vectors[v]}, angles.vectors[v]);
      a.vectors[v] = turned.a;
      b.vectors[v] = turned.b;
    }
  }
  ROPE_INLINE void store(scalar_t* out, std::int64_t n, std::int64_t num_pairs, std::int64_t count,
                         bool streams) const {
    a.store(out + n, count, streams);
    b.store(out + num_pairs + n, count, streams);
  }
};

// Scalar math: out[2n], out[2n + 1] = rotate({in[2n], in[2n + 1]}, {cos[n], sin[n]})
template <typename scalar_t>
struct Interleaved {
  using S = Step<scalar_t, true>;
  using Vector = typename S::Vector;
  using TurnAngles = Angles<Vector, 1>;
  using TurnFullAngles = FullAngles<Vector, 1>;
  // Two vectors hold as many pairs as one has elements: two steps, or one of 16-bit elements.
  static constexpr int kSteps = 2 / S::kVectors;
  S steps[kSteps];

  static ROPE_INLINE Interleaved load(const scalar_t* in, std::int64_t n, std::int64_t,
                                      std::int64_t count) {
    Interleaved loaded;
    for (int step = 0; step < kSteps; ++step) {
      const std::int64_t left = 2 * count - step * S::kSize;
      loaded.steps[step] = S::load(in + 2 * n + step * S::kSize, left > 0 ? left : 0);
    }
    return loaded;
  }
  template <typename AnglesOfTurn>
  ROPE_INLINE void turn(const AnglesOfTurn& angles) {
    const auto& angle = angles.vectors[0];
    Vector& first = steps[0].vectors[0];
    Vector& second = steps[kSteps - 1].vectors[S::kVectors - 1];
    if constexpr (S::kParted) {
      const auto turned = rotate<Vector>({first, second}, angle);
      first = turned.a;
      second = turned.b;
    } else {
      const auto [a, b] = at::vec::deinterleave2(first, second);
      const auto turned = rotate<Vector>({a, b}, angle);
      const auto [even, odd] = at::vec::interleave2(turned.a, turned.b);
      first = even;
      second = odd;
    }
  }
  ROPE_INLINE void store(scalar_t* out, std::int64_t n, std::int64_t, std::int64_t count,
                         bool streams) const {
    for (int step = 0; step < kSteps; ++step) {
      const std::int64_t left = 2 * count - step * S::kSize;
      if (left > 0) {
        steps[step].store(out + 2 * n + step * S::kSize, left, streams);
      }
    }
  }
};

template <typename scalar_t, bool interleaved>
using Turn = std::conditional_t<interleaved, Interleaved<scalar_t>, Halves<scalar_t>>;

template <typename Turn, bool full_width>
using AnglesOf =
    std::conditional_t<full_width, typename Turn::TurnFullAngles, typename Turn::TurnAngles>;

// Rows of a few steps, of which the last one may overlap the one before. See NOTE [ Last step of a
// row ]
template <typename scalar_t, bool interleaved, bool full_width, bool overlaps, std::int64_t... step>
struct RowOfSteps {
  using Turn = rope::cpu::Turn<scalar_t, interleaved>;
  using TurnAngles = AnglesOf<Turn, full_width>;
  static constexpr std::int64_t kPairs = kPairsPerStep<scalar_t, interleaved>;
  static constexpr std::int64_t kLast = sizeof...(step) - 1;
  // Steps that are loaded before the first of them is stored: as many as registers have room for. A
  // load waits for a store before it whose address is the same modulo 4096.
  static constexpr std::int64_t kAtOnce = 8 * sizeof(typename Turn::Vector) / sizeof(Turn);

  TurnAngles angles[sizeof...(step)];

  template <typename Real>
  static ROPE_INLINE RowOfSteps load(const Real* cos, const Real* sin, std::int64_t half) {
    return {{TurnAngles::load(cos + step * kPairs, sin + step * kPairs, half)...}};
  }
  template <bool streams>
  ROPE_INLINE void rotate(const scalar_t* in, scalar_t* out, std::int64_t num_pairs) const {
    if constexpr (overlaps) {
      const std::int64_t last = num_pairs - kPairs;
      Turn turn = Turn::load(in, last, num_pairs, kPairs);
      rotate_steps<streams, 0, kLast>(in, out, num_pairs);
      turn.turn(angles[kLast]);
      turn.store(out, last, num_pairs, kPairs, streams);
    } else {
      rotate_steps<streams, 0, kLast + 1>(in, out, (kLast + 1) * kPairs);
    }
  }

 private:
  // The steps [begin, end).
  template <bool streams, std::int64_t begin, std::int64_t end>
  ROPE_INLINE void rotate_steps(const scalar_t* in, scalar_t* out, std::int64_t num_pairs) const {
    if constexpr (end - begin > kAtOnce) {
      rotate_steps<streams, begin, begin + kAtOnce>(in, out, num_pairs);
      rotate_steps<streams, begin + kAtOnce, end>(in, out, num_pairs);
    } else {
      rotate_at_once<streams, begin>(in, out, num_pairs,
                                     std::make_integer_sequence<std::int64_t, end - begin>());
    }
  }
  template <bool streams, std::int64_t begin, std::int64_t... i>
  ROPE_INLINE void rotate_at_once(const scalar_t* in, scalar_t* out, std::int64_t num_pairs,
                                  std::integer_sequence<std::int64_t, i...>) const {
    Turn turns[] = {Turn::load(in, (begin + i) * kPairs, num_pairs, kPairs)...};
    (turns[i].turn(angles[begin + i]), ...);
    (turns[i].store(out, (begin + i) * kPairs, num_pairs, kPairs, streams), ...);
  }
};

// The angles of a token stay in registers for all its rows, as far as there are so many.
template <typename scalar_t, bool interleaved, bool full_width, bool copies, bool overlaps,
          std::int64_t... step>
ROPE_LOOP void rotate_slices_of_steps(const Rows<scalar_t>& all_rows, std::int64_t num_pairs,
                                      bool may_stream,
                                      std::integer_sequence<std::int64_t, step...>) {
  const Rows<scalar_t> rows = all_rows;
  using Angles = RowOfSteps<scalar_t, interleaved, full_width, overlaps, step...>;
  for (std::int64_t token = 0; token < rows.num_tokens; ++token) {
    const std::int64_t place = token * rows.angles_stride;
    const Angles angles = Angles::load(rows.cos + place, rows.sin + place, padded(num_pairs));
    const std::int64_t ahead = rows.ahead_of(token);
    rows.for_each_of(token, [&](const Row<scalar_t>& row) __attribute__((always_inline)) {
      begin_row<copies>(rows, row, 2 * num_pairs, ahead, may_stream);
      if (!overlaps && may_stream && can_stream(row.out, 2 * num_pairs)) [[unlikely]] {
        angles.template rotate<true>(row.in, row.out, num_pairs);
      } else {
        angles.template rotate<false>(row.in, row.out, num_pairs);
      }
    });
  }
}

// One row of any size.
template <typename scalar_t, bool interleaved, bool full_width, typename Real>
ROPE_INLINE void rotate_slice(const scalar_t* in, scalar_t* out, const Real* cos, const Real* sin,
                              std::int64_t num_pairs, bool may_stream) {
  using Turn = rope::cpu::Turn<scalar_t, interleaved>;
  const auto load_angles = [&](std::int64_t place) __attribute__((always_inline)) {
    return AnglesOf<Turn, full_width>::load(cos + place, sin + place, padded(num_pairs));
  };
  constexpr std::int64_t kPairs = kPairsPerStep<scalar_t, interleaved>;
  const std::int64_t whole = num_pairs / kPairs * kPairs;
  const bool is_short = 0 < num_pairs && num_pairs < kPairs;
  const bool overlaps = !is_short && whole < num_pairs;  // See NOTE [ Last step of a row ]
  const bool streams = whole == num_pairs && may_stream && can_stream(out, 2 * num_pairs);
  const std::int64_t last = overlaps ? num_pairs - kPairs : 0;
  Turn last_turn;
  if (overlaps || is_short) {
    last_turn = Turn::load(in, last, num_pairs, is_short ? num_pairs : kPairs);
  }
  for (std::int64_t n = 0; n < whole; n += kPairs) {
    Turn turn = Turn::load(in, n, num_pairs, kPairs);
    turn.turn(load_angles(n));
    turn.store(out, n, num_pairs, kPairs, streams);
  }
  if (overlaps || is_short) {
    last_turn.turn(load_angles(whole));
    last_turn.store(out, last, num_pairs, is_short ? num_pairs : kPairs, /*streams=*/false);
  }
}

template <typename scalar_t, bool interleaved, bool full_width, bool copies>
ROPE_LOOP void rotate_slices_of_any_size(const Rows<scalar_t>& rows, std::int64_t num_pairs,
                                         bool may_stream) {
  rows.for_each([&](const Row<scalar_t>& row, std::int64_t token) __attribute__((always_inline)) {
    const std::int64_t place = token * rows.angles_stride;
    begin_row<copies>(rows, row, 2 * num_pairs, rows.ahead_of(token), may_stream);
    rotate_slice<scalar_t, interleaved, full_width>(row.in, row.out, rows.cos + place,
                                                    rows.sin + place, num_pairs, may_stream);
  });
}

// Rows of at least `count` steps.
template <typename scalar_t, bool interleaved, bool full_width, bool copies, std::int64_t count = 1>
ROPE_INLINE void rotate_slices(const Rows<scalar_t>& rows, std::int64_t num_pairs,
                               bool may_stream) {
  // Loops of their own for rows of so few vectors of cosines; float64 is not worth its own.
  constexpr std::int64_t kMostVectors = std::is_same_v<scalar_t, double> ? 0 : full_width ? 4 : 8;
  constexpr std::int64_t kPairs = kPairsPerStep<scalar_t, interleaved>;
  constexpr std::int64_t kVectors = sizeof(typename Turn<scalar_t, interleaved>::TurnAngles) /
                                    sizeof(typename Turn<scalar_t, interleaved>::Vector) / 2;
  if constexpr (count * kVectors <= kMostVectors) {
    constexpr std::make_integer_sequence<std::int64_t, count> kSteps;
    if (num_pairs == count * kPairs) {
      rotate_slices_of_steps<scalar_t, interleaved, full_width, copies, false>(rows, num_pairs,
                                                                               may_stream, kSteps);
      return;
    }
    if constexpr (count > 1) {
      if ((count - 1) * kPairs < num_pairs && num_pairs < count * kPairs) {
        rotate_slices_of_steps<scalar_t, interleaved, full_width, copies, true>(rows, num_pairs,
                                                                                may_stream, kSteps);
        return;
      }
    }
    rotate_slices<scalar_t, interleaved, full_width, copies, count + 1>(rows, num_pairs,
                                                                        may_stream);
  } else {
    rotate_slices_of_any_size<scalar_t, interleaved, full_width, copies>(rows, num_pairs,
                                                                         may_stream);
  }
}

// -------------------------------------------------------------------------------------------------
// Cosines and sines of a token

// A NaN whose low bits are zero for any NaN: see NOTE [ bfloat16 in words ].
template <typename Real>
ROPE_INLINE Rotation<Real> quiet(const Rotation<Real>& angle) {
  constexpr Real kNaN = std::numeric_limits<Real>::quiet_NaN();
  return {angle.cos == angle.cos ? angle.cos : kNaN, angle.sin == angle.sin ? angle.sin : kNaN};
}

// Frequencies of all axes, in the order of the rows of cosines, padded, and the sums of their
// magnitudes: no angle of a token is larger than its positions times those.
template <typename scalar_t, bool interleaved, typename Frequency>
ROPE_INLINE void load_frequencies(const Launch& launch, const Workspace& workspace) {
  const PositionAngles& angles = launch.position_angles;
  auto* frequencies = static_cast<Frequency*>(workspace.frequencies);
  const std::int64_t length = padded(launch.num_pairs);
  for (int axis = 0; axis < angles.num_axes; ++axis) {
    Frequency* row = frequencies + axis * length;
    for (std::int64_t place = 0; place < length; ++place) {
      row[place] = 0;
    }
    for_each_place<scalar_t, interleaved>(
        launch.num_pairs, [&](std::int64_t place, std::int64_t n) __attribute__((always_inline)) {
          row[place] = angles.inv_freq == nullptr
                           ? static_cast<Frequency>(angles.wavelength_frequencies[n])
                           : static_cast<const Frequency*>(
                                 angles.inv_freq)[axis * angles.inv_freq_axis_stride +
                                                  n * angles.inv_freq_stride];
        });
    double sum = 0;
    for (std::int64_t place = 0; place < length; ++place) {
      sum += row[place] < 0 ? -row[place] : row[place];
    }
    workspace.frequency_sums[axis] = sum;
  }
}

// Cosines and sines of the angles angle_of(n), none of which is larger than `largest`.
template <typename Real, typename AngleOf>
ROPE_INLINE void rotations_of_angles(const Launch& launch, double largest, const AngleOf& angle_of,
                                     Real* __restrict cos, Real* __restrict sin) {
  const std::int64_t length = padded(launch.num_pairs);
  const auto factor = static_cast<Real>(launch.position_angles.attention_factor);
  const bool conjugate = launch.conjugate;
  if constexpr (std::is_same_v<Real, float>) {
    if (largest < kReducible) {
      for (std::int64_t n = 0; n < length; ++n) {
        const auto angle = scale(reduced_rotation(angle_of(n)), factor, conjugate);
        cos[n] = angle.cos;
        sin[n] = angle.sin;
      }
      return;
    }
  }
  for (std::int64_t n = 0; n < length; ++n) {
    const auto angle = quiet(scale(rotation<Real>(angle_of(n)), factor, conjugate));
    cos[n] = angle.cos;
    sin[n] = angle.sin;
  }
}

// Cosines and sines of one token, whose positions begin at the offset.
template <typename Frequency, typename Real>
ROPE_INLINE void rotations_of_position(const Launch& launch, const Workspace& workspace,
                                       std::int64_t position_offset, Real* cos, Real* sin) {
  const PositionAngles& source = launch.position_angles;
  const auto* frequencies = static_cast<const Frequency*>(workspace.frequencies);
  const std::int64_t length = padded(launch.num_pairs);
  const auto load = [&](int axis) {
    return load_position<Frequency>(source.positions, source.positions_dtype,
                                    position_offset + axis * source.positions_axis_stride);
  };
  double largest = 0;
  for (int axis = 0; axis < source.num_axes; ++axis) {
    const auto position = static_cast<double>(load(axis));
    largest += (position < 0 ? -position : position) * workspace.frequency_sums[axis];
  }
  // Loops that compilers turn into vector code.
  const auto rotate_by_axes = [&](auto num_axes,
                                  double scale_factor) __attribute__((always_inline)) {
    Frequency positions[num_axes];
    for (int axis = 0; axis < num_axes; ++axis) {
      positions[axis] = load(axis);
    }
    rotations_of_angles<Real>(
        launch, largest / scale_factor,
        [&](std::int64_t n) __attribute__((always_inline)) {
          return form_angle<Frequency>(
              num_axes, [&](int axis) { return positions[axis]; },
              [&](int axis) { return frequencies[axis * length + n]; }, scale_factor);
        },
        cos, sin);
  };
  // Several axes have frequencies of their own, which go without a scale_factor.
  switch (source.num_axes) {
    case 1:
      if (source.scale_factor == 1.0) {  // known to the compiler, so that nothing is divided
        return rotate_by_axes(std::integral_constant<int, 1>{}, 1.0);
      }
      return rotate_by_axes(std::integral_constant<int, 1>{}, source.scale_factor);
    case 2:
      return rotate_by_axes(std::integral_constant<int, 2>{}, 1.0);
    case 3:
      return rotate_by_axes(std::integral_constant<int, 3>{}, 1.0);
  }
  double* angles = workspace.angles;
  for (std::int64_t n = 0; n < length; ++n) {
    const auto inv_freq = [&](int axis) { return frequencies[axis * length + n]; };
    angles[n] = form_angle<Frequency>(source.num_axes, load, inv_freq, 1.0);
  }
  rotations_of_angles<Real>(
      launch, largest, [&](std::int64_t n) __attribute__((always_inline)) { return angles[n]; },
      cos, sin);
}

template <typename scalar_t, bool interleaved, typename Table, typename Real>
ROPE_INLINE void rotations_of_table(const Launch& launch, const std::int64_t* offsets,
                                    Real* __restrict cos, Real* __restrict sin) {
  const TableAngles table = launch.table_angles;
  const auto row = find_table_row<Table>(table, offsets[kAngle], offsets[kSin]);
  if (table.full_width) {
    const std::int64_t half = padded(launch.num_pairs);
    for_each_place<scalar_t, interleaved>(
        launch.num_pairs, [&](std::int64_t place, std::int64_t n) __attribute__((always_inline)) {
          const auto loaded =
              load_full_rotation<Real>(table, row, n, launch.num_pairs, launch.interleaved);
          const auto angle = launch.conjugate ? transpose(loaded) : loaded;
          const Rotation<Real> a = quiet(angle.a);
          const Rotation<Real> b = quiet(angle.b);
          cos[place] = a.cos;
          sin[place] = a.sin;
          cos[half + place] = b.cos;
          sin[half + place] = b.sin;
        });
    return;
  }
  for_each_place<scalar_t, interleaved>(
      launch.num_pairs, [&](std::int64_t place, std::int64_t n) __attribute__((always_inline)) {
        const auto angle =
            quiet(scale(rope::load_rotation<Real>(table, row, n), Real(1), launch.conjugate));
        cos[place] = angle.cos;
        sin[place] = angle.sin;
      });
}

template <typename scalar_t, bool interleaved, typename Real>
ROPE_INLINE void rotations_of_token(const Launch& launch, const Workspace& workspace,
                                    const std::int64_t* offsets, Real* cos, Real* sin) {
  if (!launch.uses_tables) {
    if (launch.position_angles.inv_freq_dtype == c10::ScalarType::Float) {
      rotations_of_position<float>(launch, workspace, offsets[kAngle], cos, sin);
    } else {
      rotations_of_position<double>(launch, workspace, offsets[kAngle], cos, sin);
    }
    return;
  }
  switch (launch.table_angles.dtype) {
    case c10::ScalarType::Double:
      return rotations_of_table<scalar_t, interleaved, double>(launch, offsets, cos, sin);
    case c10::ScalarType::Float:
      return rotations_of_table<scalar_t, interleaved, float>(launch, offsets, cos, sin);
    case c10::ScalarType::Half:
      return rotations_of_table<scalar_t, interleaved, c10::Half>(launch, offsets, cos, sin);
    case c10::ScalarType::BFloat16:
      return rotations_of_table<scalar_t, interleaved, c10::BFloat16>(launch, offsets, cos, sin);
    default:
      throw_unsupported_dtype(launch.table_angles.dtype);
  }
}

// -------------------------------------------------------------------------------------------------
// Rows

// Rows whose elements have gaps between them: the slice is rotated in a contiguous copy.
template <typename scalar_t, bool interleaved, bool full_width>
ROPE_LOOP void rotate_rows_with_gaps(const Launch& launch, const Operand& operand,
                                     const Workspace& workspace, const Rows<scalar_t>& rows) {
  auto* slice = static_cast<scalar_t*>(workspace.row);
  const std::int64_t begin = launch.rotary_offset;
  const std::int64_t end = begin + 2 * launch.num_pairs;
  rows.for_each([&](const Row<scalar_t>& row, std::int64_t token) __attribute__((always_inline)) {
    for (std::int64_t d = 0; d < operand.axis_size; ++d) {
      const scalar_t element = row.in[d * operand.in_axis_stride];
      if (begin <= d && d < end) {
        slice[d - begin] = element;
      } else if (operand.in != operand.out) {
        row.out[d * operand.out_axis_stride] = element;
      }
    }
    const std::int64_t place = token * rows.angles_stride;
    rotate_slice<scalar_t, interleaved, full_width>(slice, slice, rows.cos + place,
                                                    rows.sin + place, launch.num_pairs,
                                                    /*may_stream=*/false);
    for (std::int64_t d = begin; d < end; ++d) {
      row.out[d * operand.out_axis_stride] = slice[d - begin];
    }
  });
}

// Rows of the embedding axis, wherever their elements lie.
template <typename scalar_t, bool interleaved, bool full_width>
ROPE_INLINE void rotate_rows(const Launch& launch, const Operand& operand,
                             const Workspace& workspace, Rows<scalar_t> rows) {
  if (operand.in_axis_stride != 1 || operand.out_axis_stride != 1) {
    rotate_rows_with_gaps<scalar_t, interleaved, full_width>(launch, operand, workspace, rows);
    return;
  }
  rows.first.in += launch.rotary_offset;
  rows.first.out += launch.rotary_offset;
  rows.before = launch.rotary_offset;
  rows.behind = operand.axis_size - launch.rotary_offset - 2 * launch.num_pairs;
  if (operand.in != operand.out && rows.before + rows.behind > 0) {
    rotate_slices<scalar_t, interleaved, full_width, true>(rows, launch.num_pairs,
                                                           workspace.may_stream);
  } else {
    rotate_slices<scalar_t, interleaved, full_width, false>(rows, launch.num_pairs,
                                                            workspace.may_stream);
  }
}

// The rows of one operand that belong to the block, walked in the order of memory.
template <typename scalar_t, bool interleaved>
ROPE_INLINE void rotate_operand(const Launch& launch, int index, const Workspace& workspace,
                                const Block& block) {
  using Real = at::opmath_type<scalar_t>;
  const Operand& operand = launch.operands[index];
  const std::int64_t num_shared = operand.heads.count();
  const std::int64_t shared_begin = num_shared * block.part / block.num_parts;
  const std::int64_t shared_end = num_shared * (block.part + 1) / block.num_parts;

  // Where the tokens of a head lie side by side, few heads are walked at a time.
  const int last_token = launch.tokens.num_dims - 1;
  const int last_shared = operand.heads.num_dims - 1;
  const bool tokens_inside =
      last_token >= 0 && last_shared >= 0 &&
      launch.tokens.strides[kOut + 2 * index][last_token] < operand.heads.strides[1][last_shared];
  const std::int64_t read_ahead = tokens_inside ? kReadAheadInEach : kReadAheadInOne;
  const std::int64_t token_bytes = last_token < 0
                                       ? 0
                                       : launch.tokens.strides[kIn + 2 * index][last_token] *
                                             static_cast<std::int64_t>(sizeof(scalar_t));
  const std::int64_t heads = kStretchesAtATime / (operand.in == operand.out ? 1 : 2);
  const std::int64_t chunk_size = tokens_inside ? heads : kSharedChunk;
  for (std::int64_t chunk = shared_begin; chunk < shared_end; chunk += chunk_size) {
    const std::int64_t num_chunk =
        shared_end - chunk < chunk_size ? shared_end - chunk : chunk_size;
    for (std::int64_t s = 0; s < num_chunk; ++s) {
      std::int64_t offsets[2];
      operand.heads.offsets(chunk + s, offsets);
      workspace.shared_offsets[2 * s] = offsets[0];
      workspace.shared_offsets[2 * s + 1] = offsets[1];
    }
    const Rows<scalar_t> rows{
        {static_cast<const scalar_t*>(operand.in), static_cast<scalar_t*>(operand.out)},
        workspace.token_offsets + kIn + 2 * index,
        block.token_end - block.token_begin,
        workspace.shared_offsets,
        num_chunk,
        static_cast<const Real*>(workspace.cos),
        static_cast<const Real*>(workspace.sin),
        angles_length(launch),
        block.thread_end - block.token_begin,
        read_ahead,
        1 + read_ahead / (token_bytes + 1)};
    has_full_width(launch)
        ? rotate_rows<scalar_t, interleaved, true>(launch, operand, workspace, rows)
        : rotate_rows<scalar_t, interleaved, false>(launch, operand, workspace, rows);
  }
}

template <typename scalar_t, bool interleaved>
ROPE_INLINE void rotate_block(const Launch& launch, const Workspace& workspace,
                              const Block& block) {
  using Real = at::opmath_type<scalar_t>;
  if (!launch.uses_tables) {
    if (launch.position_angles.inv_freq_dtype == c10::ScalarType::Float) {
      load_frequencies<scalar_t, interleaved, float>(launch, workspace);
    } else {
      load_frequencies<scalar_t, interleaved, double>(launch, workspace);
    }
  }
  const std::int64_t length = angles_length(launch);
  for (std::int64_t token = block.token_begin; token < block.token_end; ++token) {
    const std::int64_t row = token - block.token_begin;
    std::int64_t offsets[kTokenArrays];
    launch.tokens.offsets(token, offsets);
    for (int array = 0; array < kTokenArrays; ++array) {
      workspace.token_offsets[row * kTokenArrays + array] = offsets[array];
    }
    rotations_of_token<scalar_t, interleaved>(launch, workspace, offsets,
                                              static_cast<Real*>(workspace.cos) + row * length,
                                              static_cast<Real*>(workspace.sin) + row * length);
  }
  for (int index = 0; index < launch.num_operands; ++index) {
    rotate_operand<scalar_t, interleaved>(launch, index, workspace, block);
  }
}

template <typename scalar_t>
ROPE_INLINE void rotate_block(const Launch& launch, const Workspace& workspace,
                              const Block& block) {
  launch.interleaved ? rotate_block<scalar_t, true>(launch, workspace, block)
                     : rotate_block<scalar_t, false>(launch, workspace, block);
}

}  // namespace

#define ROPE_CONCATENATE_(a, b) a##b
#define ROPE_CONCATENATE(a, b) ROPE_CONCATENATE_(a, b)

ROPE_ENTRY void ROPE_CONCATENATE(rotate_, CPU_CAPABILITY)(const Launch& launch,
                                                          const Workspace& workspace,
                                                          const Block& block) {
#ifdef __AVX512BF16__  // for bfloat16 alone
  rotate_block<c10::BFloat16>(launch, workspace, block);
#else
  switch (launch.dtype) {
    case c10::ScalarType::Double:
      rotate_block<double>(launch, workspace, block);
      break;
    case c10::ScalarType::Float:
      rotate_block<float>(launch, workspace, block);
      break;
    case c10::ScalarType::Half:
      rotate_block<c10::Half>(launch, workspace, block);
      break;
    case c10::ScalarType::BFloat16:
      rotate_block<c10::BFloat16>(launch, workspace, block);
      break;
    default:
      throw_unsupported_dtype(launch.dtype);
  }
#endif
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  if (workspace.may_stream) {
    _mm_sfence();  // Others see what was streamed before they see that the block is done.
  }
#endif
}

}  // namespace rope::cpu
