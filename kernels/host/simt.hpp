// Runs kernels on a processor, one block after the other, each thread of a block as a fiber that runs until it has to wait for others. What
// the hardware leaves undefined is made visible: memory that is asked for and not there yet reads as garbage, and so does shared memory that
// nobody wrote; a barrier that a thread misses, a copy that is not aligned or outside an array, end the program with a message. Blocks of a launch may
// begin before the launch in front of it has run, as far as they can without its outputs.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <functional>
#include <list>
#include <memory>
#include <vector>

#define HOST_DEVICE inline
#define DEVICE inline
#define KERNEL(threads) static void
#define KERNEL_OF(threads, blocks) static void
#define KERNEL_WITH(registers) static void
#define SHARED_MEMORY(name) unsigned char* name = simt::block.shared.data()

struct Dim3 {
  int x = 1, y = 1, z = 1;
};

inline Dim3 threadIdx, blockIdx, gridDim;

namespace simt {

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;

enum class State { Ready, Warp, Warpgroup, Some, Block, Inputs, Done };

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int room;  // that is zeros behind them
  // What it found, where it was asked for before the launch in front had run.
  bool arrived = false;
  unsigned char found[16] = {};
};

// What a lane does together with its warp.
enum class Act { Int8, Bf16, Trade, Take, Alike, Matrices, Here };

// Its registers in a product; or the value that it has for others and the mask, or the lane, of the one that it takes; or where it writes what
// it gets of matrices, and the row that it names; or the barrier that it waits at, and for how many.
struct Together {
  Act act;
  void* c;
  const uint32_t *a, *b;
  float value;
  int mask;
};

// What a lane has of a product of a warpgroup (warpgroup.hpp).
struct Product;

struct Thread {
  ucontext_t context;  // of its begin
  jmp_buf here;        // where it waits
  bool begun;
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  Together together;
  // Of a warpgroup: what the lane asks for, what all of it do then, how many groups it committed, and whether its registers are in order.
  const Product* product;
  void (*with)(int);
  int commits;
  bool ordered;
  // Places and bytes of shared memory that it copied to and waited for; those that tensor cores may read once it passed a barrier.
  std::vector<std::pair<uint32_t, int>> arrived, fencing;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<unsigned char> shared;
  std::vector<unsigned char> fenced;  // for each word of shared memory whether tensor cores may read it
  std::vector<std::shared_ptr<void>> warpgroups;  // what each has asked for, where it did (warpgroup.hpp)
  ucontext_t begun_from;
  jmp_buf scheduler;
  int current = 0;
  std::function<void()> kernel;
};

inline Block block;

// Whether the launch in front has not run yet: a thread that wants its inputs waits.
inline bool early = false;

// Bytes of shared memory that a block may have; those of an RTX 3090 unless it is said.
inline size_t most_shared = 99 << 10;

// Memory that asynchronous copies may read.
struct Range {
  const char *begin, *end;
};
inline std::vector<Range> ranges;

template <class T>
void allow(const std::vector<T>& array) {
  const char* begin = reinterpret_cast<const char*>(array.data());
  ranges.push_back({begin, begin + array.size() * sizeof(T)});
}

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "block (%d, %d, %d), thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, block.current, what);
  // Nothing else of a program that may run on any thread's stack.
  _exit(1);
}

// Gives the processor to the scheduler until the thread is ready again.
inline void wait(State state) {
  Thread& t = block.threads[block.current];
  t.state = state;
  if (_setjmp(t.here) == 0) _longjmp(block.scheduler, 1);
}

// Lets a thread run until it waits or is done. Only its first step goes by the contexts of the C library, which ask the kernel about signals
// each time.
__attribute__((noinline)) inline void go_on(Thread& t) {
  if (_setjmp(block.scheduler) != 0) return;
  if (t.begun) _longjmp(t.here, 1);
  t.begun = true;
  swapcontext(&block.begun_from, &t.context);
}

inline void entry() {
  block.kernel();
  Thread& t = block.threads[block.current];
  if (!t.open.empty()) fail("copies were asked for and never committed");
  t.state = State::Done;
  _longjmp(block.scheduler, 1);
}

