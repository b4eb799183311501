// Products by `wgmma`, which Hopper (9.0a) has, for many tokens. The order of the sums is that of gemm.cuh, so int8 inputs give the bits that `mma.sync` gives;
// with bf16 inputs the tensor cores' own order within a group may be another one.
//
// A warpgroup, four warps, multiplies 64 rows of the weight, from registers, by 64 tokens, from shared memory. A block has two of them: with 128 rows
// both multiply the same tokens and go through all parts of K; with 64 rows they take turns at the parts, for launches that would not fill
// the GPU otherwise. Warpgroups that share a ring of stages are a team. A stage has 128 columns of codes and of tokens; while one is multiplied
// the next two are on their way. The sums of a group are scaled by the same warps: as one warpgroup scales, the other's product runs.
//
// Inputs lie in memory as every other kernel has them. They are copied by words of four bytes, because tensor cores want the columns that a lane's codes
// belong to in another order (Inputs::place).
#pragma once

#include "operands.cuh"

#ifdef WARPGROUPS
namespace gemm {

constexpr int MANY_TOKENS = 64;      // of a block
constexpr int MANY_THREADS = 256;
constexpr int MANY_STAGES = 3;
constexpr int TOKEN_BYTES = 128;     // of a row of the tiles that tokens are in
constexpr int TOKEN_TILE = MANY_TOKENS * TOKEN_BYTES;

// Where things lie in the shared memory of a block: each team's stages, of codes and then tokens; where the tokens' inputs begin, their scales, and the tile,
// which would take registers; each team's scales of a part as f32; the scales of the block as they are stored; outputs, and sums of open groups.
template <class Codes, class Inputs, int ROWS>
struct ManyLayout {
  static constexpr int TEAM = 2 * ROWS, TEAMS = MANY_THREADS / TEAM;  // threads of a team
  static constexpr int CODES = ROWS * Codes::STAGE_BYTES, STAGE = CODES + Inputs::BYTES * TOKEN_TILE;
  static constexpr int STRIDE = ROWS + 4;  // from a token's outputs to the next one's: what a warp writes at once shares no banks
  static constexpr int SOURCES = TEAMS * MANY_STAGES * STAGE, TOKEN_SCALES = SOURCES + MANY_TOKENS * 8;
  static constexpr int TILE = TOKEN_SCALES + MANY_TOKENS * 4, SCALES = TILE + 16;
  int stored, kept, bytes;

  HOST_DEVICE ManyLayout(const Parts& parts, int scale_type) {
    stored = SCALES + TEAMS * ROWS * parts.stride * 4;
    // A few scales behind the last one are read, and not used.
    kept = stored + (parts.inside ? 0 : ceil_div(ROWS * stored_stride<Codes>(parts, scale_type), 16) * 16 + 16);
    bytes = kept + (parts.inside ? 2 : 1) * MANY_TOKENS * STRIDE * 4;
  }
};

// Bytes of shared memory that a block needs.
template <class Codes, class Inputs, int ROWS>
HOST_DEVICE int many_shared_bytes(int k, int group, int scale_type) {
  return ManyLayout<Codes, Inputs, ROWS>(Parts::of(k, group), scale_type).bytes;
}

// A barrier of a team.
template <int TEAMS>
DEVICE void sync_team(int team) {
  if (TEAMS == 1 || team == 0) sync_some<1, MANY_THREADS / TEAMS>();
  else sync_some<2, MANY_THREADS / TEAMS>();
}

// A team's way through K: where its next stage begins, and how many columns of the part there are from there on; 0 behind the last part.
template <int TEAMS>
struct Way {
  int part, column, left;

  DEVICE void enter(const Arguments& p, int next) {
    part = next;
    left = part < p.parts.count ? p.parts.width(part, p.k, p.group) : 0;
    column = left ? p.parts.begin(part, p.group) : 0;
  }
  DEVICE void go_on(const Arguments& p) {
    column += COLUMNS, left -= COLUMNS;
    if (left <= 0 && part < p.parts.count) enter(p, part + TEAMS);
  }
};

// What a thread copies of each stage: 16 bytes of some rows of codes, and 4 bytes of some tokens.
template <class Codes, class Inputs, int ROWS>
struct StageStream {
  using Layout = ManyLayout<Codes, Inputs, ROWS>;
  static constexpr int CHUNKS = Codes::STAGE_BYTES / 16, AT_ONCE = Layout::TEAM / CHUNKS, COPIES = ROWS / AT_ONCE;
  static constexpr int WARPS = Layout::TEAM / 32;
  const uint8_t* from;      // the first column of this thread's first row
  int stride;               // bytes between the rows of two copies
  int rows;                 // that there are from this thread's on
  int place;                // of the codes in a stage
  Way<Layout::TEAMS> way;   // of what is asked for next

