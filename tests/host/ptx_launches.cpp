// From Python: which functions, translated from PTX, run in place of kernels [../cuda_ptx.py].
#include "cuda_runtime.h"

extern "C" {

void secura_run_instead(const void* kernel, void (*function)(const unsigned char* parameters)) {
  const std::lock_guard lock(host::launch_mutex);
  host::translated[kernel] = {function, 0};
}

int secura_launches(const void* kernel) { return host::translated.at(kernel).launches; }

void secura_run_all_themselves() {
  const std::lock_guard lock(host::launch_mutex);
  host::translated.clear();
}
}
