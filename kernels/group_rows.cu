// Which rows go to which expert: what a launch over the experts of a layer needs, in an order that depends on nothing but the routes. A
// row is a token at one of its experts; rows of an expert lie together, tokens ascending.
#include "common.cuh"

namespace routes {

constexpr int THREADS = 256;

struct Arguments {
  const int* experts;  // [tokens, top_k], ascending in each token
  int* used;           // [1]: how many tiles there are
  int* rows;           // [tokens * top_k]: the token of each row
  int* places;         // [tokens, top_k]: the row of each token at each of its experts
  int* tiles;          // [tiles, 4]: expert, first row, rows, and 0
  int tokens, top_k;
  int count;           // of experts, THREADS at most
  int tile;            // rows of a tile
  int tile_count;      // room in tiles: tokens * top_k / tile + count is enough
};

}  // namespace routes

// grid: (1). A thread an expert.
KERNEL(routes::THREADS) group_rows(routes::Arguments p) {
  inputs_ready();
  start_dependents();
  SHARED_MEMORY(shared);
  int* counts = reinterpret_cast<int*>(shared);         // [THREADS]
  int* first_tiles = counts + routes::THREADS;          // [THREADS]
  int* first_rows = first_tiles + routes::THREADS;      // [THREADS]
  const int expert = threadIdx.x, entries = p.tokens * p.top_k;
  int own = 0;
  if (expert < p.count) {
    for (int i = 0; i < entries; i++) own += p.experts[i] == expert;
  }
  counts[expert] = own;
  __syncthreads();
  if (expert == 0) {
    int row = 0, tile = 0;
    for (int e = 0; e < p.count; e++) {
      first_rows[e] = row;
      first_tiles[e] = tile;
      row += counts[e];
      tile += ceil_div(counts[e], p.tile);
    }
    *p.used = tile;
  }
  __syncthreads();
  if (expert >= p.count) return;
  int row = first_rows[expert];
  for (int t = 0; t < ceil_div(own, p.tile); t++) {
    int left = own - t * p.tile, *tile = p.tiles + 4 * (first_tiles[expert] + t);
    tile[0] = expert, tile[1] = row + t * p.tile, tile[2] = left < p.tile ? left : p.tile, tile[3] = 0;
  }
  for (int i = 0; i < entries; i++) {
    if (p.experts[i] == expert) {
      p.rows[row] = i / p.top_k;
      p.places[i] = row++;
    }
  }
}
