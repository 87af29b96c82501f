// Checks of operator arguments, shared by the CPU and the CUDA bindings. Each throws an error whose message starts with
// the argument's name and says what was expected and what was found.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdio>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "params.h"

namespace vlcache {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Text is put together without streams, which would bring much code and the process's locale.
inline void append(std::string& text, const char* part) { text += part; }
inline void append(std::string& text, const std::string& part) { text += part; }

template <typename Integer, std::enable_if_t<std::is_integral_v<Integer>, bool> = true>
void append(std::string& text, Integer number) {
  text += std::to_string(number);
}

inline void append(std::string& text, double number) {
  char digits[32];
  std::snprintf(digits, sizeof(digits), "%g", number);
  text += digits;
}

// STD_TORCH_CHECK's exception without its prefix, the path of the file on the machine that built the library.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string text;
  (append(text, parts), ...);
  throw std::runtime_error(text);
}

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

inline const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Float8_e4m3fn: return "float8_e4m3fn";
    case ScalarType::Float8_e5m2: return "float8_e5m2";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Byte: return "uint8";
    default: return torch::headeronly::toString(type);
  }
}

// What follows is written out only when a check fails: calls are short, and text takes longer than the checks.

// A list of numbers the way Python prints it.
struct ListText {
  const int64_t* numbers;
  size_t count;
};

template <typename Numbers>
ListText list_text(const Numbers& numbers) {
  return {numbers.data(), numbers.size()};
}

constexpr int64_t kAnySize = std::numeric_limits<int64_t>::min();

inline void append(std::string& text, const ListText& list) {
  text += "[";
  for (size_t i = 0; i < list.count; ++i) {
    if (i > 0) text += ", ";
    text += list.numbers[i] == kAnySize ? "any" : std::to_string(list.numbers[i]);
  }
  text += "]";
}

struct DeviceName {
  const Tensor& tensor;
};

inline void append(std::string& text, const DeviceName& name) {
  if (name.tensor.is_cpu()) {
    text += "cpu";
  } else if (name.tensor.is_cuda()) {
    text += "cuda:" + std::to_string(name.tensor.get_device_index());
  } else {
    text += "another device";
  }
}

inline DeviceName device_name(const Tensor& tensor) { return {tensor}; }

inline void require_type(const Tensor& tensor, const std::string& name, ScalarType wanted) {
  require(tensor.scalar_type() == wanted, name, ": expected ", type_name(wanted), ", found ",
          type_name(tensor.scalar_type()));
}

// A type that entries, queries and pages may have.
inline Type require_float(const Tensor& tensor, const std::string& name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::kFloat32;
    case ScalarType::BFloat16: return Type::kBFloat16;
    case ScalarType::Half: return Type::kFloat16;
    case ScalarType::Float8_e4m3fn: return Type::kFloat8E4M3;
    case ScalarType::Float8_e5m2: return Type::kFloat8E5M2;
    default:
      fail(name, ": expected float32, bfloat16, float16, float8_e4m3fn or float8_e5m2, found ",
           type_name(tensor.scalar_type()));
  }
}

// kAnySize in `wanted` accepts any size of that dimension.
inline void require_shape(const Tensor& tensor, const std::string& name, const std::vector<int64_t>& wanted) {
  const auto found = tensor.sizes();
  bool same = found.size() == wanted.size();
  for (size_t i = 0; same && i < wanted.size(); ++i) same = wanted[i] == kAnySize || found[i] == wanted[i];
  require(same, name, ": expected shape ", list_text(wanted), ", found ", list_text(found));
}

inline void require_contiguous(const Tensor& tensor, const std::string& name) {
  require(tensor.is_contiguous(), name, ": expected a contiguous tensor, found strides ",
          list_text(tensor.strides()), " for shape ", list_text(tensor.sizes()));
}

inline void require_dense_rows(const Tensor& tensor, const std::string& name) {
  const int64_t last = tensor.dim() - 1;
  require(tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
          ": expected a last dimension of stride 1, found stride ", tensor.stride(last));
}

