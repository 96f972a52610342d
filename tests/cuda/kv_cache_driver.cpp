// tests/cpp/kv_cache_driver.cpp with its keys and values in emulated device memory: the host's manager and the kernels
// of csrc/cuda together, through random appends, forks, copies, truncations and defragmentations.
#define PCM_DEVICE_STORAGE
#include "../cpp/kv_cache_driver.cpp"
