// A CUDA driver whose only GPU is this processor: the part of the driver API that gptoss calls, over simt.hpp. Programs that find it as
// libcuda.so.1 launch the kernels as they would on a GPU, so that what they pass is checked too: names, grids, shared memory, structures. Behind
// each allocation lies a page that nobody may touch. Machine code is not looked at.
//
// GPTOSS_EMULATED_GPU says which GPU it is: compute capability and multiprocessors, "8.6:4" unless it is set. With 9.0 and later, launches that allow it
// begin before the two in front of them have run, up to where they want their inputs. GPTOSS_EMULATED_COUNT is a file that gets how many did, and of how many.
// GPTOSS_EMULATED_CRASH names a kernel whose launch fails and ends the context, GPTOSS_EMULATED_HANG one that never ends.
//
//     c++ -std=c++17 -O2 -fPIC -shared -I.. -o libcuda.so.1 driver.cpp
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <list>
#include <map>
#include <string>

#include "wgmma.cuh"

#include "../combine_experts.cu"
#include "../dequantize_mxfp4.cu"
#include "../fake_quantize.cu"
#include "../group_rows.cu"
#include "../mask_2_4.cu"
#include "../mxfp4_a16.cu"
#include "../mxfp4_a8.cu"
#include "../normalize_activations.cu"
#include "../quantize_activations.cu"
#include "../w4a16.cu"
#include "../w4a8.cu"
#include "../w8a8.cu"

