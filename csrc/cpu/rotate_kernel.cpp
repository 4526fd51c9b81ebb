// NOTE [ The CPU kernel ]
//
// From the outside in:
//   entry    chooses the dtype
//   block    some tokens and some of their heads. Finds the angles of the tokens once, for q and k
//   operand  q or k. Its vectors run along the embedding axis where that is contiguous; otherwise
//            along tokens or heads, whichever are contiguous, each pair of elements in turn
//   row      the embedding axis of one head of one token (cpu/rows.h)
//   step     what one vector of stored elements holds (cpu/step.h)
// Where the angles are is in cpu/angles.h.
//
// This file and what it includes from cpu/ is compiled once for each CPU capability, with the
// instructions of that capability. Only the entry may leave the object: the linker would share an
// inline function of the same name with code for older processors (the build asserts it). Hence raw
// pointers, no containers, and everything inlined but the loops over rows.
#include "cpu/angles.h"
#include "cpu/dispatch.h"
#include "cpu/kernel.h"
#include "cpu/rows.h"
#include "cpu/step.h"

namespace rope::cpu {

namespace {

// Prefetch distance in bytes, in the one sequence of rows that is walked or in each of several.
// What is in flight has to fit into L1.
constexpr std::int64_t kPrefetchInOne = 8192;
constexpr std::int64_t kPrefetchInEach = 2048;

// Where vectors run along tokens or heads: as many pairs of elements ahead.
constexpr std::int64_t kPairsAhead = 2;

// Heads walked together where the tokens of a head are contiguous: angles are loaded once for a row
// of each. Half as many out of place, where each head is two sequences.
constexpr std::int64_t kHeadsTogether = 8;

// The stride of the last loop over tokens in the output of an operand, and over heads.
ROPE_INLINE std::int64_t last_token_stride(const Launch& launch, int index) {
  const auto& tokens = launch.tokens;
  return tokens.num_dims == 0 ? 0 : tokens.strides[kOut + 2 * index][tokens.num_dims - 1];
}
ROPE_INLINE std::int64_t last_head_stride(const Operand& operand) {
  return operand.heads.num_dims == 0 ? 0 : operand.heads.strides[1][operand.heads.num_dims - 1];
}

// One operand in one block.
template <typename scalar_t>
struct Part {
  const Launch& launch;
  const Workspace& workspace;
  const Operand& operand;
  int index;
  std::int64_t head_begin;
  std::int64_t head_end;

