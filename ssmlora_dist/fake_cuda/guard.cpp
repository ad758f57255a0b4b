// Answers for CUDA where torch has none: autograd asks for streams and devices even of tensors without storage.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

#include <atomic>
#include <cstring>
#include <new>

namespace {

using c10::DeviceIndex;
using c10::DeviceType;

struct Pretended final : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

// torch holds one object for good, and it has no members: which class it is of is all there is to change.
static_assert(sizeof(Pretended) == sizeof(void*), "hooks are expected to have no members");

char kept[sizeof(void*)];
const c10::impl::DeviceGuardImplInterface* kept_guard = nullptr;
const c10::impl::FakeGuardImpl<DeviceType::CUDA> guard;

void* hooks() { return const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()); }

std::atomic<const c10::impl::DeviceGuardImplInterface*>& registered() {
  return c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
}

} // namespace

extern "C" void pretend_cuda() {
  std::memcpy(kept, hooks(), sizeof(kept));
  new (hooks()) Pretended();
  kept_guard = registered().exchange(&guard);
}

extern "C" void stop_pretending() {
  // Where there was none ours stays: tensors may be left that ask for one when they go.
  if (kept_guard != nullptr) registered().store(kept_guard);
  std::memcpy(hooks(), kept, sizeof(kept));
}