  DEVICE StageStream(const Arguments& p, const Tile& tile, int team, int thread) {
    const int own = thread / CHUNKS, chunk = thread % CHUNKS;
    const int row_bytes = p.k / COLUMNS * Codes::STAGE_BYTES + p.k % COLUMNS * Codes::STAGE_BYTES / COLUMNS;
    from = p.weight + (int64_t(tile.expert) * p.n + tile.row + own) * row_bytes + chunk * 16;
    stride = AT_ONCE * row_bytes;
    rows = p.n - tile.row - own;
    place = (CHUNKS == 4 ? chunk_of_64(own, chunk) : chunk_of_128(own, chunk)) * 16;
    way.enter(p, team);
  }

  // Codes of the stage that `at` stands before; zeros stand for rows and columns that are not there. AT_ONCE rows are a multiple of the pattern of places.
  DEVICE void ask_codes(const Way<Layout::TEAMS>& at, uint32_t to, int thread) const {
    const int left = at.left - thread % CHUNKS * (COLUMNS / CHUNKS);
    const uint8_t* here = from + at.column / GROUP * (Codes::STAGE_BYTES / GROUPS);
#pragma unroll
    for (int i = 0; i < COPIES; i++)
      copy_async(to + place + i * AT_ONCE * Codes::STAGE_BYTES, here + int64_t(i) * stride, i * AT_ONCE < rows && left > 0 ? 16 : 0);
  }

  // Its tokens: a warp copies a row of 128 bytes at a time.
  DEVICE void ask_tokens(const Way<Layout::TEAMS>& at, const unsigned char* shared, uint32_t to, int thread) const {
    const uint64_t* sources = reinterpret_cast<const uint64_t*>(shared + Layout::SOURCES);
    const int warp = thread / 32, lane = thread % 32, place = Inputs::place(lane);
    const int64_t on = int64_t(at.column) * Inputs::BYTES + lane * 4;
    constexpr int BATCH = 4;  // nvcc puts three idle loads between a load from shared memory and the next copy to it, so some loads come first
#pragma unroll
    for (int first = 0; first < MANY_TOKENS / WARPS; first += BATCH) {
      const unsigned char* from[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; i++) from[i] = reinterpret_cast<const unsigned char*>(sources[warp + (first + i) * WARPS]) + on;
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        const int t = warp + (first + i) * WARPS;
#pragma unroll
        for (int tile = 0; tile < Inputs::BYTES; tile++) {
          const bool there = (tile * TOKEN_BYTES + lane * 4) / Inputs::BYTES < at.left;
          copy_async_four(to + Layout::CODES + tile * TOKEN_TILE + t * TOKEN_BYTES + (place ^ (t % 8 * 16)), from[i] + tile * TOKEN_BYTES, there ? 4 : 0);
        }
      }
    }
  }

  // Asks for the next stage.
  DEVICE void next(const Arguments& p, const unsigned char* shared, uint32_t to, int thread) {
    if (way.left > 0) {
      ask_codes(way, to, thread);
      ask_tokens(way, shared, to, thread);
      way.go_on(p);
    }
    copy_commit();
  }
};

// What a warpgroup adds up of a part: 64 rows by 64 tokens, as tensor cores spread them over lanes.
template <class Codes, class Inputs, int ROWS>
struct ManySums {
  using Layout = ManyLayout<Codes, Inputs, ROWS>;
  using Sum = typename Inputs::Sum;
  using Left = typename Inputs::template Left<Codes>;
  static constexpr int COUNT = MANY_TOKENS / 2;
  Sum sums[COUNT];
  float chains[COUNT];

