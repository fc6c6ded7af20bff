// SPDX-License-Identifier: Apache-2.0
// select_chunks on CUDA: parameters, launch, registration. Token counts lie on the device, so their
// values are not checked here: those out of range are cut to what the chunk's pages hold.
#include <tuple>

#include "cuda/launch.h"
#include "cuda/select_chunks.cuh"
#include "select_chunks_checks.h"

namespace lychee::cuda {
namespace {

using Selection = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Selection select_chunks_cuda(const Tensor& scores, double threshold, int64_t max_chunks,
                             const Tensor& chunk_pages, const Tensor& chunk_tokens,
                             int64_t page_tokens) {
  const char* op = "select_chunks";
  check_cuda(scores, op, "scores");
  const DeviceGuard guard(scores.get_device_index());
  SelectChunksParams p = select_params(scores, threshold, max_chunks, chunk_pages, chunk_tokens,
                                       page_tokens, same_device_as(scores), op);
  const auto ints = [&](const std::vector<int64_t>& sizes, int32_t** data) {
    Tensor output = new_output_like(scores, sizes, ScalarType::Int);
    *data = static_cast<int32_t*>(output.mutable_data_ptr());
    return output;
  };
  const int64_t batch = scores.size(0), width = p.slots * p.pages_per_chunk;
  Tensor page_table = ints({batch, width}, &p.page_table);
  Tensor page_len = ints({batch, width}, &p.page_len);
  Tensor page_base = ints({batch, width}, &p.page_base);
  Tensor num_pages = ints({batch}, &p.num_pages), num_tokens = ints({batch}, &p.num_tokens);
  Tensor chunks = ints({batch, p.slots}, &p.chunks);
  Tensor num_chunks = ints({batch}, &p.num_chunks_out);

  const unsigned threads = plan_select_threads(p.num_chunks, width);
  dispatch_io_dtype(p.dtype, [&]<class T>(T) {
    launch<select_chunks_kernel<T>>(op, scores, dim3{static_cast<unsigned>(batch), 1, 1},
                                    dim3{threads, 1, 1}, sizeof(SelectShared), p);
  });
  return {page_table, page_len, page_base, num_pages, num_tokens, chunks, num_chunks};
}

LYCHEE_CUDA_KERNELS(m) { m.impl("select_chunks", TORCH_BOX(&select_chunks_cuda)); }

}  // namespace
}  // namespace lychee::cuda
