"""The CPU's stand-in for a GPU does what a GPU does, and says what a GPU would not survive."""

import numpy as np
import pytest

import cuda_host

pytestmark = pytest.mark.skipif(bool(cuda_host.missing()), reason=cuda_host.missing())

KERNELS = r"""
template <typename Real, int THREADS>
__global__ void __launch_bounds__(THREADS) sum_rows(const Real* rows, Real* sums, int64_t size, bool* all) {
  __shared__ Real of_warp[THREADS / 32];
  Real sum = 0;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) sum += rows[blockIdx.x * size + i];
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < THREADS / 32 ? of_warp[threadIdx.x] : Real(0);
    for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lanes);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  }
  __syncthreads();
  bool positive = __all_sync(0xffffffffu, sums[blockIdx.x] > 0);
  if (threadIdx.x == 0) all[blockIdx.x] = positive;
}

template <typename Real>
__global__ void reversed(const Real* from, Real* to) {
  extern __shared__ Real buffer[];
  buffer[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  to[blockIdx.x * blockDim.x + threadIdx.x] = buffer[blockDim.x - 1 - threadIdx.x];
}

__global__ void each_intrinsic(int* out) {
  const int lane = threadIdx.x % 32;
  int* mine = out + threadIdx.x * 8;
  mine[0] = __shfl_sync(0xffffffffu, lane, 5);
  mine[1] = __shfl_sync(0xffffffffu, lane, 5, 8);
  mine[2] = __shfl_up_sync(0xffffffffu, lane, 3);
  mine[3] = __shfl_down_sync(0xffffffffu, lane, 3, 8);
  mine[4] = __shfl_xor_sync(0xffffffffu, lane, 9);
  mine[5] = __popc(__ballot_sync(0xffffffffu, lane % 3 == 0));
  mine[6] = __any_sync(0xffffffffu, lane == 31) + 2 * __all_sync(0xffffffffu, lane < 31);
  if (lane < 16) mine[7] = __shfl_xor_sync(0x0000ffffu, lane, 1);  // half a warp, while the other half goes on
  else mine[7] = -1;
  __syncwarp();
}

__global__ void barrier_for_some() { if (threadIdx.x < 40) __syncthreads(); }

__global__ void different_barriers() {
  if (threadIdx.x < 32) __syncthreads();
  else
    __syncthreads();
}

__global__ void shuffle_of_those_who_left(int* out) {
  if (threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1, 1);
}

__global__ void barrier_against_shuffle(int* out) {
  if (threadIdx.x == 3) __syncthreads();
  else
    out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1, 1);
}

__global__ void lane_beyond_the_mask(int* out) { out[threadIdx.x] = __shfl_xor_sync(1u << threadIdx.x, 1, 1); }

__global__ void half_a_warp(int* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1); }

__global__ void uninitialised(float* out) {
  __shared__ float sum[32];
  if (blockIdx.x == 0) sum[threadIdx.x % 32] = 1;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum[threadIdx.x % 32];
}

template <bool UP>
__global__ void neighbour_without_a_barrier(float* out) {
  __shared__ float numbers[65];
  numbers[threadIdx.x] = 1;
  out[blockIdx.x * 64 + threadIdx.x] = numbers[UP ? (threadIdx.x + 1) % 64 : (threadIdx.x + 63) % 64];
}

__global__ void misaligned(uint4* to) { to[0] = uint4{1, 2, 3, 4}; }

__global__ void beyond_an_array(int* to, int at) {
  int local[4] = {1, 2, 3, 4};
  to[0] = local[at];
}

__global__ void grid_of_three_axes(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1 + thread;
}
"""

SIMPLE = (
    *("each_intrinsic", "barrier_for_some", "different_barriers", "shuffle_of_those_who_left"),
    *("barrier_against_shuffle", "lane_beyond_the_mask", "half_a_warp", "uninitialised", "misaligned"),
    *("beyond_an_array", "grid_of_three_axes"),
    *(f"neighbour_without_a_barrier<{up}>" for up in ("true", "false")),
)
SUMS = ("sum_rows<float, 128>", "sum_rows<double, 1024>")


@pytest.fixture(scope="module")
def kernels():
    kernels = cuda_host.Kernels(KERNELS)
    kernels.compile((*SIMPLE, *SUMS, "reversed<float>"))
    return kernels


def address(array: np.ndarray) -> np.uint64:
    return np.uint64(array.ctypes.data)


@pytest.mark.parametrize(("kernel", "threads", "dtype"), [(SUMS[0], 128, np.float32), (SUMS[1], 1024, np.float64)])
@pytest.mark.parametrize("size", [1, 31, 1025])
def test_blocks_sum_rows_with_shuffles_barriers_and_shared_memory(kernels, kernel, threads, dtype, size):
    rows = np.random.RandomState(0).randint(-50, 100, (5, size)).astype(dtype)
    sums, positive = np.full(5, np.nan, dtype), np.zeros(5, bool)
    kernels.launch(kernel, 5, threads, (address(rows), address(sums), np.int64(size), address(positive)))
    np.testing.assert_array_equal(sums, rows.sum(1))
    np.testing.assert_array_equal(positive, rows.sum(1) > 0)