  ROPE_INLINE const scalar_t* in() const { return static_cast<const scalar_t*>(operand.in); }
  ROPE_INLINE scalar_t* out() const { return static_cast<scalar_t*>(operand.out); }
  ROPE_INLINE bool in_place() const { return operand.in == operand.out; }
  // Offsets of the tokens of the block, in and out.
  ROPE_INLINE const std::int64_t* token_offsets() const {
    return workspace.token_offsets + kIn + 2 * index;
  }
};

template <typename scalar_t>
ROPE_INLINE Part<scalar_t> part_of(const Launch& launch, const Workspace& workspace,
                                   const Block& block, int index) {
  const Operand& operand = launch.operands[index];
  const std::int64_t num_heads = operand.heads.count();
  return {launch,
          workspace,
          operand,
          index,
          num_heads * block.part / block.num_parts,
          num_heads * (block.part + 1) / block.num_parts};
}

// Along the dimension whose elements are closest, if it is long enough for a vector.
template <typename scalar_t>
ROPE_INLINE Along along_of(const Launch& launch, int index) {
  constexpr std::int64_t kSize = Step<scalar_t>::kSize;
  const Operand& operand = launch.operands[index];
  if (operand.in_axis_stride == 1 && operand.out_axis_stride == 1) {
    return Along::kAxis;
  }
  Along along = Along::kAxis;
  std::int64_t closest = operand.out_axis_stride;
  const auto& tokens = launch.tokens;
  if (tokens.num_dims > 0 && tokens.sizes[tokens.num_dims - 1] >= kSize &&
      last_token_stride(launch, index) < closest) {
    along = Along::kTokens;
    closest = last_token_stride(launch, index);
  }
  if (operand.heads.num_dims > 0 && operand.heads.sizes[operand.heads.num_dims - 1] >= kSize &&
      last_head_stride(operand) < closest) {
    along = Along::kHeads;
  }
  return along;
}

// How many iterations of the last loop, of some size, follow `index` up to `end`, at most as many
// as a block has tokens.
ROPE_INLINE std::int64_t run_length(std::int64_t index, std::int64_t end, std::int64_t size) {
  const std::int64_t left = size - index % size;
  const std::int64_t most = left < kMaxBlockTokens ? left : kMaxBlockTokens;
  return end - index < most ? end - index : most;
}

// Writes the offsets of some heads, from `head` on, at most `most`; returns how many.
template <typename scalar_t>
ROPE_INLINE std::int64_t load_heads(const Part<scalar_t>& part, std::int64_t head,
                                    std::int64_t most) {
  const std::int64_t left = part.head_end - head;
  const std::int64_t count = left < most ? left : most;
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t offsets[2];
    part.operand.heads.offsets(head + i, offsets);
    part.workspace.head_offsets[2 * i] = offsets[0];
    part.workspace.head_offsets[2 * i + 1] = offsets[1];
  }
  return count;
}

// Rows that are strided, each in a contiguous copy.
template <bool interleaved, bool full_width, typename scalar_t>
ROPE_INLINE void rotate_copied_rows(const Part<scalar_t>& part, const Rows<scalar_t>& rows) {
  const Operand& operand = part.operand;
  const std::int64_t no_offset[2] = {0, 0};
  auto* slice = static_cast<scalar_t*>(part.workspace.row);
  Rows<scalar_t> row{slice,          slice,       no_offset,   1,     no_offset, 1, rows.angles,
                     rows.num_pairs, rows.before, rows.behind, false, false,     0, 0};
  for (std::int64_t token = 0; token < rows.num_tokens; ++token) {
    const std::int64_t* offsets = rows.token_offsets + token * kTokenArrays;
    row.angles.cos = rows.angles.cos + token * rows.angles.stride;
    row.angles.sin = rows.angles.sin + token * rows.angles.stride;
    for (std::int64_t head = 0; head < rows.num_heads; ++head) {
      const Strided<const scalar_t> in{part.in() + offsets[0] + rows.head_offsets[2 * head],
                                       operand.in_axis_stride};
      const Strided<scalar_t> out{part.out() + offsets[1] + rows.head_offsets[2 * head + 1],
                                  operand.out_axis_stride};
      if (!part.in_place()) {
        copy_strided(out, in, rows.before);
        const std::int64_t behind = rows.before + 2 * rows.num_pairs;
        copy_strided(Strided<scalar_t>{&out[behind], out.stride},
                     Strided<const scalar_t>{&in[behind], in.stride}, rows.behind);
      }
      rotate_copied_row<interleaved, full_width>(row, in, out);
    }
  }
}

template <bool interleaved, bool full_width, typename scalar_t>
ROPE_LOOP void rotate_along_axis(const Part<scalar_t>& part, std::int64_t num_tokens,
                                 const AngleRows<scalar_t>& angles) {
  const Launch& launch = part.launch;
  const Operand& operand = part.operand;
  const std::int64_t size = 2 * launch.num_pairs;
  const std::int64_t behind = operand.axis_size - launch.rotary_offset - size;
  const bool contiguous = operand.in_axis_stride == 1 && operand.out_axis_stride == 1;
  const bool tokens_inside =
      last_token_stride(part.launch, part.index) < last_head_stride(part.operand);
  const std::int64_t distance = tokens_inside ? kPrefetchInEach : kPrefetchInOne;
  const std::int64_t token_bytes =
      last_token_stride(part.launch, part.index) * static_cast<std::int64_t>(sizeof(scalar_t));
  const std::int64_t most = !tokens_inside    ? kMaxHeads
                            : part.in_place() ? kHeadsTogether
                                              : kHeadsTogether / 2;
  std::int64_t count;
  for (std::int64_t head = part.head_begin; head < part.head_end; head += count) {
    count = load_heads(part, head, most);
    const Rows<scalar_t> rows{part.in() + launch.rotary_offset,
                              part.out() + launch.rotary_offset,
                              part.token_offsets(),
                              num_tokens,
                              part.workspace.head_offsets,
                              count,
                              angles,
                              launch.num_pairs,
                              launch.rotary_offset,
                              behind,
                              !part.in_place() && size < operand.axis_size,
                              part.workspace.may_stream,
                              distance,
                              1 + distance / (token_bytes + 1)};
    if (contiguous) {
      rotate_rows<interleaved, full_width>(rows);
    } else {
      rotate_copied_rows<interleaved, full_width>(part, rows);
    }
  }
}

// `count` tokens or heads side by side: a run of each element of the embedding axis. Runs that are
// strided are rotated in contiguous copies.
template <bool full_width, typename scalar_t>
ROPE_LOOP void rotate_runs(const Part<scalar_t>& part, const Strided<const scalar_t>& in,
                           const Strided<scalar_t>& out, std::int64_t count, Along along,
                           AngleRows<scalar_t> angles) {
  const Launch& launch = part.launch;
  const Operand& operand = part.operand;
  const auto in_run = [&](std::int64_t d) __attribute__((always_inline)) {
    return Strided<const scalar_t>{in.data + d * operand.in_axis_stride, in.stride};
  };
  const auto out_run = [&](std::int64_t d) __attribute__((always_inline)) {
    return Strided<scalar_t>{out.data + d * operand.out_axis_stride, out.stride};
  };
  const Strided<scalar_t> a_copy{static_cast<scalar_t*>(part.workspace.row), 1};
  const Strided<scalar_t> b_copy{a_copy.data + kMaxBlockTokens, 1};
  const std::int64_t end = launch.rotary_offset + 2 * launch.num_pairs;
  const std::int64_t ahead =
      in.stride != 1 ? 0 : kPairsAhead * (launch.interleaved ? 2 : 1) * operand.in_axis_stride;
  for (std::int64_t n = 0; n < launch.num_pairs; ++n) {
    const std::int64_t a = launch.rotary_offset + (launch.interleaved ? 2 * n : n);
    const std::int64_t b = a + (launch.interleaved ? 1 : launch.num_pairs);
    const scalar_t* a_in = in_run(a).data;
    const scalar_t* b_in = in_run(b).data;
    if (in.stride != 1) {
      copy_strided(a_copy, in_run(a), count);
      copy_strided(b_copy, in_run(b), count);
      a_in = a_copy.data;
      b_in = b_copy.data;
    }
    const bool direct = out.stride == 1;
    rotate_run<full_width>(a_in, b_in, direct ? out_run(a).data : a_copy.data,
                           direct ? out_run(b).data : b_copy.data, count, angles,
                           /*one_angle=*/along == Along::kHeads,
                           direct && part.workspace.may_stream, ahead);
    if (!direct) {
      copy_strided(out_run(a), a_copy, count);
      copy_strided(out_run(b), b_copy, count);
    }
    const std::int64_t next = along == Along::kHeads ? 1 : angles.stride;
    angles.cos += next;
    angles.sin += next;
  }
  if (!part.in_place()) {
    for (std::int64_t d = 0; d < operand.axis_size; ++d) {
      if (d < launch.rotary_offset || d >= end) {
        copy_strided(out_run(d), in_run(d), count);
      }
    }
  }
}

// The angles are those of tokens [first, first + count) of the block, a run of the last loop.
template <bool full_width, typename scalar_t>
ROPE_LOOP void rotate_along_tokens(const Part<scalar_t>& part, std::int64_t first,
                                   std::int64_t count, const AngleRows<scalar_t>& angles) {
  const std::int64_t* offsets = part.token_offsets() + first * kTokenArrays;
  const auto& tokens = part.launch.tokens;
  for (std::int64_t head = part.head_begin; head < part.head_end; ++head) {
    std::int64_t head_offsets[2];
    part.operand.heads.offsets(head, head_offsets);
    rotate_runs<full_width, scalar_t>(
        part,
        {part.in() + offsets[0] + head_offsets[0],
         tokens.strides[kIn + 2 * part.index][tokens.num_dims - 1]},
        {part.out() + offsets[1] + head_offsets[1], last_token_stride(part.launch, part.index)},
        count, Along::kTokens, angles);
  }
}

template <bool full_width, typename scalar_t>
ROPE_LOOP void rotate_along_heads(const Part<scalar_t>& part, std::int64_t num_tokens,
                                  AngleRows<scalar_t> angles) {
  const auto& heads = part.operand.heads;
  const int last = heads.num_dims - 1;
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    const std::int64_t* offsets = part.token_offsets() + token * kTokenArrays;
    std::int64_t count;
    for (std::int64_t head = part.head_begin; head < part.head_end; head += count) {
      std::int64_t head_offsets[2];
      heads.offsets(head, head_offsets);
      count = run_length(head, part.head_end, heads.sizes[last]);
      rotate_runs<full_width, scalar_t>(
          part, {part.in() + offsets[0] + head_offsets[0], heads.strides[0][last]},
          {part.out() + offsets[1] + head_offsets[1], heads.strides[1][last]}, count, Along::kHeads,
          angles);
    }
    angles.cos += angles.stride;
    angles.sin += angles.stride;
  }
}

