// One bug for each tool of compute-sanitizer, to show that it would be reported. The first argument
// names the tool.
#include <cstdio>
#include <cstring>

__global__ void beyond_the_end(int* data, int n) { data[n + threadIdx.x] = 1; }

__global__ void never_written(const int* data, int* sum) { atomicAdd(sum, data[threadIdx.x]); }

__global__ void no_barrier(int* out) {
  __shared__ int value[128];
  value[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = value[127 - threadIdx.x];
}

__global__ void barrier_for_some(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}

int main(int argc, char** argv) {
  const char* tool = argc > 1 ? argv[1] : "";
  int* data = nullptr;
  int* out = nullptr;
  cudaMalloc(&data, 128 * sizeof(int));
  cudaMalloc(&out, 128 * sizeof(int));
  cudaMemset(out, 0, 128 * sizeof(int));
  if (std::strcmp(tool, "memcheck") == 0) {
    beyond_the_end<<<1, 128>>>(data, 1 << 20);
  } else if (std::strcmp(tool, "initcheck") == 0) {
    never_written<<<1, 128>>>(data, out);
  } else if (std::strcmp(tool, "racecheck") == 0) {
    no_barrier<<<1, 128>>>(out);
  } else if (std::strcmp(tool, "synccheck") == 0) {
    barrier_for_some<<<1, 128>>>(out);
  } else {
    std::puts("expected the name of a tool");
    return 2;
  }
  cudaDeviceSynchronize();
  return 0;
}