def test_shared_memory_of_the_size_that_the_launch_gives(kernels):
    numbers, out = np.arange(300, dtype=np.float32), np.zeros(300, np.float32)
    kernels.launch("reversed<float>", 3, 100, (address(numbers), address(out)), shared_bytes=400)
    np.testing.assert_array_equal(out.reshape(3, 100), numbers.reshape(3, 100)[:, ::-1])


def test_warp_intrinsics_are_those_of_the_programming_guide(kernels):
    out = np.full((64, 8), -2, np.int32)
    kernels.launch("each_intrinsic", 1, 64, (address(out),))
    lane = np.arange(64) % 32
    within_8 = np.where(lane % 8 + 3 < 8, lane + 3, lane)
    expected = (
        *(np.full(64, 5), lane // 8 * 8 + 5, np.where(lane < 3, lane, lane - 3), within_8, lane ^ 9),
        *(np.full(64, 11), np.full(64, 1), np.where(lane < 16, lane ^ 1, -1)),
    )
    np.testing.assert_array_equal(out, np.stack(expected, axis=1))


def test_all_axes_of_grid_and_block(kernels):
    out = np.zeros((24, 30), np.int32)
    kernels.launch("grid_of_three_axes", (2, 3, 4), (5, 3, 2), (address(out),))
    np.testing.assert_array_equal(out, np.tile(np.arange(1, 31), (24, 1)))


@pytest.mark.parametrize(
    ("kernel", "threads", "message"),
    [
        ("barrier_for_some", 64, r"wait at __syncthreads in line \d+, and 24 of 64 have finished"),
        ("different_barriers", 64, r"wait at __syncthreads in line \d+, others at __syncthreads in line \d+"),
        ("shuffle_of_those_who_left", 64, r"wait at __shfl_down_sync in line \d+, and 2 of 64 have finished"),
        ("barrier_against_shuffle", 32, r"at __shfl_down_sync in line \d+, others wait at __syncthreads in line \d+"),
        ("lane_beyond_the_mask", 32, r"__shfl_xor_sync in line \d+ reads lane 1, which its mask lacks"),
        ("half_a_warp", 16, r"__shfl_xor_sync in line \d+ names lane 16, which the block does not have"),
    ],
)
def test_threads_that_would_wait_for_ever_are_an_error(kernels, kernel, threads, message):
    out = np.zeros(64, np.int32)
    arguments = (address(out),) * len(kernels.parameters(kernel))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            kernels.launch(kernel, 2, threads, arguments)
    other = np.zeros((24, 30), np.int32)
    kernels.launch("grid_of_three_axes", (2, 3, 4), (5, 3, 2), (address(other),))  # and the next launch is sound
    assert (other > 0).all()


def test_shared_memory_is_not_what_the_block_before_left(kernels):
    out = np.zeros((2, 64), np.float32)
    kernels.launch("uninitialised", 2, 64, (address(out),))
    assert (out[0] == 1).all()
    assert np.isnan(out[1]).all()


@pytest.mark.parametrize("up", ["true", "false"])
def test_a_missing_barrier_shows(kernels, up):
    out = np.zeros((2, 64), np.float32)
    kernels.launch(f"neighbour_without_a_barrier<{up}>", 2, 64, (address(out),))
    assert np.isnan(out).sum() == 64  # 63 in the block that runs in one order, one in that of the other


def test_misaligned_access_and_local_index_beyond_its_array_are_errors(kernels):
    words = np.zeros(64, np.uint32)
    aligned = words.ctypes.data + -words.ctypes.data % 16
    with pytest.raises(RuntimeError, match=r"access to a misaligned address in line \d+"):
        kernels.launch("misaligned", 1, 1, (np.uint64(aligned + 8),))
    with pytest.raises(RuntimeError, match=r"access through a null pointer in line \d+"):
        kernels.launch("misaligned", 1, 1, (np.uint64(0),))
    with pytest.raises(RuntimeError, match=r"index 4 is outside of its array in line \d+"):
        kernels.launch("beyond_an_array", 1, 1, (address(words), np.int32(4)))
    kernels.launch("misaligned", 1, 1, (np.uint64(aligned),))
    assert sorted(words[words > 0]) == [1, 2, 3, 4]


def test_arguments_of_another_type_or_number_are_refused(kernels):
    rows, sums, all_positive = np.zeros(4, np.float32), np.zeros(1, np.float32), np.zeros(1, bool)
    good = (address(rows), address(sums), np.int64(4), address(all_positive))
    for bad in (good[:3], (*good, np.int64(0)), (*good[:2], np.int32(4), good[3]), (*good[:2], good[3], good[2])):
        with pytest.raises(TypeError, match=r"takes const float32\*, float32\*, int64, bool\*; got"):
            kernels.launch("sum_rows<float, 128>", 1, 128, bad)


def test_text_that_does_not_compile_says_where():
    with pytest.raises(RuntimeError, match=r"kernel\.cu:2:\d+: error: .*undeclared_name"):
        cuda_host.Kernels("\n__global__ void broken() { undeclared_name(); }").compile(["broken"])