  DEVICE ManySums() {
#pragma unroll
    for (int i = 0; i < COUNT; i++) sums[i] = 0, chains[i] = 0;
  }

  // A group is complete: its sums go into the chains.
  DEVICE void take(float upper, float lower) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) chains[i] = fmaf(float(sums[i]), i % 4 < 2 ? upper : lower, chains[i]);
  }

  // All of a part of `columns`, whose first stages were asked for; `slot` is the place of its first one in the ring. `scales` are those of this lane's
  // upper row. A scale has PER groups of 32 columns; 4 stands for a multiple of it as well, 0 for any number.
  template <int PER>
  DEVICE void add(const Arguments& p, int columns, int a_scale, StageStream<Codes, Inputs, ROWS>& stream, const unsigned char* shared, int& slot,
                  const float* scales, int team, int thread) {
    const int lane = thread % 32, warp = thread / 32, place = Codes::place(lane), stride = p.parts.stride;
    const uint32_t ring = shared_address(shared) + team * MANY_STAGES * Layout::STAGE;
    const auto tables = Left::tables();
    int missing = a_scale;
    bool open = false;  // whether the sums of a group have begun
    // A stage of `here` groups, 4 where `full`.
    auto stage = [&](auto full, int here) {
      constexpr bool FULL = decltype(full)::value;
      const uint32_t codes = ring + slot * Layout::STAGE, tokens = codes + Layout::CODES;
      copy_wait<MANY_STAGES - 2>();
      fence_async();
      // All of it is there, and everybody is done with the stage before, whose place the next one takes.
      sync_team<Layout::TEAMS>(team);
      [[maybe_unused]] float upper[GROUPS], lower[GROUPS];
      if constexpr (Codes::E8M0) {
        load_floats(upper, scales);
        load_floats(lower, scales + 8 * stride);
        scales += GROUPS;
      }
      Pair<Codes> pair;
      auto decode = [&](int g) {
        const uint32_t rows = codes + warp * 16 * Codes::STAGE_BYTES;
        if constexpr (Codes::WORDS == 2) read_codes(pair.words[g % 2], rows, place, g);
        else if (g % 2 == 0) read_codes(pair, rows, place, g);
        return Left(tables, pair.words[g % 2]);
      };
      Left left = decode(0);
#pragma unroll
      for (int g = 0; g < GROUPS; g++) {
        if (!FULL && g >= here) break;
        // A group's columns lie side by side in a row of 128 bytes.
        const int at = g * GROUP * Inputs::BYTES;
        const bool begun = Codes::E8M0 || PER == 1 ? false : PER == 2 ? g % 2 == 1 : open;
        left.multiply(sums, tokens + at / TOKEN_BYTES * TOKEN_TILE + at % TOKEN_BYTES, begun);
        warpgroup_commit();
        open = true;
        // Meanwhile the next stage is asked for and the next codes are decoded.
        if (g == 0) stream.next(p, shared, ring + (slot == 0 ? MANY_STAGES - 1 : slot - 1) * Layout::STAGE, thread);
        const bool last = g == GROUPS - 1, completes = !FULL || PER == 0 || PER == 1 || Codes::E8M0 || (PER == 2 && g % 2 == 1) || last;
        if (!completes) warpgroup_wait<1>();
        Left next = last ? left : decode(g + 1);
        if (completes) {
          warpgroup_wait<0>();
          hold(sums);
        }
        left = next;
        if constexpr (Codes::E8M0) {
          take(upper[g], lower[g]);
        } else if constexpr (PER == 1 || PER == 2) {
          if ((g + 1) % PER == 0) take(*scales, scales[8 * stride]), scales++;
        } else if (PER == 0 || last) {
          missing -= PER == 0 ? 1 : GROUPS;
          if (missing == 0) {
            take(*scales, scales[8 * stride]);
            scales++, missing = a_scale, open = false;
          }
        }
      }
      slot = slot == MANY_STAGES - 1 ? 0 : slot + 1;
    };
    int left = columns / COLUMNS;
#pragma unroll 1
    for (; left > 0; left--) stage(True(), GROUPS);
    const int rest = columns / GROUP % GROUPS;
    if (rest) stage(False(), rest);
  }
};