namespace {

// CUresult.
enum Result : int { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700 };

struct Function {
  int threads;
  size_t sizes[2];  // of its arguments; the second is 0 where there is one
  std::function<void(void*, void*)> run;
  std::function<int(const gemm::Arguments&)> wanted;  // bytes of shared memory of a product; where `threads` is 0 its parts say how many there are
  bool hopper = false;                                // whether 9.0 alone has it
  int shared = 48 << 10;                              // bytes that a launch may ask for
};

template <class A>
Function function(int threads, void (*kernel)(A)) {
  Function f;
  f.threads = threads, f.sizes[0] = sizeof(A), f.sizes[1] = 0;
  f.run = [kernel](void* a, void*) { kernel(*static_cast<A*>(a)); };
  return f;
}

template <class A, class B>
Function function(int threads, void (*kernel)(A, B)) {
  Function f;
  f.threads = threads, f.sizes[0] = sizeof(A), f.sizes[1] = sizeof(B);
  f.run = [kernel](void* a, void* b) { kernel(*static_cast<A*>(a), *static_cast<B*>(b)); };
  return f;
}

std::map<std::string, Function>& functions() {
  static std::map<std::string, Function> all;
  if (!all.empty()) return all;
#define OF(name, threads) all[#name] = function(threads, name)
#define OF_PRODUCT(name, Codes, rows, tokens)                                                                                \
  OF(name##_##rows##x##tokens, 0);                                                                                           \
  OF(name##_experts_##rows##x##tokens, 0);                                                                                   \
  all[#name "_" #rows "x" #tokens].wanted = all[#name "_experts_" #rows "x" #tokens].wanted = [](const gemm::Arguments& p) { \
    return gemm::shared_bytes<gemm::Codes, rows, tokens>(p.k, p.group, p.scale_type);                                        \
  }
#define OF_MANY(name, Codes, Inputs, rows)                                                                                 \
  OF(name##_##rows##x64, gemm::MANY_THREADS);                                                                              \
  OF(name##_experts_##rows##x64, gemm::MANY_THREADS);                                                                      \
  all[#name "_" #rows "x64"].hopper = all[#name "_experts_" #rows "x64"].hopper = true;                                    \
  all[#name "_" #rows "x64"].wanted = all[#name "_experts_" #rows "x64"].wanted = [](const gemm::Arguments& p) {           \
    return gemm::many_shared_bytes<gemm::Codes, gemm::Inputs, rows>(p.k, p.group, p.scale_type);                           \
  }
#define OF_PRODUCTS(name, Codes, Inputs) \
  OF_MANY(name, Codes, Inputs, 64);      \
  OF_MANY(name, Codes, Inputs, 128);     \
  OF_PRODUCT(name, Codes, 16, 8);        \
  OF_PRODUCT(name, Codes, 16, 16);       \
  OF_PRODUCT(name, Codes, 32, 8);        \
  OF_PRODUCT(name, Codes, 32, 16)
  OF_PRODUCTS(w4a8, Int4, Int8Inputs);
  OF_PRODUCTS(w8a8, Int8, Int8Inputs);
  OF_PRODUCTS(w4a16, Int4, Bf16Inputs);
  OF_PRODUCTS(mxfp4_a8, E2m1, Int8Inputs);
  OF_PRODUCTS(mxfp4_a16, E2m1, Bf16Inputs);
  OF(quantize_activations, activations::THREADS);
  OF(normalize_activations, activations::THREADS);
  OF(group_rows, routes::THREADS);
  OF(combine_experts, combine::THREADS);
  OF(dequantize_mxfp4, mxfp4::THREADS);
  OF(dequantize_mxfp4_turned, mxfp4::THREADS);
  OF(fake_quantize, fake::THREADS);
  OF(mask_2_4, mask::THREADS);
  return all;
}

// ---- memory ----

struct Allocation {
  char* pages;
  size_t bytes;
};

std::map<char*, Allocation> allocations;

// Whether `bytes` at `at` lie within one allocation.
bool within(const char* at, size_t bytes) {
  auto next = allocations.upper_bound(const_cast<char*>(at));
  if (next == allocations.begin()) return false;
  --next;
  const Allocation& a = next->second;
  return at + bytes <= a.pages + a.bytes - sysconf(_SC_PAGESIZE);
}

void outside(int) {
  static const char WORDS[] = "a kernel touched what lies behind an array\n";
  (void)!write(2, WORDS, sizeof WORDS - 1);
  _exit(1);
}

// ---- streams, graphs, events ----

using Work = std::function<void()>;

// The GPU that this is.
struct Model {
  int major = 8, minor = 6, multiprocessors = 4;
  Model() {
    if (const char* said = getenv("GPTOSS_EMULATED_GPU")) sscanf(said, "%d.%d:%d", &major, &minor, &multiprocessors);
    simt::most_shared = major >= 9 ? 227 << 10 : 99 << 10;
  }
};

Model& model() {
  static Model model;
  return model;
}

// Launches that have not run to their end, in order. None but the first may have what it reads.
std::list<simt::Launch> open;

// How many blocks of a launch begin early, and how many launches are open at most.
constexpr int EARLY_BLOCKS = 24;
constexpr size_t OPEN = 3;

long launches = 0, early_launches = 0;

void count() {
  const char* file = getenv("GPTOSS_EMULATED_COUNT");
  FILE* to = file ? fopen(file, "w") : nullptr;
  if (!to) return;
  fprintf(to, "%ld of %ld\n", early_launches, launches);
  fclose(to);
}

void finish(size_t left) {
  for (; open.size() > left; open.pop_front()) open.front().finish();
}

// Set by a launch that failed: nothing works any more, as after an access outside memory.
bool broken = false;

std::vector<Work>* capturing = nullptr;

void enqueue(Work work) { capturing ? capturing->push_back(std::move(work)) : work(); }

struct Event {
  timespec at;
};

}  // namespace

#define API extern "C" __attribute__((visibility("default"))) int

API cuInit(unsigned) {
  model();
  static const int once = atexit(count);
  (void)once;
  signal(SIGSEGV, outside);
  return SUCCESS;
}

API cuDriverGetVersion(int* version) {
  *version = 13000;
  return SUCCESS;
}

API cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR";
  return SUCCESS;
}

API cuGetErrorString(int code, const char** text) {
  *text = code == NOT_FOUND ? "named symbol not found" : code == OUT_OF_MEMORY ? "out of memory" : code == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "invalid argument";
  return SUCCESS;
}

API cuDeviceGetCount(int* count) {
  *count = 1;
  return SUCCESS;
}

API cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? SUCCESS : INVALID_VALUE;
}

API cuDeviceGetName(char* name, int room, int) {
  snprintf(name, size_t(room), "this processor");
  return SUCCESS;
}

API cuDeviceTotalMem_v2(size_t* bytes, int) {
  *bytes = size_t(1) << 30;
  return SUCCESS;
}

API cuDeviceGetAttribute(int* value, int attribute, int) {
  enum { MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76, SHARED_OPTIN = 97, L2 = 38 };
  switch (attribute) {
    case MULTIPROCESSORS: *value = model().multiprocessors; return SUCCESS;
    case MAJOR: *value = model().major; return SUCCESS;
    case MINOR: *value = model().minor; return SUCCESS;
    case SHARED_OPTIN: *value = int(simt::most_shared); return SUCCESS;
    case L2: *value = 1 << 14; return SUCCESS;
    default: return INVALID_VALUE;
  }
}

API cuDevicePrimaryCtxRetain(void** context, int) {
  *context = context;
  return SUCCESS;
}

API cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
API cuCtxSetCurrent(void*) { return SUCCESS; }
API cuCtxSynchronize() {
  finish(0);
  return broken ? ILLEGAL_ADDRESS : SUCCESS;
}

API cuMemAlloc_v2(uintptr_t* at, size_t bytes) {
  if (broken) return ILLEGAL_ADDRESS;
  if (bytes == 0) return INVALID_VALUE;
  size_t page = size_t(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
  // So far behind an array nothing else lies, wherever the system puts it: an index that is thousands of rows off is seen too.
  const size_t guard = size_t(1) << 28;
  void* pages = mmap(nullptr, whole + guard, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) return OUT_OF_MEMORY;
  if (mprotect(pages, whole, PROT_READ | PROT_WRITE) != 0) return OUT_OF_MEMORY;
  memset(pages, 0xa5, whole);
  // As near to its end as alignment lets it.
  char* begin = static_cast<char*>(pages) + (whole - bytes) / 16 * 16;
  allocations[begin] = {static_cast<char*>(pages), whole + guard};
  simt::ranges.push_back({begin, begin + bytes});
  *at = reinterpret_cast<uintptr_t>(begin);
  return SUCCESS;
}

API cuMemFree_v2(uintptr_t at) {
  finish(0);
  auto found = allocations.find(reinterpret_cast<char*>(at));
  if (found == allocations.end()) return INVALID_VALUE;
  for (size_t i = 0; i < simt::ranges.size(); i++) {
    if (simt::ranges[i].begin == found->first) simt::ranges.erase(simt::ranges.begin() + long(i--));
  }
  munmap(found->second.pages, found->second.bytes);
  allocations.erase(found);
  return SUCCESS;
}

API cuMemcpyHtoD_v2(uintptr_t to, const void* from, size_t bytes) {
  if (!within(reinterpret_cast<char*>(to), bytes)) return INVALID_VALUE;
  memcpy(reinterpret_cast<void*>(to), from, bytes);
  return SUCCESS;
}

API cuMemcpyDtoH_v2(void* to, uintptr_t from, size_t bytes) {
  if (!within(reinterpret_cast<char*>(from), bytes)) return INVALID_VALUE;
  finish(0);
  if (broken) return ILLEGAL_ADDRESS;
  memcpy(to, reinterpret_cast<void*>(from), bytes);
  return SUCCESS;
}

API cuMemcpyDtoDAsync_v2(uintptr_t to, uintptr_t from, size_t bytes, void*) {
  if (!within(reinterpret_cast<char*>(to), bytes) || !within(reinterpret_cast<char*>(from), bytes)) return INVALID_VALUE;
  enqueue([=] {
    finish(0);
    memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
  });
  return SUCCESS;
}

API cuMemsetD8_v2(uintptr_t at, unsigned char byte, size_t bytes) {
  if (!within(reinterpret_cast<char*>(at), bytes)) return INVALID_VALUE;
  memset(reinterpret_cast<void*>(at), byte, bytes);
  return SUCCESS;
}

API cuModuleLoadData(void** module, const void* image) {
  *module = const_cast<void*>(image);
  return SUCCESS;
}

API cuModuleUnload(void*) { return SUCCESS; }

API cuModuleGetFunction(void** function, void*, const char* name) {
  auto found = functions().find(name);
  if (found == functions().end() || (found->second.hopper && (model().major != 9 || model().minor != 0))) return NOT_FOUND;
  *function = &found->second;
  return SUCCESS;
}

API cuFuncSetAttribute(void* function, int attribute, int value) {
  constexpr int DYNAMIC_SHARED = 8, CARVEOUT = 9;
  if (attribute == CARVEOUT) return value >= -1 && value <= 100 ? SUCCESS : INVALID_VALUE;
  if (attribute != DYNAMIC_SHARED || size_t(value) > simt::most_shared) return INVALID_VALUE;
  static_cast<Function*>(function)->shared = value;
  return SUCCESS;
}

API cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int threads, size_t shared) {
  // Registers are not known here.
  int by_threads = 2048 / threads, by_memory = shared ? int((simt::most_shared + 1024) / shared) : by_threads;
  *blocks = by_threads < by_memory ? by_threads : by_memory;
  return SUCCESS;
}

// CUlaunchConfig.
struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

API cuLaunchKernelEx(const Config* config, void* f, void** arguments, void**) {
  Function& function = *static_cast<Function*>(f);
  auto is = [&](const char* variable) {
    const char* name = getenv(variable);
    auto found = name ? functions().find(name) : functions().end();
    return found != functions().end() && &found->second == &function;
  };
  if (is("GPTOSS_EMULATED_HANG")) pause();
  broken = broken || is("GPTOSS_EMULATED_CRASH");
  if (broken) return ILLEGAL_ADDRESS;
  int threads = function.threads;
  // Neither less nor more than the kernel's own header says.
  if (function.wanted) {
    const gemm::Arguments& p = *static_cast<gemm::Arguments*>(arguments[0]);
    const gemm::Parts parts = gemm::Parts::of(p.k, p.group);
    if (memcmp(&parts, &p.parts, sizeof parts) != 0 || int(config->shared) != function.wanted(p)) return INVALID_VALUE;
    if (threads == 0) threads = 32 * parts.warps;
  }
  bool fits = config->block[0] == unsigned(threads) && config->block[1] == 1 && config->block[2] == 1;
  if (!fits || int(config->shared) > function.shared || !config->grid[0] || !config->grid[1] || !config->grid[2]) return INVALID_VALUE;
  Dim3 grid = {int(config->grid[0]), int(config->grid[1]), int(config->grid[2])};
  // Arguments are taken at the launch, whenever it runs.
  using Bytes = std::vector<uint64_t>;
  std::shared_ptr<Bytes> copies[2];
  for (int i = 0; i < 2; i++) {
    copies[i] = std::make_shared<Bytes>(function.sizes[i] / 8 + 1);
    if (function.sizes[i]) memcpy(copies[i]->data(), arguments[i], function.sizes[i]);
  }
  // CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION.
  constexpr unsigned PROGRAMMATIC = 6;
  bool early = model().major >= 9 && config->attribute_count == 1 && *static_cast<unsigned*>(config->attributes) == PROGRAMMATIC;
  enqueue([a = copies[0], b = copies[1], &function, grid, threads, shared = config->shared, early] {
    launches++;
    early_launches += early;
    finish(early ? OPEN - 1 : 0);
    open.emplace_back(grid, threads, shared, false, [a, b, &function] { function.run(a->data(), b->data()); });
    if (early && open.size() > 1) open.back().begin(EARLY_BLOCKS);
  });
  return SUCCESS;
}

API cuStreamCreate(void** stream, unsigned) {
  *stream = stream;
  return SUCCESS;
}

API cuStreamSynchronize(void*) {
  finish(0);
  return broken ? ILLEGAL_ADDRESS : SUCCESS;
}
API cuStreamDestroy_v2(void*) { return SUCCESS; }

API cuStreamBeginCapture_v2(void*, int) {
  if (capturing) return INVALID_VALUE;
  capturing = new std::vector<Work>;
  return SUCCESS;
}

API cuStreamEndCapture(void*, void** graph) {
  if (!capturing) return INVALID_VALUE;
  *graph = capturing;
  capturing = nullptr;
  return SUCCESS;
}

API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  *executable = new std::vector<Work>(*static_cast<std::vector<Work>*>(graph));
  return SUCCESS;
}

API cuGraphLaunch(void* executable, void*) {
  for (Work& work : *static_cast<std::vector<Work>*>(executable)) work();
  return SUCCESS;
}

API cuGraphExecDestroy(void* executable) {
  delete static_cast<std::vector<Work>*>(executable);
  return SUCCESS;
}

API cuGraphDestroy(void* graph) {
  delete static_cast<std::vector<Work>*>(graph);
  return SUCCESS;
}

API cuEventCreate(void** event, unsigned) {
  *event = new Event;
  return SUCCESS;
}

API cuEventRecord(void* event, void*) {
  finish(0);
  clock_gettime(CLOCK_MONOTONIC, &static_cast<Event*>(event)->at);
  return SUCCESS;
}

API cuEventSynchronize(void*) { return SUCCESS; }

API cuEventElapsedTime_v2(float* milliseconds, void* first, void* second) {
  const timespec &a = static_cast<Event*>(first)->at, &b = static_cast<Event*>(second)->at;
  *milliseconds = float(double(b.tv_sec - a.tv_sec) * 1e3 + double(b.tv_nsec - a.tv_nsec) * 1e-6);
  return SUCCESS;
}

API cuEventDestroy_v2(void* event) {
  delete static_cast<Event*>(event);
  return SUCCESS;
}
