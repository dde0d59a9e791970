// The passes as torch ops, through PyTorch's stable ABI: a library built once serves every later
// torch. Outputs are given by the caller, and so is the stream: nothing here links to torch's CUDA
// library. The schemas are repeated, and checked on loading, in secura_kernels/backends/cuda/library.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "passes.h"

// The tests register the same ops for the CPU, where they run the kernels on a simulated GPU.
#ifndef SECURA_DISPATCH_KEY
#define SECURA_DISPATCH_KEY CUDA
#endif

namespace {

// Which sources these are: found in the file before it is loaded (secura_kernels/backends/cuda/compiler.py).
#define SECURA_TEXT_OF(word) #word
#define SECURA_TEXT(macro) SECURA_TEXT_OF(macro)
[[gnu::used]] const char sources[] = "secura_cuda sources " SECURA_TEXT(SECURA_SOURCES);

using namespace secura;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::string shape_of(const Tensor& tensor) {
  std::string text = "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + ")";
}

Dtype dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " has dtype number ", static_cast<int>(tensor.scalar_type()),
                  "; allowed: float32, bfloat16, float16");
}

ScalarType scalar_type(Dtype dtype) {
  return dtype == Dtype::float32    ? ScalarType::Float
         : dtype == Dtype::bfloat16 ? ScalarType::BFloat16
                                    : ScalarType::Half;
}

void check_dtype(const Tensor& tensor, const char* name, ScalarType wanted) {
  STD_TORCH_CHECK(tensor.scalar_type() == wanted, name, " has dtype number ",
                  static_cast<int>(tensor.scalar_type()), "; needed: ", static_cast<int>(wanted));
}

int as_int(int64_t size, const char* name) {
  STD_TORCH_CHECK(size <= std::numeric_limits<int>::max(), name, " has a dimension of ", size,
                  "; allowed: less than 2**31");
  return static_cast<int>(size);
}

Matrix matrix(const Tensor& tensor, const char* name, ScalarType type) {
  check_dtype(tensor, name, type);
  STD_TORCH_CHECK(tensor.dim() == 2, name, " has shape ", shape_of(tensor), "; needed: a matrix");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1),
          as_int(tensor.size(0), name), as_int(tensor.size(1), name)};
}

// A contiguous tensor of exactly `count` elements.
void* contiguous(const Tensor& tensor, const char* name, ScalarType type, int64_t count) {
  check_dtype(tensor, name, type);
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count, name, " of shape ",
                  shape_of(tensor), " is not contiguous with ", count, " elements");
  return tensor.mutable_data_ptr();
}

template <typename T = void>
T* contiguous(const OptionalTensor& tensor, const char* name, ScalarType type, int64_t count) {
  return tensor ? static_cast<T*>(contiguous(*tensor, name, type, count)) : nullptr;
}

Gate gate_of(const std::vector<double>& numbers) {
  if (numbers.empty()) {
    return {false, 0, 0, 1, 1, 2, 1, 0, 1, 1};
  }
  STD_TORCH_CHECK(numbers.size() == 7, "gate has ", numbers.size(),
                  " numbers; needed: slope, offset, eps, beta, top, code_steps, code_low");
  const auto number = [&](int i) { return static_cast<float>(numbers[i]); };
  return {true,      number(0), number(1), number(2),        number(3),
          number(4), number(5), number(6), 1.0f / number(3), 1.0f / number(5)};
}

// The padded rank, as every pass takes it: the columns of a factor or of q.
int padded_of(const Tensor& tensor, const char* name, int64_t r = 1) {
  const int64_t padded = tensor.size(1);
  STD_TORCH_CHECK(padded % 16 == 0 && r <= padded && padded <= LARGEST_RANK, name, " of shape ",
                  shape_of(tensor), " must have a multiple of 16 columns, from ", r, " to ",
                  LARGEST_RANK);
  return static_cast<int>(padded);
}

ScalarType code_type(Dtype dtype) {
  return dtype == Dtype::float32    ? ScalarType::Float
         : dtype == Dtype::bfloat16 ? ScalarType::Byte
                                    : ScalarType::Short;
}