// The vectors of the operand run along a dimension. The angles are those of tokens
// [first, first + count) of the block.
template <bool full_width, typename scalar_t>
ROPE_INLINE void rotate_part(const Part<scalar_t>& part, Along along, std::int64_t first,
                             std::int64_t count, const AngleRows<scalar_t>& angles) {
  if (along == Along::kTokens) {
    rotate_along_tokens<full_width>(part, first, count, angles);
  } else if (along == Along::kHeads) {
    rotate_along_heads<full_width>(part, count, angles);
  } else if (part.launch.interleaved) {
    rotate_along_axis</*interleaved=*/true, full_width>(part, count, angles);
  } else {
    rotate_along_axis</*interleaved=*/false, full_width>(part, count, angles);
  }
}

// Finds the angles of some tokens of the block as vectors along a dimension need them, and rotates
// the operands whose vectors run along it.
template <typename scalar_t>
ROPE_INLINE void rotate_along(const Launch& launch, const Workspace& workspace, const Block& block,
                              Along along, std::int64_t first, std::int64_t count) {
  const auto angles = find_angles<scalar_t>(launch, workspace, along, first, count);
  for (int index = 0; index < launch.num_operands; ++index) {
    if (along_of<scalar_t>(launch, index) != along) {
      continue;
    }
    const auto part = part_of<scalar_t>(launch, workspace, block, index);
    has_full_width(launch) ? rotate_part</*full_width=*/true>(part, along, first, count, angles)
                           : rotate_part</*full_width=*/false>(part, along, first, count, angles);
  }
}

