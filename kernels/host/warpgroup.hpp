// The instructions of warpgroup.cuh on a processor, by the PTX manual: four warps multiply together, and their sums are there when they have waited. What the
// hardware leaves undefined ends the program or shows: sums that are read too early are garbage; tokens must have arrived and be fenced before a barrier in front
// of it, and stay as they are until it is done; a fence comes before each group of products; all lanes ask for the same.
#pragma once

#include "simt.hpp"

#define WARPGROUPS
#define SHARED_TILES(name) SHARED_MEMORY(name)

namespace simt {

// What a product of a warpgroup is, from a lane's registers.
struct Product {
  bool int8;
  uint32_t a[4];
  uint64_t b;
  bool add;
};

// 64 rows of 32 bytes as a descriptor says.
struct Rows {
  uint8_t bytes[64][32];

  static uint32_t place(uint64_t descriptor, int row, int byte) {
    uint32_t first = uint32_t(descriptor & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    uint32_t at = first + uint32_t(row / 8) * stride + uint32_t(row % 8) * 128 + uint32_t(byte);
    return at ^ (at >> 7 & 7) << 4;
  }

  explicit Rows(uint64_t descriptor) {
    if (descriptor >> 62 != 1) fail("tokens of a warpgroup's product are in rows of 128 bytes, swizzled");
    if (descriptor >> 49 & 7) fail("a descriptor has an offset of its base");
    if ((descriptor >> 32 & 0x3fff) != 1024 >> 4) fail("eight rows of 128 bytes are 1024 bytes");
    if (descriptor & 0x3f & ~0x6) fail("a tile of tokens begins at a multiple of 1024, a step of it at one of 32");
    for (int row = 0; row < 64; row++)
      for (int byte = 0; byte < 32; byte += 16) {
        uint32_t at = place(descriptor, row, byte);
        memcpy(&bytes[row][byte], inside(at, 16, 16), 16);
        for (int i = 0; i < 16; i += 4)
          if (!block.fenced[(at + uint32_t(i)) / 4]) fail("tensor cores read what did not arrive, or was not fenced before a barrier");
      }
  }
};

// Sums of 128 lanes that are on their way: where their registers are, and what they will be.
struct Unfinished {
  void* registers[4 * WARP];
  uint32_t sums[4 * WARP][32];
  int products;
};

// A product that was asked for: of which group, and what it reads.
struct Asked {
  int group;
  Unfinished* of;
  uint64_t b;
  Rows rows;
};

// What a warpgroup has asked for.
struct Warpgroup {
  std::list<Unfinished> sums;
  std::list<Asked> asked;
};

// That of the warpgroup whose first thread this is.
inline Warpgroup& warpgroup_of(int first) {
  std::shared_ptr<void>& its = block.warpgroups[size_t(first) / (4 * WARP)];
  if (!its) its = std::make_shared<Warpgroup>();
  return *static_cast<Warpgroup*>(its.get());
}

// The sums of 64 rows and 64 tokens.
inline void multiply_rows(int first, const Rows& rows, bool int8, bool add, Unfinished& to) {
  constexpr int LANES = 4 * WARP;
  int8_t bytes[64][32];
  float halves[64][16], tokens[64][16];
  auto half = [](uint32_t word, int i) {
    uint32_t bits = word >> (16 * i) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  };
  for (int lane = 0; lane < LANES; lane++) {
    const uint32_t* a = block.threads[first + lane].product->a;
    int row = lane / WARP * 16 + lane % WARP / 4, quarter = lane % 4;
    for (int word = 0; word < 4; word++) {
      int r = row + word % 2 * 8;
      if (int8) {
        for (int i = 0; i < 4; i++) bytes[r][word / 2 * 16 + quarter * 4 + i] = int8_t(a[word] >> (8 * i));
      } else {
        for (int i = 0; i < 2; i++) halves[r][word / 2 * 8 + quarter * 2 + i] = half(a[word], i);
      }
    }
  }
  if (!int8)
    for (int t = 0; t < 64; t++)
      for (int k = 0; k < 16; k++) {
        uint32_t word;
        memcpy(&word, &rows.bytes[t][k / 2 * 4], 4);
        tokens[t][k] = half(word, k % 2);
      }
  for (int lane = 0; lane < LANES; lane++)
    for (int i = 0; i < 32; i++) {
      int r = lane / WARP * 16 + lane % WARP / 4 + i % 4 / 2 * 8, t = i / 4 * 8 + lane % 4 * 2 + i % 2;
      uint32_t& sum = to.sums[lane][i];
      if (int8) {
        int all = add ? int(sum) : 0;
        for (int k = 0; k < 32; k++) all += bytes[r][k] * int8_t(rows.bytes[t][k]);
        sum = uint32_t(all);
      } else {
        // In which order tensor cores add is not said: here exactly, rounded once.
        float before = 0;
        if (add) memcpy(&before, &sum, 4);
        double all = before;
        for (int k = 0; k < 16; k++) all += double(halves[r][k]) * tokens[t][k];
        before = float(all);
        memcpy(&sum, &before, 4);
      }
    }
}

// All lanes of a warpgroup ask for a product. It is made at once and kept back.
inline void ask_product(int first) {
  constexpr int LANES = 4 * WARP;
  Warpgroup& group = warpgroup_of(first);
  Thread* threads = &block.threads[size_t(first)];
  const Product& one = *threads[0].product;
  for (int lane = 0; lane < LANES; lane++) {
    const Product& other = *threads[lane].product;
    if (other.b != one.b || other.add != one.add || other.int8 != one.int8) fail("lanes of a warpgroup ask for different products");
    if (threads[lane].commits != threads[0].commits) fail("lanes of a warpgroup committed different groups");
    if (!threads[lane].ordered) fail("a product of a warpgroup is asked for without a fence in front of it");
  }
  Unfinished* sums = nullptr;
  for (Unfinished& u : group.sums)
    if (u.registers[0] == threads[0].together.c) sums = &u;
  if (!sums) {
    group.sums.emplace_back();
    sums = &group.sums.back();
    sums->products = 0;
    for (int lane = 0; lane < LANES; lane++) {
      sums->registers[lane] = threads[lane].together.c;
      memcpy(sums->sums[lane], threads[lane].together.c, sizeof sums->sums[lane]);
      memset(threads[lane].together.c, 0xa5, sizeof sums->sums[lane]);
    }
  }
  Rows rows(one.b);
  multiply_rows(first, rows, one.int8, one.add, *sums);
  sums->products++;
  group.asked.push_back({threads[0].commits, sums, one.b, rows});
}

// All lanes of a warpgroup wait until at most `mask` groups are not done.
inline void end_products(int first) {
  constexpr int LANES = 4 * WARP;
  Warpgroup& group = warpgroup_of(first);
  Thread* threads = &block.threads[size_t(first)];
  for (int lane = 0; lane < LANES; lane++)
    if (threads[lane].together.mask != threads[0].together.mask || threads[lane].commits != threads[0].commits)
      fail("lanes of a warpgroup wait for different groups");
  while (!group.asked.empty() && group.asked.front().group < threads[0].commits - threads[0].together.mask) {
    Asked& asked = group.asked.front();
    const Rows now(asked.b);
    if (memcmp(now.bytes, asked.rows.bytes, sizeof now.bytes) != 0) fail("tokens changed while tensor cores read them");
    if (--asked.of->products == 0) {
      for (int lane = 0; lane < LANES; lane++) memcpy(asked.of->registers[lane], asked.of->sums[lane], sizeof asked.of->sums[lane]);
      group.sums.remove_if([&](const Unfinished& u) { return &u == asked.of; });
    }
    group.asked.pop_front();
  }
}

inline void ask(void* d, Product product) {
  Thread& t = block.threads[block.current];
  t.product = &product;
  meet(ask_product, d, 0);
}

}  // namespace simt

inline void warpgroup_multiply(int (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  simt::ask(d, {true, {a[0], a[1], a[2], a[3]}, b, add});
}

inline void warpgroup_multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
  simt::ask(d, {false, {a[0], a[1], a[2], a[3]}, b, add});
}

inline void warpgroup_fence() { simt::block.threads[simt::block.current].ordered = true; }

inline void warpgroup_commit() {
  simt::Thread& t = simt::block.threads[simt::block.current];
  t.commits++;
  t.ordered = false;
}

template <int PENDING>
inline void warpgroup_wait() {
  simt::meet(simt::end_products, nullptr, PENDING);
}

// What this thread copied and waited for may be read once it has passed a barrier.
inline void fence_async() {
  simt::Thread& t = simt::block.threads[simt::block.current];
  t.fencing.insert(t.fencing.end(), t.arrived.begin(), t.arrived.end());
  t.arrived.clear();
}

inline void copy_async_four(uint32_t to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 4) simt::fail("an asynchronous copy is not aligned");
  simt::ask_copy(to, from, bytes, 4);
}

template <int NUMBER, int THREADS>
inline void sync_some() {
  simt::Together& t = simt::block.threads[simt::block.current].together;
  t.value = float(THREADS), t.mask = NUMBER;
  simt::wait(simt::State::Some);
}

template <class T, int N>
inline void hold(T (&)[N]) {}