// c += a b, by the fragments' layout in the PTX manual (m16n8k32, s8).
inline void multiply(int first) {
  int8_t a[16][32], b[32][8];
  for (int lane = 0; lane < WARP; lane++) {
    const Together& p = block.threads[first + lane].together;
    int row = lane / 4, column = lane % 4 * 4;
    for (int i = 0; i < 4; i++) {
      auto byte = [i](uint32_t word) { return int8_t(word >> (8 * i)); };
      a[row][column + i] = byte(p.a[0]);
      a[row + 8][column + i] = byte(p.a[1]);
      a[row][column + 16 + i] = byte(p.a[2]);
      a[row + 8][column + 16 + i] = byte(p.a[3]);
      b[column + i][row] = byte(p.b[0]);
      b[column + 16 + i][row] = byte(p.b[1]);
    }
  }
  for (int lane = 0; lane < WARP; lane++) {
    for (int i = 0; i < 4; i++) {
      int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2, sum = 0;
      for (int k = 0; k < 32; k++) sum += a[row][k] * b[k][column];
      static_cast<int*>(block.threads[first + lane].together.c)[i] += sum;
    }
  }
}

// The same for bf16 (m16n8k16). In which order tensor cores add is not said: here exactly, rounded once.
inline void multiply_bf16(int first) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < WARP; lane++) {
    const Together& p = block.threads[first + lane].together;
    int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 2; i++) {
      auto half = [i](uint32_t word) {
        uint32_t bits = word >> (16 * i) << 16;
        float value;
        memcpy(&value, &bits, 4);
        return value;
      };
      a[row][column + i] = half(p.a[0]);
      a[row + 8][column + i] = half(p.a[1]);
      a[row][column + 8 + i] = half(p.a[2]);
      a[row + 8][column + 8 + i] = half(p.a[3]);
      b[column + i][row] = half(p.b[0]);
      b[column + 8 + i][row] = half(p.b[1]);
    }
  }
  for (int lane = 0; lane < WARP; lane++) {
    for (int i = 0; i < 4; i++) {
      int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      float& c = static_cast<float*>(block.threads[first + lane].together.c)[i];
      double sum = c;
      for (int k = 0; k < 16; k++) sum += double(a[row][k]) * b[k][column];
      c = float(sum);
    }
  }
}

// Lanes get each other's values: that of lane ^ mask, or of the lane named.
inline void trade(int first) {
  float values[WARP];
  for (int lane = 0; lane < WARP; lane++) values[lane] = block.threads[first + lane].together.value;
  for (int lane = 0; lane < WARP; lane++) {
    Together& p = block.threads[first + lane].together;
    p.value = values[p.act == Act::Trade ? lane ^ p.mask : p.mask];
  }
}

// Lanes get the lanes that have their number, a bit each.
inline void alike(int first) {
  int numbers[WARP];
  for (int lane = 0; lane < WARP; lane++) numbers[lane] = block.threads[first + lane].together.mask;
  for (int lane = 0; lane < WARP; lane++) {
    uint32_t bits = 0;
    for (int other = 0; other < WARP; other++) bits |= uint32_t(numbers[other] == numbers[lane]) << other;
    block.threads[first + lane].together.mask = int(bits);
  }
}

// Lanes get four bytes of each of four matrices of eight rows, whose rows the lanes name (ldmatrix).
inline void matrices(int first) {
  for (int lane = 0; lane < WARP; lane++) {
    uint32_t* to = static_cast<uint32_t*>(block.threads[first + lane].together.c);
    for (int i = 0; i < 4; i++)
      memcpy(to + i, &block.shared[block.threads[first + 8 * i + lane / 4].together.mask + lane % 4 * 4], 4);
  }
}

// A thread passes a barrier.
inline void pass(Thread& t) {
  for (auto& [at, bytes] : t.fencing) memset(&block.fenced[at / 4], 1, size_t(bytes) / 4);
  t.fencing.clear();
  t.state = State::Ready;
}

