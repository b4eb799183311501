// W8A8 and FP8 for many tokens on Hopper: warp-group products fed by the bulk copy engine, by CUTLASS. CUTLASS prepares a launch on the
// processor (it makes descriptors of the copies), so this is a library with a C interface and not machine code alone.
//
//   output[m, n] = input_scale[m] * (weight_scale[n] * sum over k of input[m, k] * weight[n, k]) + bias[n]
//
// Sums are int32 for int8 and f32 for E4M3 (in which tensor cores keep fewer bits, so partial sums go to f32 registers as CUTLASS has it).
#include <cutlass/cutlass.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#define API extern "C" __attribute__((visibility("default")))

// Plain data, the same on both sides.
struct Arguments {
  const void* input;          // [M, K], int8 or E4M3
  const void* weight;         // [N, K], the same
  const float* input_scale;   // [M]
  const float* weight_scale;  // [N]
  const void* bias;           // [N] in bf16, or null
  void* output;               // [M, N] in bf16
  int m, n, k;                // K a multiple of 16, N of 8
};

// In a ping-pong two groups of warps take turns, each with a tile of its own; of a cooperative one each has half of a tile. E4M3's sums are there
// twice, which a tile of one's own has no registers for.
struct PingPong {
  using Loop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using End = cutlass::epilogue::TmaWarpSpecialized;
};
struct Cooperative {
  using Loop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using End = cutlass::epilogue::TmaWarpSpecializedCooperative;
};

template <class Element, class Sum, class Schedule>
struct Product {
  using Output = cutlass::bfloat16_t;
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_128>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  static constexpr auto ROUND = cutlass::FloatRoundStyle::round_to_nearest;

  // The output of a sum, as a tree of operations.
  template <class Operation, class... Children>
  using Node = cutlass::epilogue::fusion::Sm90EVT<Operation, Children...>;
  using Accumulator = cutlass::epilogue::fusion::Sm90AccFetch;
  using OfRow = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float, float, cute::Stride<cute::_1, cute::_0, cute::_0>>;
  using OfColumn = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float, float, cute::Stride<cute::_0, cute::_1, cute::_0>>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, Output, float, cute::Stride<cute::_0, cute::_1, cute::_0>>;
  using Multiply = cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, float, float, ROUND>;
  using MultiplyAdd = cutlass::epilogue::fusion::Sm90Compute<cutlass::homogeneous_multiply_add, Output, float, ROUND>;
  using Tree = Node<MultiplyAdd, OfRow, Node<Multiply, OfColumn, Accumulator>, Bias>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, Sum, float, void,
      cutlass::layout::RowMajor, 8, Output, cutlass::layout::RowMajor, 8, typename Schedule::End, Tree>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, 16, Element, cutlass::layout::ColumnMajor, 16, Sum,
      Tile, Cluster, cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Loop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Gemm::Arguments arguments(const Arguments& a) {
    using Rows = cute::Stride<int64_t, cute::_1, int64_t>;
    Rows columns = {a.k, {}, 0}, outputs = {a.n, {}, 0};
    typename OfRow::Arguments row = {a.input_scale};
    typename OfColumn::Arguments column = {a.weight_scale};
    typename Bias::Arguments bias = {static_cast<const Output*>(a.bias)};
    typename Gemm::Arguments all = {cutlass::gemm::GemmUniversalMode::kGemm,
                                    {a.m, a.n, a.k, 1},
                                    {static_cast<const Element*>(a.input), columns, static_cast<const Element*>(a.weight), columns},
                                    {{}, nullptr, {}, static_cast<Output*>(a.output), outputs}};
    all.epilogue.thread = {row, {column, {}, {}}, bias, {}};
    return all;
  }

  static size_t workspace(const Arguments& a) { return Gemm::get_workspace_size(arguments(a)); }

  static int run(const Arguments& a, void* workspace, cudaStream_t stream) {
    Gemm gemm;
    auto all = arguments(a);
    cutlass::Status status = Gemm::can_implement(all);
    if (status == cutlass::Status::kSuccess) status = gemm.initialize(all, workspace, stream);
    if (status == cutlass::Status::kSuccess) status = gemm.run(stream);
    return int(status);
  }
};

using Int8 = Product<int8_t, int32_t, PingPong>;
using Fp8 = Product<cutlass::float_e4m3_t, float, Cooperative>;

// Bytes of memory of the GPU that a launch works in; `fp8` is 0 for int8.
API size_t gptoss_hopper_workspace(int fp8, const Arguments* a) { return fp8 ? Fp8::workspace(*a) : Int8::workspace(*a); }

// Launches on `stream`, a CUstream of the current context. 0, or CUTLASS's status.
API int gptoss_hopper_gemm(int fp8, const Arguments* a, void* workspace, void* stream) {
  return fp8 ? Fp8::run(*a, workspace, cudaStream_t(stream)) : Int8::run(*a, workspace, cudaStream_t(stream));
}

// CUTLASS's words for a status.
API const char* gptoss_hopper_status(int status) { return cutlass::cutlassGetStatusString(cutlass::Status(status)); }