// A block, with MANY_THREADS threads; Tile::take says which grid.
template <class Codes, class Inputs, int ROWS>
DEVICE void product_of_many(const Arguments& p, const Experts* experts, unsigned char* shared) {
  using Layout = ManyLayout<Codes, Inputs, ROWS>;
  constexpr int TEAM = Layout::TEAM, TEAMS = Layout::TEAMS, STRIDE = Layout::STRIDE;
  const int team = TEAMS == 1 ? 0 : threadIdx.x / TEAM, thread = threadIdx.x % TEAM;
  const int lane = thread % 32, upper = thread / 32 * 16 + lane / 4, quarter = lane % 4;
  const Parts& parts = p.parts;
  Tile tile;
  if (!tile.take(p, experts, ROWS, MANY_TOKENS)) return;
  const Layout layout(parts, p.scale_type);
  const uint32_t ring = shared_address(shared) + team * MANY_STAGES * Layout::STAGE;
  float* scales = reinterpret_cast<float*>(shared + Layout::SCALES) + team * ROWS * parts.stride;
  uint32_t* kept = reinterpret_cast<uint32_t*>(shared + layout.kept);  // [tokens][STRIDE], of outputs and of open groups
  uint64_t* sources = reinterpret_cast<uint64_t*>(shared + Layout::SOURCES);

  if (!parts.inside) ask_scales<Codes, ROWS>(p, tile, shared + layout.stored, MANY_THREADS);
  StageStream<Codes, Inputs, ROWS> stream(p, tile, team, thread);
  // Codes can be asked for before the inputs are there.
  auto way = stream.way;
#pragma unroll 1
  for (int s = 0; s < MANY_STAGES - 1 && way.left > 0; s++, way.go_on(p)) stream.ask_codes(way, ring + s * Layout::STAGE, thread);
  const int t = threadIdx.x;
  if (t < MANY_TOKENS) sources[t] = reinterpret_cast<uint64_t>(p.input) + uint64_t(tile.source(experts, t)) * p.k * Inputs::BYTES;
  const uint32_t words[4] = {uint32_t(tile.expert), uint32_t(tile.row), uint32_t(tile.token), uint32_t(tile.tokens)};
  if (t == 0) store_sixteen(shared + Layout::TILE, words);
  __syncthreads();
  if (!experts) inputs_ready();
#pragma unroll 1
  for (int s = 0; s < MANY_STAGES - 1; s++) {
    if (stream.way.left > 0) {
      stream.ask_tokens(stream.way, shared, ring + s * Layout::STAGE, thread);
      stream.way.go_on(p);
    }
    copy_commit();
  }
  float* token_scales = reinterpret_cast<float*>(shared + Layout::TOKEN_SCALES);
  if (Inputs::SCALED && t < MANY_TOKENS) token_scales[t] = p.input_scale[tile.source(experts, t)];
  copy_wait<MANY_STAGES - 2>();
  __syncthreads();  // the scales of all rows

  auto kept_tile = [&] {
    uint32_t words[4];
    load_sixteen(words, shared + Layout::TILE);
    return Tile{int(words[0]), int(words[1]), int(words[2]), int(words[3])};
  };
  int slot = 0;
  const int rounds = ceil_div(parts.count, TEAMS);
#pragma unroll 1
  for (int round = 0; round < rounds; round++) {
    const int part = round * TEAMS + team;
    const bool mine = part < parts.count;
    ManySums<Codes, Inputs, ROWS> sums;
    if (mine) {
      const int columns = parts.width(part, p.k, p.group);
      if (!parts.inside) {
        if (round > 0) sync_team<TEAMS>(team);  // everybody is done with the scales of the part before
        convert_scales<Codes, ROWS, TEAM>(p, scales, shared + layout.stored, part * parts.part_scales, thread);
      }
      const float* own = scales + upper * parts.stride;
      const int per = parts.inside ? 1 << 24 : p.group / GROUP;
      if (Codes::E8M0 || per == 1) sums.template add<1>(p, columns, per, stream, shared, slot, own, team, thread);
      else if (per == 2) sums.template add<2>(p, columns, per, stream, shared, slot, own, team, thread);
      else if (per % GROUPS == 0) sums.template add<4>(p, columns, per, stream, shared, slot, own, team, thread);
      else sums.template add<0>(p, columns, per, stream, shared, slot, own, team, thread);
    }
    if (round + 1 == rounds) start_dependents();
    // Parts are added in their order, each by the threads that have it.
#pragma unroll
    for (int turn = 0; turn < TEAMS; turn++) {
      if (mine && turn == team) {
        const int inside = parts.inside ? part % parts.inside : 0, group = parts.inside ? part / parts.inside : 0;
        float scale[2] = {0, 0};
        if (parts.inside && inside == parts.inside - 1) {
#pragma unroll
          for (int e = 0; e < 2; e++)
            if (kept_tile().row + upper + 8 * e < p.n)
              scale[e] = read_scale<Codes>(p, p.weight_scale, (int64_t(kept_tile().expert) * p.n + kept_tile().row + upper + 8 * e) * parts.scales + group);
        }
#pragma unroll
        for (int i = 0; i < ManySums<Codes, Inputs, ROWS>::COUNT; i++) {
          const int at = (i / 4 * 8 + 2 * quarter + i % 2) * STRIDE + upper + i % 4 / 2 * 8;
          if (!parts.inside) {
            kept[at] = to_bits(part == 0 ? sums.chains[i] : from_bits(kept[at]) + sums.chains[i]);
          } else {
            typename Inputs::Sum sum = sums.sums[i];
            if (inside > 0) sum = Inputs::restored(kept[MANY_TOKENS * STRIDE + at]) + sum;
            if (inside < parts.inside - 1) kept[MANY_TOKENS * STRIDE + at] = Inputs::stored(sum);
            else kept[at] = to_bits(fmaf(float(sum), scale[i % 4 / 2], group == 0 ? 0 : from_bits(kept[at])));
          }
        }
      }
      if (TEAMS > 1 || round + 1 == rounds) __syncthreads();
    }
  }

  tile = kept_tile();
  // Each thread has two rows, one behind the other, of some of the tokens: so a gate and what goes up meet.
  const int r = threadIdx.x % (ROWS / 2) * 2, row = tile.row + r;
  float bias[2] = {0, 0};
#pragma unroll
  for (int e = 0; e < 2; e++)
    if (p.bias && row + e < p.n) bias[e] = read_float(p.bias, int64_t(tile.expert) * p.n + row + e, FloatType(p.output_type));
#pragma unroll 1
  for (int t = threadIdx.x / (ROWS / 2); t < tile.tokens; t += MANY_THREADS / (ROWS / 2)) {
    float values[2];
#pragma unroll
    for (int e = 0; e < 2; e++) {
      values[e] = from_bits(kept[t * STRIDE + r + e]);
      if (Inputs::SCALED) values[e] *= token_scales[t] * Inputs::template step<Codes>();
      if (p.bias) values[e] += bias[e];
    }
    write_outputs(p, experts, tile.token + t, row, values);
  }
}

}  // namespace gemm