// Lets the warpgroups go on that are complete, and those that wait at a barrier of some threads.
inline bool release_some() {
  bool any = false;
  constexpr int LANES = 4 * WARP;
  int n = int(block.threads.size());
  for (int first = 0; first + LANES <= n; first += LANES) {
    int here = 0;
    for (int i = first; i < first + LANES; i++) here += block.threads[i].state == State::Warpgroup;
    if (here < LANES) continue;
    for (int i = first; i < first + LANES; i++) {
      if (block.threads[i].with != block.threads[first].with) fail("lanes of a warpgroup do different things together");
      block.threads[i].state = State::Ready;
    }
    block.threads[first].with(first);
    return true;
  }
  for (const Thread& one : block.threads) {
    if (one.state != State::Some) continue;
    int number = one.together.mask, wanted = int(one.together.value), here = 0;
    for (const Thread& t : block.threads) {
      bool same = t.state == State::Some && t.together.mask == number;
      if (same && int(t.together.value) != wanted) fail("threads at a barrier wait for different numbers of them");
      here += same;
    }
    if (here < wanted) continue;
    if (here > wanted) fail("more threads are at a barrier than it is for");
    for (Thread& t : block.threads)
      if (t.state == State::Some && t.together.mask == number) pass(t);
    any = true;
  }
  return any;
}

// Lets all go on that wait for each other and are complete; false where nobody can.
inline bool release() {
  // One at a time, so that a warp which does not wait for the others runs far ahead of them.
  if (release_some()) return true;
  bool any = false;
  int n = int(block.threads.size()), waiting = 0, done = 0;
  for (int first = 0; first < n; first += WARP) {
    int here = 0;
    for (int i = first; i < first + WARP; i++) here += block.threads[i].state == State::Warp;
    if (here == WARP) {
      Act act = block.threads[first].together.act;
      for (int i = first; i < first + WARP; i++)
        if (block.threads[i].together.act != act) fail("lanes of a warp do different things together");
      switch (act) {
        case Act::Int8: multiply(first); break;
        case Act::Bf16: multiply_bf16(first); break;
        case Act::Trade:
        case Act::Take: trade(first); break;
        case Act::Alike: alike(first); break;
        case Act::Matrices: matrices(first); break;
        case Act::Here: break;
      }
      for (int i = first; i < first + WARP; i++) block.threads[i].state = State::Ready;
      return true;
    }
  }
  for (Thread& t : block.threads) {
    waiting += t.state == State::Block;
    done += t.state == State::Done;
  }
  if (waiting == n) {
    for (Thread& t : block.threads) pass(t);
    any = true;
  }
  return any || done == n;
}

// Lets the threads of the block go on as far as they can. True where all are done.
inline bool go_on(bool backwards) {
  int threads = int(block.threads.size());
  for (;;) {
    bool going = false;
    for (int i = 0; i < threads; i++) {
      block.current = backwards ? threads - 1 - i : i;
      Thread& t = block.threads[block.current];
      if (t.state != State::Ready) continue;
      threadIdx = {block.current, 0, 0};
      go_on(t);
      going = true;
    }
    if (!going && !release()) return false;
    int ready = 0, done = 0;
    for (Thread& t : block.threads) {
      ready += t.state == State::Ready;
      done += t.state == State::Done;
    }
    if (done == threads) return true;
    if (!ready && !going) return false;
  }
}

// A kernel over a grid. Its blocks run one after the other; some of them begin before.
class Launch {
 public:
  // `backwards` runs blocks and threads in the other order, so that what depends on it shows.
  Launch(Dim3 grid, int threads, size_t shared_bytes, bool backwards, std::function<void()> kernel)
      : grid(grid), threads(threads), shared_bytes(shared_bytes), backwards(backwards), kernel(std::move(kernel)) {
    if (threads % WARP) fail("a block has whole warps");
    if (grid.y > 65535 || grid.z > 65535) fail("a grid is too high");
    if (shared_bytes > most_shared) fail("a block wants more shared memory than there is");
  }

  // Runs the first blocks, at most so many, up to where they need what the launch in front gives.
  void begin(int most) {
    early = true;
    for (int i = 0; i < most && i < blocks(); i++) {
      ready(i);
      if (go_on(backwards)) {
        done++;
        continue;
      }
      for (Thread& t : block.threads) {
        for (auto& group : t.groups) take(group);
        take(t.open);
      }
      begun.emplace_back();
      std::swap(block, begun.back().block);
      begun.back().number = i;
    }
    early = false;
  }

