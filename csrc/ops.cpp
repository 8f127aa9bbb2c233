// The table of contents: every operator of the library. SPEC: docstrings in hisa/ops.py,
// hisa/paged.py and hisa/around.py.
//
// `.out` writes the same to memory that the caller keeps. Its last arguments are the results; the
// optional one is wanted if it is given.
#include <torch/library.h>

TORCH_LIBRARY(hisa, m) {
  m.def(
      "pool_keys(Tensor k, *, Tensor? k_scale=None, Tensor? cu_seqlens_k=None,"
      " SymInt block_size=128, str pooling=\"mean\") -> (Tensor pooled_k, Tensor pooled_scale)");
  m.def(
      "pool_keys.out(Tensor k, *, Tensor? k_scale=None, Tensor? cu_seqlens_k=None,"
      " SymInt block_size=128, str pooling=\"mean\","
      " Tensor(a!) pooled_k, Tensor(b!) pooled_scale) -> ()");
  m.def(
      "index(Tensor q, Tensor k, Tensor weights, *, Tensor? k_scale=None,"
      " Tensor? ks=None, Tensor? ke=None, Tensor? cu_seqlens_k=None,"
      " Tensor? pooled_k=None, Tensor? pooled_scale=None,"
      " SymInt block_size=128, SymInt block_topk=64, SymInt topk=2048, str pooling=\"mean\","
      " bool return_scores=False) -> (Tensor indices, Tensor scores)");
  m.def(
      "index.out(Tensor q, Tensor k, Tensor weights, *, Tensor? k_scale=None,"
      " Tensor? ks=None, Tensor? ke=None, Tensor? cu_seqlens_k=None,"
      " Tensor? pooled_k=None, Tensor? pooled_scale=None,"
      " SymInt block_size=128, SymInt block_topk=64, SymInt topk=2048, str pooling=\"mean\","
      " Tensor(a!) indices, Tensor(b!)? scores=None) -> ()");
  m.def(
      "flat_index(Tensor q, Tensor k, Tensor weights, *, Tensor? k_scale=None,"
      " Tensor? ks=None, Tensor? ke=None, SymInt topk=2048,"
      " bool return_scores=False) -> (Tensor indices, Tensor scores)");
  m.def(
      "flat_index.out(Tensor q, Tensor k, Tensor weights, *, Tensor? k_scale=None,"
      " Tensor? ks=None, Tensor? ke=None, SymInt topk=2048,"
      " Tensor(a!) indices, Tensor(b!)? scores=None) -> ()");
  m.def(
      "paged_pool(Tensor pages, Tensor(a!) pooled_k, Tensor(b!) pooled_scale, *,"
      " Tensor block_table, Tensor seq_lens, SymInt? new_tokens=1, SymInt block_size=128,"
      " str pooling=\"mean\") -> ()");
  m.def(
      "paged_index(Tensor q, Tensor pages, Tensor weights, *, Tensor block_table, Tensor seq_lens,"
      " Tensor pooled_k, Tensor pooled_scale, SymInt next_n=1, SymInt block_size=128,"
      " SymInt block_topk=64, SymInt topk=2048, bool physical=False,"
      " bool return_scores=False) -> (Tensor indices, Tensor scores)");
  m.def(
      "paged_index.out(Tensor q, Tensor pages, Tensor weights, *, Tensor block_table,"
      " Tensor seq_lens, Tensor pooled_k, Tensor pooled_scale, SymInt next_n=1,"
      " SymInt block_size=128, SymInt block_topk=64, SymInt topk=2048, bool physical=False,"
      " Tensor(a!) indices, Tensor(b!)? scores=None) -> ()");
  m.def("mask_windows(Tensor mask) -> (Tensor ks, Tensor ke, Tensor summary)");
  m.def("mask_windows.out(Tensor mask, *, Tensor(a!) ks, Tensor(b!) ke, Tensor(c!) summary) -> ()");
  m.def(
      "rope_quantize(Tensor x, Tensor? cos=None, Tensor? sin=None, *, SymInt first=0,"
      " bool interleaved=False, bool quantize=False, bool power_of_two=False)"
      " -> (Tensor y, Tensor scale)");
  m.def(
      "rope_quantize.out(Tensor x, Tensor? cos=None, Tensor? sin=None, *, SymInt first=0,"
      " bool interleaved=False, bool power_of_two=False,"
      " Tensor(a!) y, Tensor(b!)? scale=None) -> ()");
  m.def("fold_weights(Tensor weights, Tensor? scale=None, *, float factor=1.0) -> Tensor folded");
  m.def("complete(Tensor(a!) indices, Tensor ks, Tensor ke, *, SymInt keys) -> ()");
}

// Selection has no gradient: outputs of every operator are constants to autograd.
TORCH_LIBRARY_IMPL(hisa, Autograd, m) {
  m.impl("pool_keys", torch::CppFunction::makeFallthrough());
  m.impl("pool_keys.out", torch::CppFunction::makeFallthrough());
  m.impl("index", torch::CppFunction::makeFallthrough());
  m.impl("index.out", torch::CppFunction::makeFallthrough());
  m.impl("flat_index", torch::CppFunction::makeFallthrough());
  m.impl("flat_index.out", torch::CppFunction::makeFallthrough());
  m.impl("paged_pool", torch::CppFunction::makeFallthrough());
  m.impl("paged_index", torch::CppFunction::makeFallthrough());
  m.impl("paged_index.out", torch::CppFunction::makeFallthrough());
  m.impl("mask_windows", torch::CppFunction::makeFallthrough());
  m.impl("mask_windows.out", torch::CppFunction::makeFallthrough());
  m.impl("rope_quantize", torch::CppFunction::makeFallthrough());
  m.impl("rope_quantize.out", torch::CppFunction::makeFallthrough());
  m.impl("complete", torch::CppFunction::makeFallthrough());
}
