// Products by `mma.sync`, for few tokens.
//
// Weights are the rows of the tensor cores' left operand (16 of them), tokens the columns of the right one (8), so that a single token
// wastes little. A block has 16 or 32 rows of the weight and TOKENS tokens; each of its warps has its own parts of K and streams their codes
// through shared memory of its own, so that warps wait for each other only to add the parts. Tokens are read from the caches as they are
// needed.
#pragma once

#include "operands.cuh"

namespace gemm {

// From a token's sums to the next one's in shared memory: what a warp writes at once shares no banks.
HOST_DEVICE constexpr int sum_stride(int rows) { return rows + 4; }

// Stages of codes that a warp has in shared memory. Blocks of few rows are for launches that do not fill the GPU: all of a part is on its way
// at once. Otherwise more blocks at a time are worth more.
HOST_DEVICE constexpr int stages_of(int rows) { return rows == 16 ? 5 : 3; }

// Where things lie in the shared memory of a block, from its begin on: of each warp the codes, and its scales, whose place its sums take in
// the end; the scales of the block as they are stored; what is added up over rounds.
template <class Codes, int ROWS, int TOKENS>
struct Layout {
  static constexpr int STAGE = ROWS * Codes::STAGE_BYTES;
  static constexpr int SUMS = TOKENS * sum_stride(ROWS);  // numbers of a warp
  int scales, a_warp, stored, kept, bytes;

  HOST_DEVICE Layout(const Parts& parts, int scale_type) {
    const int floats = ROWS * parts.stride;
    scales = stages_of(ROWS) * STAGE;
    a_warp = scales + (floats > SUMS ? floats : SUMS) * 4;
    stored = parts.warps * a_warp;
    // A few scales behind the last one are read, and not used.
    kept = stored + (parts.inside ? 0 : ceil_div(ROWS * stored_stride<Codes>(parts, scale_type), 16) * 16 + 16);
    // Sums of parts, and of groups that are not complete.
    bytes = kept + (parts.count <= parts.warps ? 0 : parts.inside ? 2 : 1) * SUMS * 4;
  }
};

// Bytes of shared memory that a block needs, dynamic all of them: above 48 KiB a launch has to ask for it
// (CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES).
template <class Codes, int ROWS, int TOKENS>
HOST_DEVICE int shared_bytes(int k, int group, int scale_type) {
  return Layout<Codes, ROWS, TOKENS>(Parts::of(k, group), scale_type).bytes;
}

// A warp's way through the codes of a part: which 16 bytes each lane asks for next.
template <class Codes, int ROWS>
struct CodeStream {
  static constexpr int CHUNKS = Codes::STAGE_BYTES / 16, AT_ONCE = 32 / CHUNKS, COPIES = ROWS / AT_ONCE, STAGES = stages_of(ROWS);
  static constexpr int STAGE = ROWS * Codes::STAGE_BYTES;
  const uint8_t* from;
  int stride;   // bytes between the rows of two copies
  int rows;     // that there are from this lane's on
  int columns;  // that were not asked for yet, from this lane's on
  int place;    // in a stage

  // The part begins at `column` and has `columns`; its first stages are asked for.
  DEVICE CodeStream(const Arguments& p, const Tile& tile, uint32_t ring, int column, int columns) {
    const int lane = threadIdx.x % 32, own = lane / CHUNKS, chunk = lane % CHUNKS;
    const int row_bytes = p.k / COLUMNS * Codes::STAGE_BYTES + p.k % COLUMNS * Codes::STAGE_BYTES / COLUMNS;
    from = p.weight + (int64_t(tile.expert) * p.n + tile.row + own) * row_bytes + column / GROUP * (Codes::STAGE_BYTES / GROUPS) + chunk * 16;
    stride = AT_ONCE * row_bytes;
    place = (CHUNKS == 4 ? chunk_of_64(own, chunk) : chunk_of_128(own, chunk)) * 16;
    rows = int(in_register(p.n - tile.row - own));
    this->columns = columns - chunk * (COLUMNS / CHUNKS);
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; s++) next(ring + s * STAGE);
  }