// On the CPU, or on the same CUDA device as `other`.
inline void require_device(const Tensor& tensor, const std::string& name, const Tensor& other,
                           const std::string& other_name) {
  const bool same = (tensor.is_cpu() && other.is_cpu()) ||
                    (tensor.is_cuda() && other.is_cuda() && tensor.get_device_index() == other.get_device_index());
  require(same, name, ": expected on ", device_name(other), " like ", other_name, ", found on ", device_name(tensor));
}

// A small dense tensor whose elements the kernel reads in order.
inline void require_vector(const Tensor& tensor, const std::string& name, ScalarType type,
                           const std::vector<int64_t>& shape, const Tensor& other, const std::string& other_name) {
  require_type(tensor, name, type);
  require_shape(tensor, name, shape);
  require_contiguous(tensor, name);
  require_device(tensor, name, other, other_name);
}

// Elements from the first of a block to its last.
inline int64_t last_element_of_block(const Tensor& cache) {
  int64_t last = 0;
  for (int64_t i = 1; i < cache.dim(); ++i) {
    if (cache.size(i) == 0) return -1;
    last += (cache.size(i) - 1) * cache.stride(i);
  }
  return last;
}

// Where (K or V, token, head, dim) of a block lies: strides or an order table, as in `PageLayout` of ops.py. The
// strides are checked against the memory of a block of `cache`; the values of a table only by `require_order_in_block`.
inline PageLayout require_layout(const Tensor& cache, const std::string& cache_name, int64_t heads, int64_t dim,
                                 int64_t block_size, const std::vector<int64_t>& layout,
                                 const std::optional<Tensor>& order) {
  require(cache.dim() >= 1, cache_name, ": expected at least one dimension (blocks), found none");
  require(block_size >= 1 && block_size <= std::numeric_limits<int32_t>::max(),
          "block_size: expected 1 to 2147483647, found ", block_size);
  PageLayout pages{};
  pages.block_size = block_size;
  pages.block_stride = cache.stride(0);
  pages.heads = heads;
  pages.dim = dim;
  __extension__ using Wide = __int128;  // no product of what a caller may send overflows
  if (order.has_value()) {
    require(layout.empty(), "layout: expected no strides beside an order table, found ", list_text(layout));
    const Wide count = Wide(2) * block_size * heads * dim;
    require(count <= std::numeric_limits<int64_t>::max(), "block_size: expected a table that fits, found ", block_size);
    require_vector(*order, "order", ScalarType::Int, {static_cast<int64_t>(count)}, cache, cache_name);
    pages.order = static_cast<const int32_t*>(order->const_data_ptr());
    return pages;
  }
  require(layout.size() == 8, "layout: expected 8 numbers (origin and strides of token, head, dim; of K, then of V)",
          ", found ", layout.size());
  const int64_t end = last_element_of_block(cache);
  for (int kv = 0; kv < 2; ++kv) {
    const int64_t* numbers = layout.data() + 4 * kv;
    pages.halves[kv] = {numbers[0], numbers[1], numbers[2], numbers[3]};
    if (heads == 0 || dim == 0) continue;
    Wide first = numbers[0], last = numbers[0];
    for (const Wide span : {Wide(numbers[1]) * (block_size - 1), Wide(numbers[2]) * (heads - 1),
                            Wide(numbers[3]) * (dim - 1)}) {
      (span < 0 ? first : last) += span;
    }
    require(first >= 0 && last <= end, "layout: expected elements 0 to ", end, " of a block of ", cache_name,
            ", found one that reaches outside (", list_text(layout), " for block_size ", block_size, ", ", heads,
            " heads of ", dim, ")");
  }
  return pages;
}

// Of a table in host memory only.
inline void require_order_in_block(const PageLayout& pages, const Tensor& cache) {
  if (pages.order == nullptr) return;
  const int64_t count = 2 * pages.block_size * pages.heads * pages.dim;
  int32_t smallest = 0, largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    smallest = pages.order[i] < smallest ? pages.order[i] : smallest;
    largest = pages.order[i] > largest ? pages.order[i] : largest;
  }
  const int64_t end = last_element_of_block(cache);
  require(smallest >= 0 && largest <= end, "order: expected 0 to ", end, ", found ", smallest < 0 ? smallest : largest);
}

}  // namespace vlcache
