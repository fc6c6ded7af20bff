// SPDX-License-Identifier: Apache-2.0
// Every op of the library, one schema per line; devices register their kernels in their own files.
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(lychee, m) {
  m.def("compress_pack(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, int batch, int ratio, Tensor? positions, int pos0) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("compress_pack_bwd(Tensor? grad, Tensor? mem_grad, Tensor? cos, Tensor? sin, int batch, int ratio, Tensor? positions, int pos0, bool memory_only) -> Tensor");
  m.def("compress_pack_(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor(a!) kv, Tensor(b!)? kv_scale, Tensor page_table, Tensor slot0, int batch, int ratio, int layer, Tensor? mem_valid, Tensor? positions, int pos0) -> (Tensor, Tensor, Tensor)");
  m.def("write_memory_(Tensor k, Tensor v, Tensor(a!) kv, Tensor(b!)? kv_scale, Tensor page_table, Tensor slot0, int batch, int layer, Tensor? mem_valid) -> ()");
  m.def("memory_attention(Tensor q, Tensor k, Tensor v, Tensor? kv, Tensor? kv_scale, int layer, Tensor? page_table, Tensor? page_len, Tensor? page_base, Tensor? num_pages, Tensor? valid, Tensor? cos, Tensor? sin, int rope_mode, int query_stride, float softmax_scale) -> (Tensor, Tensor)");
  m.def("memory_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? kv, Tensor? kv_scale, int layer, Tensor? page_table, Tensor? page_len, Tensor? page_base, Tensor? num_pages, Tensor? valid, Tensor? cos, Tensor? sin, int rope_mode, int query_stride, float softmax_scale, bool bank_wanted) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_(Tensor(a!) out, Tensor x, Tensor? norm_weight, float eps, Tensor weight, Tensor? bias, bool add) -> ()");
  m.def("gated_mlp_(Tensor(a!) x, Tensor norm_weight, float eps, Tensor gate, Tensor up, Tensor down) -> ()");
  m.def("select_chunks(Tensor scores, float threshold, int max_chunks, Tensor chunk_pages, Tensor chunk_tokens, int page_tokens) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("gather_chunks(Tensor kv, Tensor? kv_scale, Tensor page_table, Tensor page_len, Tensor? page_base, Tensor num_pages, Tensor? cos, Tensor? sin, int first_layer, int last_layer, int rope_mode, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)");
  m.def("gather_chunks_(Tensor(a!) k, Tensor(b!) v, Tensor kv, Tensor? kv_scale, Tensor page_table, Tensor page_len, Tensor? page_base, Tensor num_pages, Tensor? cos, Tensor? sin, int first_layer, int last_layer, int rope_mode) -> Tensor");
  m.def("gather_chunks_bwd(Tensor dk, Tensor dv, Tensor page_table, Tensor page_len, Tensor? page_base, Tensor num_pages, Tensor? cos, Tensor? sin, SymInt bank_pages, SymInt bank_layers, int first_layer, SymInt page_tokens, int rope_mode, ScalarType bank_dtype) -> Tensor");
  m.def("cpu_isa() -> str");
}
// clang-format on
