// Which rows go to which expert: what a launch over the experts of a layer needs, in an order that depends on nothing but the routes. A
// row is a token at one of its experts; rows of an expert lie together, tokens ascending.
#include "common.cuh"

namespace routes {

constexpr int THREADS = 1024, WARPS = THREADS / 32;
constexpr int EXPERTS = 256;                              // at most
constexpr int AHEAD = 4;                                  // entries that a lane asks for at once
constexpr int SHARED = (WARPS + 2) * EXPERTS * int(sizeof(int));  // bytes

struct Arguments {
  const int* experts;  // [tokens, top_k], ascending in each token, each below `count`
  int* used;           // [1]: how many tiles there are
  int* rows;           // [tokens * top_k]: the token of each row
  int* places;         // [tokens, top_k]: the row of each token at each of its experts
  int* tiles;          // [tiles, 4]: expert, first row, rows, and 0
  int tokens, top_k;
  int count;           // of experts, EXPERTS at most
  int tile;            // rows of a tile
  int tile_count;      // room in tiles: tokens * top_k / tile + count is enough
};

// Calls `f` with each entry of this warp's part and its expert, a lane an entry, in order; -1 for a lane that has none.
template <class F>
DEVICE void each_entry(const Arguments& p, F f) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, entries = p.tokens * p.top_k;
  const int steps = ceil_div(ceil_div(entries, 32), WARPS), first = warp * steps * 32 + lane;
  for (int step = 0; step < steps; step += AHEAD) {
    int experts[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      int entry = first + (step + j) * 32;
      experts[j] = step + j < steps && entry < entries ? p.experts[entry] : -1;
    }
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (step + j < steps) f(first + (step + j) * 32, experts[j]);
  }
}

// Each thread's number becomes the sum of those before it, over the first EXPERTS threads.
DEVICE int sum_before(int own, int* shared) {
  const int at = threadIdx.x;
  if (at < EXPERTS) shared[at] = own;
  __syncthreads();
  for (int distance = 1; distance < EXPERTS; distance *= 2) {
    int other = at < EXPERTS && at >= distance ? shared[at - distance] : 0;
    __syncthreads();
    if (at < EXPERTS) shared[at] += other;
    __syncthreads();
  }
  return at < EXPERTS ? shared[at] - own : 0;
}

}  // namespace routes

// grid: (1). Each warp counts and places its part of the entries; a thread an expert adds the warps' counts.
KERNEL_OF(routes::THREADS, 1) group_rows(routes::Arguments p) {
  using routes::EXPERTS, routes::WARPS;
  inputs_ready();
  start_dependents();
  SHARED_MEMORY(shared);
  int* counts = reinterpret_cast<int*>(shared);  // [WARPS, EXPERTS]: of a warp's entries; then where its next one of an expert goes
  int* sums = counts + WARPS * EXPERTS;          // [2, EXPERTS]
  int* own = counts + threadIdx.x / 32 * EXPERTS;
  const int lane = threadIdx.x % 32, expert = threadIdx.x;
  for (int i = lane; i < EXPERTS; i += 32) own[i] = 0;
  sync_warp();
  routes::each_entry(p, [&](int, int e) {
    uint32_t alike = lanes_alike(e);
    // The first of them counts for all.
    if (e >= 0 && count_bits(alike & lanes_below(lane)) == 0) own[e] += count_bits(alike);
    sync_warp();
  });
  __syncthreads();
  int rows = 0;
  if (expert < EXPERTS) {
    for (int warp = 0; warp < WARPS; warp++) {
      int more = counts[warp * EXPERTS + expert];
      counts[warp * EXPERTS + expert] = rows;
      rows += more;
    }
  }
  const int tiles = ceil_div(rows, p.tile);
  const int first_row = routes::sum_before(rows, sums), first_tile = routes::sum_before(tiles, sums + EXPERTS);
  if (expert < EXPERTS) {
    for (int warp = 0; warp < WARPS; warp++) counts[warp * EXPERTS + expert] += first_row;
    if (expert == EXPERTS - 1) *p.used = first_tile + tiles;
    for (int t = 0; t < tiles; t++) {
      int left = rows - t * p.tile, *tile = p.tiles + 4 * (first_tile + t);
      tile[0] = expert, tile[1] = first_row + t * p.tile, tile[2] = left < p.tile ? left : p.tile, tile[3] = 0;
    }
  }
  __syncthreads();
  routes::each_entry(p, [&](int entry, int e) {
    uint32_t alike = lanes_alike(e);
    int before = count_bits(alike & lanes_below(lane)), row = e >= 0 ? own[e] + before : 0;
    sync_warp();
    if (e >= 0) {
      p.rows[row] = entry / p.top_k;
      p.places[entry] = row;
      if (before == 0) own[e] += count_bits(alike);
    }
    sync_warp();
  });
}