  // Runs all to the end. What is in front of it has run.
  void finish() {
    int first = done + int(begun.size());
    for (Begun& b : begun) {
      std::swap(block, b.block);
      set_index(b.number);
      for (Thread& t : block.threads)
        if (t.state == State::Inputs) t.state = State::Ready;
      end();
    }
    begun.clear();
    for (int i = first; i < blocks(); i++) {
      ready(i);
      end();
    }
  }

 private:
  struct Begun {
    Block block;
    int number;
  };

  // Copies that were asked for may come at any time; here at once.
  static void take(std::vector<Copy>& copies) {
    for (Copy& c : copies) {
      if (c.bytes > 0) memcpy(c.found, c.from, size_t(c.bytes));
      c.arrived = true;
    }
  }

  int blocks() const { return grid.x * grid.y * grid.z; }

  void set_index(int i) {
    gridDim = grid;
    Dim3 at = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    blockIdx = backwards ? Dim3{grid.x - 1 - at.x, grid.y - 1 - at.y, grid.z - 1 - at.z} : at;
  }

  void ready(int i) {
    set_index(i);
    block.kernel = kernel;
    if (int(block.threads.size()) != threads) block.threads = std::vector<Thread>(size_t(threads));
    block.shared.assign(shared_bytes, 0xa5);
    block.fenced.assign(shared_bytes / 4 + 1, 0);
    block.warpgroups.assign(size_t(threads) / (4 * WARP), nullptr);
    for (Thread& t : block.threads) {
      t.state = State::Ready;
      t.begun = false;
      t.open.clear();
      t.groups.clear();
      t.arrived.clear();
      t.fencing.clear();
      t.commits = 0;
      t.ordered = false;
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get();
      t.context.uc_stack.ss_size = STACK;
      t.context.uc_link = nullptr;
      makecontext(&t.context, entry, 0);
    }
  }

  void end() {
    if (!go_on(backwards)) fail("threads wait for each other for ever: a barrier or a warp's product was missed");
  }

  Dim3 grid;
  int threads;
  size_t shared_bytes;
  bool backwards;
  std::function<void()> kernel;
  std::list<Begun> begun;
  int done = 0;
};

// Runs `kernel` for every block of `grid`.
inline void launch(Dim3 grid, int threads, size_t shared_bytes, bool backwards, std::function<void()> kernel) {
  Launch(grid, threads, shared_bytes, backwards, std::move(kernel)).finish();
}

}  // namespace simt

inline void __syncthreads() { simt::wait(simt::State::Block); }

// Addresses in shared memory count from its begin.
inline uint32_t shared_address(const void* at) {
  return uint32_t(static_cast<const unsigned char*>(at) - simt::block.shared.data());
}

namespace simt {

// `bytes` of shared memory at `at`, a multiple of `alignment`.
inline unsigned char* inside(uint32_t at, size_t bytes, int alignment) {
  if (at % uint32_t(alignment)) fail("an access to shared memory is not aligned");
  if (at + bytes > block.shared.size()) fail("an access goes outside shared memory");
  return block.shared.data() + at;
}

inline void known(const void* from, int bytes) {
  for (const Range& r : ranges)
    if (static_cast<const char*>(from) >= r.begin && static_cast<const char*>(from) + bytes <= r.end) return;
  fail("an access reads outside every array");
}

}  // namespace simt

inline bool is_aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

namespace simt {

// `bytes` of `room` are copied to shared memory, zeros behind them.
inline void ask_copy(uint32_t to, const void* from, int bytes, int room) {
  if (bytes > 0) known(from, bytes);
  unsigned char* at = inside(to, size_t(room), room);
  memset(at, 0xa5, size_t(room));
  memset(&block.fenced[to / 4], 0, size_t(room) / 4);
  block.threads[block.current].open.push_back({at, from, bytes, room, false, {}});
}

}  // namespace simt

inline void copy_async(uint32_t to, const void* from, int bytes) {
  if (!is_aligned(from)) simt::fail("an asynchronous copy is not aligned");
  simt::ask_copy(to, from, bytes, 16);
}