  // Asks for the next stage; zeros stand for rows and columns that are not there. AT_ONCE rows are a multiple of the pattern of places.
  DEVICE void next(uint32_t to) {
    // A whole stage too many may be asked for, of which nothing is there.
    if (columns > -COLUMNS) {
#pragma unroll
      for (int i = 0; i < COPIES; i++)
        copy_async(to + place + i * AT_ONCE * Codes::STAGE_BYTES, from + int64_t(i) * stride, i * AT_ONCE < rows && columns > 0 ? 16 : 0);
      from += Codes::STAGE_BYTES;
      columns -= COLUMNS;
    }
    copy_commit();
  }
};

// What a warp adds up of a part: 16 rows by 8 tokens in each tile, as tensor cores spread them over lanes.
template <class Codes, class Inputs, int ROWS, int TOKENS>
struct Sums {
  static constexpr int DOWN = ROWS / 16, TILES = TOKENS / 8, STAGES = stages_of(ROWS);
  // Groups whose inputs are read together, one step ahead of their use.
  static constexpr int STEP = 2 * TILES * Inputs::WORDS <= 8 ? 2 : 1;
  // Scales of a row that are read together.
  static constexpr int AT_ONCE = TILES == 1 ? GROUPS : 2;
  using Sum = typename Inputs::Sum;
  using Left = typename Inputs::template Left<Codes>;
  Sum sums[DOWN][TILES][4], zero[4];
  float chains[DOWN][TILES][4];

  // `inside` where all of the part is in one group.
  DEVICE Sums(bool inside, int group) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      zero[i] = inside ? Sum(0) : Inputs::zero(group);
      if (Codes::E8M0 && Inputs::SCALED) zero[i] = Sum(in_register(uint32_t(Inputs::zero(GROUP))));
    }
#pragma unroll
    for (int d = 0; d < DOWN; d++)
