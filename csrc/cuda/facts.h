// What a kernel says of itself: its constants and the layout of its arguments, as text made at compile time. It stands in
// the kernel's registration, where Python reads it, and in the PTX, where the tests do: neither is told twice.
#pragma once

#include <type_traits>

namespace mixpert {

// A CUtensorMap, whose own alignment differs between versions of CUDA.
struct alignas(64) TensorMap {
  char bytes[128];
};

struct Facts {
  static constexpr int kCapacity = 1536;
  char text[kCapacity] = {};
  int size = 0;

  constexpr void add(const char* word) {
    while (*word) text[size++] = *word++;  // past the capacity it is no constant expression: a compile-time error
  }
  constexpr void add(int number) {
    if (number >= 10) add(number / 10);
    text[size++] = char('0' + number % 10);
  }
  // "block_m=128;"
  constexpr void constant(const char* name, int value) {
    add(name), add("="), add(value), add(";");
  }
  // "P x;": the codes are those of Python's struct module, and T for a tensor map.
  template <typename T>
  constexpr void field(const char* name) {
    if constexpr (std::is_pointer_v<T>) add("P ");
    else if constexpr (std::is_same_v<T, int>) add("i ");
    else if constexpr (std::is_same_v<T, long long>) add("q ");
    else if constexpr (std::is_same_v<T, float>) add("f ");
    else if constexpr (std::is_same_v<T, TensorMap>) add("T ");
    else static_assert(!sizeof(T), "a kernel's argument is a pointer, int, long long, float or TensorMap");
    add(name), add(";");
  }
};

template <class Config, class Args>
constexpr Facts facts() {
  Facts made;
  made.constant("threads", Config::kThreads);
  made.constant("shared_bytes", Config::kSharedBytes);
  Config::constants(made);
  Args::fields(made);
  return made;
}

}  // namespace mixpert