inline void copy_commit() {
  simt::Thread& t = simt::block.threads[simt::block.current];
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

template <int PENDING>
inline void copy_wait() {
  simt::Thread& t = simt::block.threads[simt::block.current];
  auto& groups = t.groups;
  while (groups.size() > PENDING) {
    for (const simt::Copy& c : groups.front()) {
      memset(c.to, 0, size_t(c.room));
      if (c.bytes > 0) memcpy(c.to, c.arrived ? c.found : c.from, size_t(c.bytes));
      t.arrived.push_back({shared_address(c.to), c.room});
    }
    groups.erase(groups.begin());
  }
}

namespace simt {

inline Together& act(Together together) {
  Thread& t = block.threads[block.current];
  t.together = together;
  wait(State::Warp);
  return t.together;
}

// All lanes of a warpgroup do `with` together.
inline void meet(void (*with)(int), void* registers, int mask) {
  Thread& t = block.threads[block.current];
  t.together.c = registers, t.together.mask = mask, t.with = with;
  wait(State::Warpgroup);
}

}  // namespace simt

inline void mma_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { simt::act({simt::Act::Int8, c, a, b, 0, 0}); }

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { simt::act({simt::Act::Bf16, c, a, b, 0, 0}); }

inline void mma_s8_on(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&from)[4]) {
  for (int i = 0; i < 4; i++) c[i] = from[i];
  mma_s8(c, a, b);
}

inline void mma_bf16_on(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  for (float& sum : c) sum = 0;
  mma_bf16(c, a, b);
}

inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  simt::inside(row, 16, 16);
  simt::act({simt::Act::Matrices, to, nullptr, nullptr, 0, int(row)});
}

inline void sync_warp() { simt::act({simt::Act::Here, nullptr, nullptr, nullptr, 0, 0}); }

inline uint32_t in_register(uint32_t number) {
  sync_warp();
  return number;
}

inline float exchange(float value, int mask) {
  return simt::act({simt::Act::Trade, nullptr, nullptr, nullptr, value, mask}).value;
}

inline float bf16_value(uint16_t bits);
inline uint16_t to_bf16(float value);

inline float from_lane(float value, int lane) {
  return simt::act({simt::Act::Take, nullptr, nullptr, nullptr, value, lane}).value;
}

inline uint32_t lanes_alike(int number) {
  return uint32_t(simt::act({simt::Act::Alike, nullptr, nullptr, nullptr, 0, number}).mask);
}

inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }

inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  auto one = [](uint32_t a, uint32_t b, uint32_t c) {
    double exact = double(bf16_value(uint16_t(a))) * bf16_value(uint16_t(b)) + bf16_value(uint16_t(c));
    return uint32_t(to_bf16(float(exact)));
  };
  return one(a, b, c) | one(a >> 16, b >> 16, c >> 16) << 16;
}

inline void load_sixteen(uint32_t (&to)[4], const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) simt::fail("a load of sixteen bytes is not aligned");
  memcpy(to, from, 16);
}

inline void store_sixteen(void* to, const uint32_t (&from)[4]) {
  if (reinterpret_cast<uintptr_t>(to) % 16) simt::fail("a store of sixteen bytes is not aligned");
  memcpy(to, from, 16);
}

inline void load_eight(uint32_t (&to)[2], uint32_t from) { memcpy(to, simt::inside(from, 8, 8), 8); }

template <int N>
inline void load_floats(float (&to)[N], const float* from) {
  memcpy(to, simt::inside(shared_address(from), sizeof to, sizeof to), sizeof to);
}

inline void store_four(float* to, const float (&from)[4]) { memcpy(simt::inside(shared_address(to), 16, 16), from, 16); }

inline void load_cached_eight(uint32_t (&to)[2], const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 8) simt::fail("a load of eight bytes is not aligned");
  simt::known(from, 8);
  memcpy(to, from, 8);
}

inline void load_cached_sixteen(uint32_t (&to)[4], const void* from) {
  simt::known(from, 16);
  load_sixteen(to, from);
}

inline void prefetch(const void* at) { simt::known(at, 1); }

// Blocks that begin early stop here until the launch in front has run.
inline void inputs_ready() {
  if (simt::early) simt::wait(simt::State::Inputs);
}

// When the next launch may begin is the driver's choice: as early as it can.
inline void start_dependents() {}

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t nibble = selector >> (4 * i) & 15, byte = bytes >> (8 * (nibble & 7)) & 255;
    if (nibble & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * i);
  }
  return out;
}