#pragma unroll
      for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[d][t][i] = zero[i], chains[d][t][i] = 0;
  }

  // A group is complete: its sums go into the chains. `scales` [ROWS, stride] are its own, from this lane's upper row on.
  template <bool FITS>
  DEVICE void take(const float* scales, int stride) {
#pragma unroll
    for (int d = 0; d < DOWN; d++) take<FITS>(d, scales[d * 16 * stride], scales[(d * 16 + 8) * stride]);
  }
  template <bool FITS>
  DEVICE void take(int d, float upper, float lower) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float sum = FITS ? Inputs::value(sums[d][t][i]) : float(sums[d][t][i]);
        chains[d][t][i] = fmaf(sum, i < 2 ? upper : lower, chains[d][t][i]);
        // The next product of E2M1 begins anew by itself.
        if (!Codes::E8M0) sums[d][t][i] = zero[i];
      }
  }

  // All of a part of `columns`, whose first stages were asked for. `sources` are the inputs of its first columns. A scale has PER groups of
  // 32 columns; 4 stands for a multiple of it as well, 0 for any number.
  template <int PER>
  DEVICE void add(const Arguments& p, int columns, int missing, CodeStream<Codes, ROWS>& stream, uint32_t ring, const float* scales,
                  int stride, const unsigned char* (&sources)[TILES]) {
    const int lane = threadIdx.x % 32, place = Codes::place(lane), a_scale = missing;
    const float* scale = scales + lane / 4 * stride;
    const bool fits = p.group <= Inputs::FITS;
    constexpr int STAGE = ROWS * Codes::STAGE_BYTES;
    const uint32_t end = ring + STAGES * STAGE;
    const auto tables = Left::tables();
    uint32_t codes = ring, x[2][STEP][TILES][Inputs::WORDS];
    // Reads the inputs of group `group` of the stage.
    auto read = [&](int group) {
#pragma unroll
      for (int t = 0; t < TILES; t++) Inputs::read(x[group / STEP % 2][group % STEP][t], sources[t] + group * GROUP * Inputs::BYTES);
    };
    // A stage of `here` groups, 4 where `full`; the next one has `ahead`.
    auto stage = [&](auto full, int here, int ahead) {
      constexpr bool FULL = decltype(full)::value;
      copy_wait<STAGES - 2>();
      sync_warp();
      // Every lane is done with the stage before, whose place the next one takes.
      stream.next(codes == ring ? end - STAGE : codes - STAGE);
      [[maybe_unused]] float upper[DOWN][AT_ONCE], lower[DOWN][AT_ONCE];
      Pair<Codes> pairs[DOWN];
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        if (!FULL && g >= here) break;
        if (g % STEP == 0) {
#pragma unroll
          for (int i = STEP; i < 2 * STEP; i++)
            if (g + i < GROUPS ? FULL || g + i < here : g + i - GROUPS < ahead) read(g + i);
        }
        if constexpr (Codes::E8M0) {
          if (g % AT_ONCE == 0) {
#pragma unroll
            for (int d = 0; d < DOWN; d++) {
              load_floats(upper[d], scale + d * 16 * stride);
              load_floats(lower[d], scale + (d * 16 + 8) * stride);
            }
            scale += AT_ONCE;
          }
        }
        if (g % 2 == 0) {
#pragma unroll
          for (int d = 0; d < DOWN; d++) read_codes<Codes>(pairs[d], codes + d * 16 * Codes::STAGE_BYTES, place, g);
        }
        const auto& own = x[g / STEP % 2][g % STEP];
#pragma unroll
        for (int d = 0; d < DOWN; d++) {
          Left left(tables, pairs[d].words[g % 2]);
#pragma unroll
          for (int t = 0; t < TILES; t++) left.multiply(sums[d][t], own[t], Codes::E8M0, zero);
        }
        if constexpr (Codes::E8M0) {
#pragma unroll
          for (int d = 0; d < DOWN; d++) take<true>(d, upper[d][g % AT_ONCE], lower[d][g % AT_ONCE]);
        } else if constexpr (PER == 1 || PER == 2) {
          if ((g + 1) % PER == 0) take<true>(scale++, stride);
        } else if (PER == 0 || g == GROUPS - 1) {
          missing -= PER == 0 ? 1 : GROUPS;
          if (missing == 0) {
            fits ? take<true>(scale, stride) : take<false>(scale, stride);
            scale++;
            missing = a_scale;
          }
        }
      }
      codes += STAGE;
      if (codes == end) codes = ring;
#pragma unroll
      for (int t = 0; t < TILES; t++) sources[t] += COLUMNS * Inputs::BYTES;
    };
#pragma unroll
    for (int i = 0; i < STEP; i++)
      if (i * GROUP < columns) read(i);
    const int rest = columns / GROUP % GROUPS;
    int left = int(in_register(columns / COLUMNS));
#pragma unroll 1
    for (; left > 0; left--) stage(True(), GROUPS, left > 1 ? GROUPS : rest);
    if (rest) stage(False(), rest, 0);
  }
};