Finish finish_of(const OptionalTensor& adapter_bias, const OptionalTensor& decay,
                 const std::vector<double>& gate, const OptionalTensor& saved,
                 const OptionalTensor& moved, double edge, Dtype dtype, int64_t M, int64_t N) {
  return {contiguous<const float>(adapter_bias, "adapter_bias", ScalarType::Float, N),
          contiguous<const float>(decay, "decay", ScalarType::Float, N),
          gate_of(gate),
          contiguous(saved, "saved", code_type(dtype), M * N),
          contiguous<unsigned long long>(moved, "moved", ScalarType::Long, 1),
          static_cast<float>(edge)};
}

Launch where(Dtype dtype, int64_t stream) {
  return {dtype, reinterpret_cast<cudaStream_t>(stream)};
}

// The tensor names the device, which is current.
void probe_op(const Tensor&, int64_t) { probe(); }

void gather_op(const Tensor& from, const OptionalTensor& index, const Tensor& factor,
               int64_t stream) {
  const Dtype dtype = dtype_of(from, "matrix");
  Gather p = {};
  p.matrix = matrix(from, "matrix", scalar_type(dtype));
  p.r = as_int(index ? index->numel() : from.size(1), "index");
  p.index = contiguous<const int64_t>(index, "index", ScalarType::Long, p.r);
  p.padded = padded_of(factor, "factor", p.r);
  p.factor = contiguous(factor, "factor", scalar_type(dtype), from.size(0) * p.padded);
  gather(p, where(dtype, stream));
}

// The number of parts (parts, M, r) that a sum comes in: 1 without them.
int parts_of(const OptionalTensor& part) {
  return part ? as_int(part->size(0), "part") : 1;
}

void down_op(const Tensor& a, const Tensor& factor, const Tensor& core, double alpha,
             const Tensor& p_out, const Tensor& q_out, const OptionalTensor& part,
             const OptionalTensor& task_gate, const OptionalTensor& t, int64_t stream) {
  const Dtype dtype = dtype_of(a, "a");
  const ScalarType type = scalar_type(dtype);
  const int64_t M = a.size(0);
  const int padded = padded_of(factor, "factor", core.size(0));
  Down p = {};
  p.a = matrix(a, "a", type);
  p.factor = contiguous(factor, "factor", type, a.size(1) * padded);
  p.core = matrix(core, "core", ScalarType::Float);
  p.r = p.core.rows;
  p.padded = padded;
  p.alpha = static_cast<float>(alpha);
  p.p_float32 = p_out.scalar_type() == ScalarType::Float;
  p.p = contiguous(p_out, "p", p.p_float32 ? ScalarType::Float : type, M * p.r);
  p.q = contiguous(q_out, "q", type, M * padded);
  p.parts = parts_of(part);
  p.part = contiguous<float>(part, "part", ScalarType::Float, p.parts * M * p.r);
  p.task_gate = contiguous<const float>(task_gate, "task_gate", ScalarType::Float, 2 * p.r);
  p.t = contiguous(t, "t", type, M * p.r);
  STD_TORCH_CHECK(!t || task_gate, "t needs task_gate");
  down(p, where(dtype, stream));
}

void project_op(const Tensor& a, const OptionalTensor& index, const Tensor& core, double alpha,
                const Tensor& p_out, const Tensor& q_out, const OptionalTensor& task_gate,
                int64_t stream) {
  const Dtype dtype = dtype_of(a, "a");
  const ScalarType type = scalar_type(dtype);
  const int64_t M = a.size(0);
  const int padded = padded_of(q_out, "q", core.size(0));
  Project p = {};
  p.a = matrix(a, "a", type);
  p.core = matrix(core, "core", ScalarType::Float);
  p.r = p.core.rows;
  p.index = contiguous<const int64_t>(index, "index", ScalarType::Long, p.r);
  p.padded = padded;
  p.alpha = static_cast<float>(alpha);
  p.p = contiguous(p_out, "p", type, M * p.r);
  p.q_float32 = q_out.scalar_type() == ScalarType::Float;
  p.q = contiguous(q_out, "q", p.q_float32 ? ScalarType::Float : type, M * padded);
  p.task_gate = contiguous<const float>(task_gate, "task_gate", ScalarType::Float, 2 * p.r);
  project(p, where(dtype, stream));
}

