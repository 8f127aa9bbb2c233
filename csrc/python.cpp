// The Python module hisa._C: importing it registers the operators; what is not an operator is here.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "checks.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"
#include "interrupt.h"
#include "plan.h"
#include "support.h"
#include "text.h"

namespace hisa {

InterruptHooks& interrupt_hooks() {
  static InterruptHooks hooks;
  return hooks;
}

namespace {

namespace py = pybind11;
using namespace py::literals;

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const char* const* name = cpu::available_isas(); *name != nullptr; ++name)
    names.emplace_back(*name);
  return names;
}

py::dict build_info() {
#ifdef HISA_WITH_CUDA
  const bool cuda = true;
#else
  const bool cuda = false;
#endif
#ifdef HISA_SM90
  const bool hopper = true;
#else
  const bool hopper = false;
#endif
  return py::dict(
      "cuda"_a = cuda, "hopper"_a = hopper, "compiler"_a = __VERSION__, "torch"_a = TORCH_VERSION,
      "cpu_isa"_a = cpu::kernels().name, "cpu_isa_available"_a = available_isas(),
      "block_sizes"_a = support::kBlockSizes, "page_sizes"_a = support::kPageSizes,
      "max_heads"_a = support::kMaxHeads, "dim_step"_a = support::kDimStep,
      "max_dim"_a = support::kMaxDim, "min_block_topk"_a = support::kMinBlockTopk,
      "dtypes"_a = py::make_tuple(at::kFloat, at::kBFloat16, at::kHalf, at::kFloat8_e4m3fn),
      "mask_dtypes"_a =
          py::make_tuple(at::kBool, at::kHalf, at::kBFloat16, at::kFloat, at::kDouble));
}

void set_cpu_isa(const std::string& name) {
  std::string known = "\"auto\"";
  for (const std::string& isa : available_isas()) known += join(", \"", isa, "\"");
  TORCH_CHECK_VALUE(cpu::set_isa(name.c_str()),
                    join("cpu_isa: expected one of ", known, ", got \"", name, "\""));
}

py::dict plan(bool cuda, int64_t rows, int64_t keys, int64_t heads, int64_t dim,
              at::ScalarType dtype, int64_t topk, bool flat, int64_t block_size, int64_t block_topk,
              bool pooled, bool causal, int64_t threads) {
  TORCH_CHECK_VALUE(rows >= 0 && rows <= support::kMaxRows,
                    join("M: expected 0 to ", support::kMaxRows, ", got ", rows));
  check_sizes(heads, dim, keys);
  flat ? check_topk(topk) : check_block_sizes(block_size, block_topk, topk);
  const Shape shape{.rows = rows,
                    .keys = keys,
                    .heads = heads,
                    .dim = dim,
                    .type = element_type(dtype),
                    .topk = topk,
                    .block_size = flat ? 0 : block_size,
                    .block_topk = flat ? 0 : block_topk,
                    .pooled = pooled};
  const CallPlan call = cuda ? plan_cuda(shape) : plan_cpu(shape, threads);
  return py::dict("kernels"_a = call.kernels, "workspace"_a = call.workspace,
                  "keys"_a = count_keys(shape, causal));
}

// Expose the checks of the operators without running them.
void check_index(const at::Tensor& q, const at::Tensor& k, const at::Tensor& weights,
                 const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& ks,
                 const std::optional<at::Tensor>& ke, const std::optional<at::Tensor>& cu_seqlens_k,
                 const std::optional<at::Tensor>& pooled_k,
                 const std::optional<at::Tensor>& pooled_scale, int64_t block_size,
                 int64_t block_topk, int64_t topk, const std::string& pooling) {
  check(IndexArguments{q, k, weights, k_scale, ks, ke, cu_seqlens_k, pooled_k, pooled_scale,
                       block_size, block_topk, topk, pooling});
}

void check_flat_index(const at::Tensor& q, const at::Tensor& k, const at::Tensor& weights,
                      const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& ks,
                      const std::optional<at::Tensor>& ke, int64_t topk) {
  check(FlatArguments{q, k, weights, k_scale, ks, ke, topk});
}

void check_paged_pool(const at::Tensor& pages, const at::Tensor& pooled_k,
                      const at::Tensor& pooled_scale, const at::Tensor& block_table,
                      const at::Tensor& seq_lens, std::optional<int64_t> new_tokens,
                      int64_t block_size, const std::string& pooling) {
  check(PagedPoolArguments{pages, pooled_k, pooled_scale, block_table, seq_lens, new_tokens,
                           block_size, pooling});
}

void check_paged_index(const at::Tensor& q, const at::Tensor& pages, const at::Tensor& weights,
                       const at::Tensor& block_table, const at::Tensor& seq_lens,
                       const at::Tensor& pooled_k, const at::Tensor& pooled_scale, int64_t next_n,
                       int64_t block_size, int64_t block_topk, int64_t topk, bool physical) {
  check(PagedIndexArguments{q, pages, weights, block_table, seq_lens, pooled_k, pooled_scale,
                            next_n, block_size, block_topk, topk, physical});
}

unsigned long main_thread = 0;  // the only one on which Python runs signal handlers

bool signal_pending() {
  if (PyThread_get_thread_ident() != main_thread) return false;
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;
}

void raise_signal() {
  const py::gil_scoped_acquire gil;
  throw py::error_already_set();
}

}  // namespace
}  // namespace hisa

PYBIND11_MODULE(_C, m) {
  hisa::main_thread =
      py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  hisa::interrupt_hooks() = {&hisa::signal_pending, &hisa::raise_signal};
  m.def("build_info", &hisa::build_info);
  m.def("set_cpu_isa", &hisa::set_cpu_isa);
  m.def("set_cpu_parts", &hisa::cpu::set_parts);
  m.def("use_kernels", &hisa::use_kernels, py::arg("hopper") = true, py::arg("split") = true);
  m.def("plan", &hisa::plan);
  m.def("check_index", &hisa::check_index);
  m.def("check_flat_index", &hisa::check_flat_index);
  m.def("check_paged_pool", &hisa::check_paged_pool);
  m.def("check_paged_index", &hisa::check_paged_index);
  m.def("check_sizes", &hisa::check_sizes);
  m.def("check_dim", &hisa::check_dim);
  m.def("check_topk", &hisa::check_topk);
  m.def("check_block_sizes", &hisa::check_block_sizes);
  m.def("check_pooling", [](const std::string& name) { hisa::parse_pooling(name); });
}