// A block, with 32 * Parts::warps threads; Tile::take says which grid.
template <class Codes, class Inputs, int ROWS, int TOKENS>
DEVICE void product(const Arguments& p, const Experts* experts, unsigned char* shared) {
  constexpr int DOWN = ROWS / 16, TILES = TOKENS / 8, STRIDE = sum_stride(ROWS);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, own = lane / 4, quarter = lane % 4;
  const Parts& parts = p.parts;
  Tile tile;
  if (!tile.take(p, experts, ROWS, TOKENS)) return;
  const Layout<Codes, ROWS, TOKENS> layout(parts, p.scale_type);
  const int stride = parts.stride;
  const uint32_t codes = shared_address(shared + warp * layout.a_warp);
  float* scales = reinterpret_cast<float*>(shared + warp * layout.a_warp + layout.scales);
  uint32_t* parted = reinterpret_cast<uint32_t*>(shared + layout.scales);  // [TOKENS][STRIDE], of a warp; the next is a_warp on
  uint32_t* kept = reinterpret_cast<uint32_t*>(shared + layout.kept);      // [TOKENS][STRIDE], of sums and of open groups
  const int a_warp = layout.a_warp / 4;

  if (!parts.inside) ask_scales<Codes, ROWS>(p, tile, shared + layout.stored, 32 * parts.warps);
  copy_commit();
  CodeStream<Codes, ROWS> stream(p, tile, codes, parts.begin(warp, p.group), parts.width(warp, p.k, p.group));
  // The inputs of this lane's token of each eight, from the part's first column on.
  const unsigned char* sources[TILES];
#pragma unroll
  for (int t = 0; t < TILES; t++) {
    int64_t at = int64_t(tile.source(experts, t * 8 + own)) * p.k + quarter * 8 + parts.begin(warp, p.group);
    sources[t] = static_cast<const unsigned char*>(p.input) + at * Inputs::BYTES;
  }
  // Few of them are in the nearest cache by the time the codes are there.
  if (experts && TILES == 1) {
    const int bytes = parts.width(warp, p.k, p.group) * Inputs::BYTES;
#pragma unroll 1
    for (int i = quarter * 128; i < bytes; i += 512) prefetch(sources[0] + i);
  }
  if (!parts.inside) {
    copy_wait<stages_of(ROWS) - 1>();
    __syncthreads();
  }

  // In the end each thread has two rows, one behind the other, of some of the tokens: so a gate and what goes up meet.
  const int r = threadIdx.x % (ROWS / 2) * 2, first_token = threadIdx.x / (ROWS / 2), tokens_on = 32 * parts.warps / (ROWS / 2);
  const int rounds = parts.rounds;
#pragma unroll 1
  for (int round = 0; round < rounds; round++) {
    const int part = round * parts.warps + warp;
    if (part < parts.count) {
      const int columns = parts.width(part, p.k, p.group);
      if (!parts.inside) {
        convert_scales<Codes, ROWS, 32>(p, scales, shared + layout.stored, part * parts.part_scales, lane);
        sync_warp();
      }
      if (!experts && round == 0) inputs_ready();
      Sums<Codes, Inputs, ROWS, TOKENS> sums(parts.inside, p.group);
      const int per = parts.inside ? 1 << 24 : p.group / GROUP;
      if (Codes::E8M0 || per == 1) sums.template add<1>(p, columns, per, stream, codes, scales, stride, sources);
      else if (per == 2) sums.template add<2>(p, columns, per, stream, codes, scales, stride, sources);
      else if (per % GROUPS == 0) sums.template add<4>(p, columns, per, stream, codes, scales, stride, sources);
      else sums.template add<0>(p, columns, per, stream, codes, scales, stride, sources);
      if (round + 1 == rounds) start_dependents();
      // Every lane is done with the scales.
      sync_warp();
#pragma unroll
      for (int d = 0; d < DOWN; d++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            uint32_t word = parts.inside ? Inputs::stored(sums.sums[d][t][i]) : to_bits(sums.chains[d][t][i]);
            parted[warp * a_warp + (t * 8 + 2 * quarter + i % 2) * STRIDE + d * 16 + own + i / 2 * 8] = word;
          }
      const int next = part + parts.warps;
      if (next < parts.count) {
        const int on = parts.begin(next, p.group) - parts.begin(part, p.group) - ceil_div(columns, COLUMNS) * COLUMNS;
#pragma unroll
        for (int t = 0; t < TILES; t++) sources[t] += on * Inputs::BYTES;
        // Zeros that were asked for behind the part's end may be on their way yet.
        copy_wait<0>();
        sync_warp();
        stream = CodeStream<Codes, ROWS>(p, tile, codes, parts.begin(next, p.group), parts.width(next, p.k, p.group));
      }
    }
    const bool done = round + 1 == rounds;
    float bias[2] = {0, 0}, token_scale = 0;
    if (done) {
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (p.bias && tile.row + r + e < p.n)
          bias[e] = read_float(p.bias, int64_t(tile.expert) * p.n + tile.row + r + e, FloatType(p.output_type));
      if (Inputs::SCALED) token_scale = p.input_scale[tile.source(experts, first_token)];
    }
    __syncthreads();
    const int first = round * parts.warps, here = parts.count - first < parts.warps ? parts.count - first : parts.warps;
#pragma unroll 1
    for (int t = first_token; t < tile.tokens; t += tokens_on) {
      const int at = t * STRIDE + r;
      if (Inputs::SCALED && done && t != first_token) token_scale = p.input_scale[tile.source(experts, t)];
      float values[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {
        if (!parts.inside) {
          float sum = from_bits(round ? kept[at + e] : parted[at + e]);
#pragma unroll 1
          for (int w = round ? 0 : 1; w < here; w++) sum += from_bits(parted[w * a_warp + at + e]);
          values[e] = sum;
        } else {
          float chain = round ? from_bits(kept[at + e]) : 0;
          typename Inputs::Sum sum = round ? Inputs::restored(kept[TOKENS * STRIDE + at + e]) : 0;
#pragma unroll 1
          for (int w = 0; w < here; w++) {
            const int inside = (first + w) % parts.inside;
            typename Inputs::Sum one = Inputs::restored(parted[w * a_warp + at + e]);
            sum = inside == 0 ? one : sum + one;
            if (inside == parts.inside - 1 && tile.row + r + e < p.n) {
              int64_t scale = (int64_t(tile.expert) * p.n + tile.row + r + e) * parts.scales + (first + w) / parts.inside;
              chain = fmaf(float(sum), read_scale<Codes>(p, p.weight_scale, scale), chain);
            }
          }
          values[e] = chain;
          if (!done) kept[TOKENS * STRIDE + at + e] = Inputs::stored(sum);
        }
        if (!done) kept[at + e] = to_bits(values[e]);
        if (Inputs::SCALED) values[e] *= token_scale * Inputs::template step<Codes>();
        if (p.bias) values[e] += bias[e];
      }
      if (!done) continue;
      write_outputs(p, experts, tile.token + t, tile.row + r, values);
    }
    if (!done) __syncthreads();
  }
}

}  // namespace gemm

