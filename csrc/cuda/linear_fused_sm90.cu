// dW of a linear layer with per-sample squared norms, and M2: bfloat16 and float16 on sm_90a.
//
// One warp loads boxes of g and x through TMA into a ring of stages; two warpgroups multiply, each
// 64 rows of the block's tile, a stage by turns. While one waits for its product and squares a
// sample, the tensor cores work on the other's turn. Every warpgroup sees all samples of an item in
// order, so that sums and M2 need no merging inside a block.

#include "hopper/finish.cuh"
#include "hopper/pipeline.cuh"
#include "ops.cuh"

namespace gradstats::cuda {
namespace hopper {
namespace {

template <typename Traits, typename T>
__global__ void __launch_bounds__(kThreads, 1)
    fused_kernel(const __grid_constant__ CUtensorMap x_map,
                 const __grid_constant__ CUtensorMap g_map,
                 const __grid_constant__ Arguments args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t base[];
  run_block<Traits, T>(x_map, g_map, args, base);
#else
  __trap();  // compiled for another architecture: refusal() keeps such devices away
#endif
}

Shape shape_of(const LinearFused& call) {
  return {call.batch, call.len_t, call.x.width, call.g.width};
}

template <typename Traits, typename T>
cudaError_t launch(const LinearFused& call, const Plan& plan, float* scratch, void* dw,
                   float* sq_norm, float* m2, cudaStream_t stream) {
  const bool half = call.dtype == DType::kFloat16;
  const auto kind = half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap x_map, g_map;
  const auto map = [&](CUtensorMap* to, const Samples& s, int box_t) {
    return encode(to, kind, s.data, call.batch, call.len_t, s.width, s.stride_b, s.stride_t, box_t);
  };
  cudaError_t error = map(&x_map, call.x, Stage<Traits>::kShareT);
  if (error == cudaSuccess) error = map(&g_map, call.g, kBlockT);
  if (error != cudaSuccess) return error;

  float4* sums = reinterpret_cast<float4*>(scratch);  // first: the slots need 16-byte alignment
  float4* spreads = sums + partial_floats<Traits>(plan) / 4;
  float4* slab = Traits::kMoments ? spreads + partial_floats<Traits>(plan) / 4 : spreads;
  const Arguments args{plan, shape_of(call), dw, m2, sums, spreads, reinterpret_cast<float*>(slab)};
  const int64_t merges = merge_blocks<Traits>(plan);
  if (merges + call.batch > INT32_MAX) return cudaErrorInvalidValue;

  const auto kernel = fused_kernel<Traits, T>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               Traits::kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Traits::kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.workers * Traits::kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Traits::kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, x_map, g_map, args);
  if (error != cudaSuccess) return error;

  const auto blocks = static_cast<unsigned>(merges + call.batch);
  finish_kernel<Traits, T>
      <<<blocks, kFinishThreads, 0, stream>>>(args, static_cast<int>(merges), sq_norm);
  return cudaGetLastError();
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

template <int kCluster, typename Run>
auto with_tile(const LinearFused& call, Run run) {
  using Wide = Traits<false, kCluster, kWide>;
  using Narrow = Traits<false, kCluster, kNarrow>;
  if (call.moments) return run(Traits<true, kCluster>{});
  const int count = attribute(cudaDevAttrMultiProcessorCount);
  const Shape shape = shape_of(call);
  return plan_cost<Narrow>(shape, count) < plan_cost<Wide>(shape, count) ? run(Narrow{})
                                                                         : run(Wide{});
}

// Calls `run` with the traits of the call.
template <typename Run>
auto with_traits(const LinearFused& call, Run run) {
  const int64_t tiles = ceil_div<int64_t>(call.g.width, Traits<false, 1>::kTileO);
  return choose_cluster(tiles) == 2 ? with_tile<2>(call, run) : with_tile<1>(call, run);
}

template <typename Traits>
Plan plan_of(const LinearFused& call, Traits) {
  return make_plan<Traits>(shape_of(call), attribute(cudaDevAttrMultiProcessorCount));
}

// What cuTensorMapEncodeTiled's documentation asks of 16-bit rows.
const char* undescribable(const Samples& s, int64_t batch, int64_t len_t) {
  constexpr int64_t kStep = 16 / kElement, kMost = 1 << 30, kBytes = int64_t{1} << 40;
  if (reinterpret_cast<uintptr_t>(s.data) % 16 != 0) return "data is not aligned to 16 bytes";
  if (s.stride_t % kStep != 0 || s.stride_b % kStep != 0) {
    return "a stride is no multiple of 16 bytes";
  }
  if (s.stride_t < s.width || s.stride_b < s.stride_t || s.stride_b % s.stride_t != 0) {
    return "strides do not nest: rows in samples, samples in the batch";
  }
  if (s.stride_b * kElement >= kBytes) return "a stride is 2^40 bytes or more";
  if (s.width > kMost || len_t > kMost || batch > kMost) return "a dimension is above 2^30";
  return nullptr;
}

}  // namespace
}  // namespace hopper

const char* linear_fused_refusal(const LinearFused& call) {
  using namespace hopper;
  if (attribute(cudaDevAttrComputeCapabilityMajor) != 9) return "it runs on compute capability 9.0";
  if (call.dtype == DType::kFloat32) return "it takes bfloat16 and float16";
  if (call.batch < 1 || call.len_t < 1 || call.x.width < 1 || call.g.width < 1)
    return "it is empty";
  if (const char* why = undescribable(call.x, call.batch, call.len_t)) return why;
  if (const char* why = undescribable(call.g, call.batch, call.len_t)) return why;
  const int64_t tiles = ceil_div<int64_t>(call.x.width, kNarrow) *
                        (ceil_div<int64_t>(call.g.width, 2 * kConsumers * kWgmmaM) + 1);
  if (tiles > INT32_MAX / kMaxSplits) return "it has too many tiles";
  if (encode_tiled() == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  return nullptr;
}

int64_t linear_fused_scratch(const LinearFused& call) {
  return hopper::with_traits(call, [&](auto traits) {
    return hopper::scratch_floats<decltype(traits)>(hopper::plan_of(call, traits));
  });
}

cudaError_t linear_fused(const LinearFused& call, float* scratch, void* dw, float* sq_norm,
                         float* m2, cudaStream_t stream) {
  if (linear_fused_refusal(call) != nullptr) return cudaErrorNotSupported;
  return hopper::with_traits(call, [&](auto traits) {
    using Traits = decltype(traits);
    const hopper::Plan plan = hopper::plan_of(call, traits);
    return call.dtype == DType::kFloat16
               ? hopper::launch<Traits, __half>(call, plan, scratch, dw, sq_norm, m2, stream)
               : hopper::launch<Traits, __nv_bfloat16>(call, plan, scratch, dw, sq_norm, m2,
                                                       stream);
  });
}

}  // namespace gradstats::cuda