#define PRODUCT_OF_MANY(name, Codes, Inputs, ROWS, REGISTERS)                                  \
  KERNEL_WITH(REGISTERS) name##_##ROWS##x64(gemm::Arguments p) {                              \
    SHARED_TILES(s);                                                                          \
    gemm::product_of_many<gemm::Codes, gemm::Inputs, ROWS>(p, nullptr, s);                    \
  }                                                                                           \
  KERNEL_WITH(REGISTERS) name##_experts_##ROWS##x64(gemm::Arguments p, gemm::Experts experts) { \
    SHARED_TILES(s);                                                                          \
    gemm::product_of_many<gemm::Codes, gemm::Inputs, ROWS>(p, &experts, s);                   \
  }
// The kernels of a kind of codes and inputs: for 64 or 128 rows of the weight and up to 64 tokens a block; the same over experts. With 128 registers a
// thread two blocks share a multiprocessor, where their shared memory lets them.
#define PRODUCTS_OF_MANY(name, Codes, Inputs, REGISTERS)  \
  PRODUCT_OF_MANY(name, Codes, Inputs, 64, REGISTERS)     \
  PRODUCT_OF_MANY(name, Codes, Inputs, 128, REGISTERS)
#else
#define PRODUCTS_OF_MANY(name, Codes, Inputs, REGISTERS)
#endif