void product_op(const Tensor& a, const Tensor& b, const Tensor& h, const Tensor& factor,
                const OptionalTensor& bias, const OptionalTensor& adapter_bias,
                const OptionalTensor& decay, const std::vector<double>& gate,
                const Tensor& y, const OptionalTensor& saved, const OptionalTensor& moved, double edge, int64_t stream) {
  const Dtype dtype = dtype_of(a, "a");
  const ScalarType type = scalar_type(dtype);
  const int64_t M = a.size(0), N = b.size(0);
  const int padded = padded_of(factor, "factor");
  Product p = {};
  p.a = matrix(a, "a", type);
  p.b = matrix(b, "b", type);
  STD_TORCH_CHECK(p.a.columns == p.b.columns, "a of shape ", shape_of(a), " and b of shape ",
                  shape_of(b), " have no product a b^T");
  p.h = contiguous(h, "h", type, M * padded);
  p.factor = contiguous(factor, "factor", type, N * padded);
  p.padded = padded;
  p.bias = contiguous(bias, "bias", type, N);
  p.finish = finish_of(adapter_bias, decay, gate, saved, moved, edge, dtype, M, N);
  p.y = contiguous(y, "y", type, M * N);
  product(p, where(dtype, stream));
}

void epilogue_op(const Tensor& y, const Tensor& h, const Tensor& factor,
                 const OptionalTensor& adapter_bias, const OptionalTensor& decay,
                 const std::vector<double>& gate, const OptionalTensor& saved,
                 const OptionalTensor& moved, double edge, const OptionalTensor& largest,
                 bool find_largest, int64_t stream) {
  const Dtype dtype = dtype_of(y, "y");
  const ScalarType type = scalar_type(dtype);
  const int64_t M = y.size(0), N = y.size(1);
  const int padded = padded_of(factor, "factor");
  Epilogue p = {};
  p.y = contiguous(y, "y", type, M * N);
  p.M = as_int(M, "y");
  p.N = as_int(N, "y");
  p.h = contiguous(h, "h", type, M * padded);
  p.factor = contiguous(factor, "factor", type, N * padded);
  p.padded = padded;
  p.finish = finish_of(adapter_bias, decay, gate, saved, moved, edge, dtype, M, N);
  p.largest = contiguous<int>(largest, "largest", ScalarType::Int, 1);
  p.find_largest = find_largest;
  epilogue(p, where(dtype, stream));
}

void gate_backward_op(const Tensor& dy, const Tensor& saved, const Tensor& factor,
                      const OptionalTensor& rows, const Tensor& core, double alpha,
                      const OptionalTensor& decay, const std::vector<double>& gate,
                      const OptionalTensor& g, const OptionalTensor& v, const OptionalTensor& q,
                      const OptionalTensor& bias_part, const OptionalTensor& v_part,
                      int64_t stream) {
  const Dtype dtype = dtype_of(dy, "dy");
  const ScalarType type = scalar_type(dtype), wide = ScalarType::Float;
  const int64_t M = dy.size(0), N = dy.size(1);
  const int padded = padded_of(factor, "factor", core.size(0));
  const int64_t programs = (M + ROWS_PER_PROGRAM - 1) / ROWS_PER_PROGRAM;
  GateBackward p = {};
  p.dy = matrix(dy, "dy", type);
  p.saved = contiguous(saved, "saved", code_type(dtype), M * N);
  p.factor = contiguous(factor, "factor", type, N * padded);
  p.core = matrix(core, "core", wide);
  p.r = p.core.rows;
  p.padded = padded;
  p.rows = contiguous<const int64_t>(rows, "rows", ScalarType::Long, p.r);
  p.alpha = static_cast<float>(alpha);
  p.decay = contiguous<const float>(decay, "decay", wide, N);
  p.gate = gate_of(gate);
  p.g = contiguous(g, "g", type, M * N);
  p.v = contiguous<float>(v, "v", wide, M * p.r);
  p.q = contiguous(q, "q", type, M * padded);
  p.bias_part = contiguous<float>(bias_part, "bias_part", wide, BIAS_PARTS * programs * N);
  p.parts = parts_of(v_part);
  p.v_part = contiguous<float>(v_part, "v_part", wide, p.parts * M * p.r);
  STD_TORCH_CHECK(!v_part || v, "v_part needs v");
  gate_backward(p, where(dtype, stream));
}