template <typename scalar_t>
ROPE_LOOP void rotate_block(const Launch& launch, const Workspace& workspace, const Block& block) {
  const std::int64_t num_tokens = block.token_end - block.token_begin;
  for (std::int64_t token = 0; token < num_tokens; ++token) {
    std::int64_t offsets[kTokenArrays];
    launch.tokens.offsets(block.token_begin + token, offsets);
    for (int array = 0; array < kTokenArrays; ++array) {
      workspace.token_offsets[token * kTokenArrays + array] = offsets[array];
    }
  }
  for (const Along along : {Along::kAxis, Along::kTokens, Along::kHeads}) {
    bool is_wanted = false;
    for (int index = 0; index < launch.num_operands; ++index) {
      is_wanted |= along_of<scalar_t>(launch, index) == along;
    }
    if (!is_wanted) {
      continue;
    }
    const std::int64_t size =
        along == Along::kTokens ? launch.tokens.sizes[launch.tokens.num_dims - 1] : num_tokens;
    std::int64_t count;
    for (std::int64_t token = block.token_begin; token < block.token_end; token += count) {
      count = along == Along::kTokens ? run_length(token, block.token_end, size) : num_tokens;
      rotate_along<scalar_t>(launch, workspace, block, along, token - block.token_begin, count);
    }
  }
}

}  // namespace

__attribute__((flatten)) void ROPE_CONCATENATE(rotate_, CPU_CAPABILITY)(const Launch& launch,
                                                                        const Workspace& workspace,
                                                                        const Block& block) {
  dispatch_launch_dtype(launch, [&](auto type) __attribute__((always_inline)) {
    rotate_block<decltype(type)>(launch, workspace, block);
  });
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  if (workspace.may_stream) {
    _mm_sfence();  // Others see what was streamed before they see that the block is done.
  }
#endif
}

}  // namespace rope::cpu