// The kernels of a kind of codes and inputs: for 16 or 32 rows of the weight and up to 8 or 16 tokens a block; the same over experts.
#define PRODUCT(name, Codes, Inputs, ROWS, TOKENS, REGISTERS)                                                                   \
  KERNEL_WITH(REGISTERS) name##_##ROWS##x##TOKENS(gemm::Arguments p) {                                       \
    SHARED_MEMORY(s);                                                                                                          \
    gemm::product<gemm::Codes, gemm::Inputs, ROWS, TOKENS>(p, nullptr, s);                                                     \
  }                                                                                                                            \
  KERNEL_WITH(REGISTERS) name##_experts_##ROWS##x##TOKENS(gemm::Arguments p, gemm::Experts experts) {        \
    SHARED_MEMORY(s);                                                                                                          \
    gemm::product<gemm::Codes, gemm::Inputs, ROWS, TOKENS>(p, &experts, s);                                                    \
  }
#define PRODUCTS(name, Codes, Inputs)    \
  PRODUCT(name, Codes, Inputs, 16, 8, 104)   \
  PRODUCT(name, Codes, Inputs, 16, 16, 144)  \
  PRODUCT(name, Codes, Inputs, 32, 8, 128)   \
  PRODUCT(name, Codes, Inputs, 32, 16, 200)