void core_gradient_op(const Tensor& v, const Tensor& t, double alpha, const Tensor& part,
                      int64_t stream) {
  const int64_t M = v.size(0), r = v.size(1);
  const Dtype dtype = dtype_of(t, "t");
  CoreGradient p = {};
  p.v = matrix(v, "v", ScalarType::Float);
  p.t = matrix(t, "t", scalar_type(dtype));
  p.alpha = static_cast<float>(alpha);
  p.part = static_cast<float*>(contiguous(part, "part", ScalarType::Float,
                                          (M + ROWS_PER_PART - 1) / ROWS_PER_PART * r * r));
  core_gradient(p, where(dtype, stream));
}

WeightChange change_of(const Tensor& weight, const Tensor& P, const Tensor& factor,
                       const OptionalTensor& decay, const std::vector<double>& gate,
                       Dtype dtype) {
  const int64_t N = weight.size(0), K = weight.size(1);
  const int padded = padded_of(factor, "factor");
  const auto* p = static_cast<const float*>(contiguous(P, "P", ScalarType::Float, N * padded));
  const void* r = contiguous(factor, "factor", scalar_type(dtype), K * padded);
  STD_TORCH_CHECK((reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(r)) % 16 == 0,
                  "P and factor must begin on 16 bytes");
  return {matrix(weight, "weight", scalar_type(dtype)),
          p,
          r,
          padded,
          contiguous<const float>(decay, "decay", ScalarType::Float, N),
          gate_of(gate)};
}

void effective_weight_op(const Tensor& weight, const Tensor& P, const Tensor& factor,
                         const OptionalTensor& decay, const std::vector<double>& gate,
                         const OptionalTensor& out, const OptionalTensor& moved, double edge,
                         const OptionalTensor& largest, bool find_largest, int64_t stream) {
  const Dtype dtype = dtype_of(weight, "weight");
  EffectiveWeight p = {};
  p.change = change_of(weight, P, factor, decay, gate, dtype);
  p.out = contiguous(out, "out", scalar_type(dtype), weight.numel());
  p.moved = contiguous<unsigned long long>(moved, "moved", ScalarType::Long, 1);
  p.edge = static_cast<float>(edge);
  p.largest = contiguous<int>(largest, "largest", ScalarType::Int, 1);
  p.find_largest = find_largest;
  effective_weight(p, where(dtype, stream));
}

void decode_op(const Tensor& x, const Tensor& weight, const Tensor& P, const Tensor& factor,
               const OptionalTensor& decay, const std::vector<double>& gate,
               const OptionalTensor& largest, const Tensor& part, int64_t stream) {
  const Dtype dtype = dtype_of(x, "x");
  Decode p = {};
  p.x = matrix(x, "x", scalar_type(dtype));
  STD_TORCH_CHECK(p.x.rows <= MOST_TOKENS, "x of shape ", shape_of(x), " has more than ",
                  MOST_TOKENS, " tokens");
  p.change = change_of(weight, P, factor, decay, gate, dtype);
  p.largest = contiguous<const int>(largest, "largest", ScalarType::Int, 1);
  p.groups = as_int(part.size(0), "part");
  p.part = static_cast<float*>(contiguous(part, "part", ScalarType::Float,
                                          p.groups * x.size(0) * weight.size(0)));
  decode(p, where(dtype, stream));
}

void weight_core_gradient_op(const Tensor& dy, const Tensor& x, const Tensor& weight,
                             const Tensor& P, const Tensor& factor, const OptionalTensor& decay,
                             const std::vector<double>& gate, const OptionalTensor& largest,
                             const Tensor& q, int64_t stream) {
  const Dtype dtype = dtype_of(dy, "dy");
  WeightCoreGradient p = {};
  p.dy = matrix(dy, "dy", scalar_type(dtype));
  p.x = matrix(x, "x", scalar_type(dtype));
  p.change = change_of(weight, P, factor, decay, gate, dtype);
  p.largest = contiguous<const int>(largest, "largest", ScalarType::Int, 1);
  p.groups = as_int(q.size(0), "q");
  p.q = static_cast<float*>(contiguous(q, "q", ScalarType::Float,
                                       int64_t{p.groups} * weight.size(0) * factor.size(1)));
  weight_core_gradient(p, where(dtype, stream));
}

}  // namespace

STABLE_TORCH_LIBRARY(secura_cuda, m) {
  m.def("probe(Tensor like, int stream) -> ()");
  m.def("gather(Tensor matrix, Tensor? index, Tensor(a!) factor, int stream) -> ()");
  m.def(
      "down(Tensor a, Tensor factor, Tensor core, float alpha, Tensor(a!) p, Tensor(b!) q, "
      "Tensor(c!)? part, Tensor? task_gate, Tensor? t, int stream) -> ()");
  m.def(
      "project(Tensor a, Tensor? index, Tensor core, float alpha, Tensor(a!) p, Tensor(b!) q, "
      "Tensor? task_gate, int stream) -> ()");
  m.def(
      "product(Tensor a, Tensor b, Tensor h, Tensor factor, Tensor? bias, Tensor? adapter_bias, "
      "Tensor? decay, float[] gate, Tensor(a!) y, Tensor(b!)? saved, "
      "Tensor(c!)? moved, float edge, int stream) -> ()");
  m.def(
      "epilogue(Tensor(a!) y, Tensor h, Tensor factor, Tensor? adapter_bias, Tensor? decay, "
      "float[] gate, Tensor(b!)? saved, Tensor(c!)? moved, float edge, "
      "Tensor(d!)? largest, bool find_largest, int stream) -> ()");
  m.def(
      "gate_backward(Tensor dy, Tensor saved, Tensor factor, Tensor? rows, Tensor core, "
      "float alpha, Tensor? decay, float[] gate, Tensor(a!)? g, Tensor(b!)? v, Tensor(c!)? q, "
      "Tensor(d!)? bias_part, Tensor(e!)? v_part, int stream) -> ()");
  m.def(
      "core_gradient(Tensor v, Tensor t, float alpha, Tensor(a!) part, int stream) -> ()");
  m.def(
      "effective_weight(Tensor weight, Tensor P, Tensor factor, Tensor? decay, float[] gate, "
      "Tensor(a!)? out, Tensor(b!)? moved, float edge, Tensor(c!)? largest, bool find_largest, "
      "int stream) -> ()");
  m.def(
      "decode(Tensor x, Tensor weight, Tensor P, Tensor factor, Tensor? decay, float[] gate, "
      "Tensor? largest, Tensor(a!) part, int stream) -> ()");
  m.def(
      "weight_core_gradient(Tensor dy, Tensor x, Tensor weight, Tensor P, Tensor factor, "
      "Tensor? decay, float[] gate, Tensor? largest, Tensor(a!) q, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(secura_cuda, SECURA_DISPATCH_KEY, m) {
  m.impl("probe", TORCH_BOX(&probe_op));
  m.impl("gather", TORCH_BOX(&gather_op));
  m.impl("down", TORCH_BOX(&down_op));
  m.impl("project", TORCH_BOX(&project_op));
  m.impl("product", TORCH_BOX(&product_op));
  m.impl("epilogue", TORCH_BOX(&epilogue_op));
  m.impl("gate_backward", TORCH_BOX(&gate_backward_op));
  m.impl("core_gradient", TORCH_BOX(&core_gradient_op));
  m.impl("effective_weight", TORCH_BOX(&effective_weight_op));
  m.impl("decode", TORCH_BOX(&decode_op));
  m.impl("weight_core_gradient", TORCH_BOX(&weight_core_gradient_op));
}
