# LibTorch's stable ABI without find_package(Torch), which fails for a CUDA torch when the CUDA
# toolkit is incomplete and never needs to be asked: the stable headers want an include path, two
# macros and libtorch_cpu.
#
# Defines TorchStable::cpu; TorchStable::cuda if the torch found has CUDA; TorchStable_VERSION,
# TorchStable_DIR, TorchStable_CUDA_VERSION.

execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/locate_torch.py"
  OUTPUT_VARIABLE _torch OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE _torch_missing)
if(_torch_missing)
  message(FATAL_ERROR
    "torch >= ${TorchStable_FIND_VERSION} was not found. Install torch first, then run "
    "`pip install --no-build-isolation .`; or name its folder in NAMM_TORCH_DIR; or set "
    "NAMM_BUILD_TORCH=1 to let pip put a torch into the build environment.")
endif()
list(GET _torch 0 TorchStable_DIR)
list(GET _torch 1 TorchStable_VERSION)
list(LENGTH _torch _torch_fields)
if(_torch_fields GREATER 2)
  list(GET _torch 2 TorchStable_CUDA_VERSION)
endif()

find_library(TorchStable_CPU_LIBRARY torch_cpu
  PATHS "${TorchStable_DIR}/lib" NO_DEFAULT_PATH NO_CACHE)
find_library(TorchStable_CUDA_LIBRARY torch_cuda
  PATHS "${TorchStable_DIR}/lib" NO_DEFAULT_PATH NO_CACHE)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchStable
  REQUIRED_VARS TorchStable_CPU_LIBRARY TorchStable_DIR
  VERSION_VAR TorchStable_VERSION)

if(TorchStable_FOUND AND NOT TARGET TorchStable::cpu)
  add_library(TorchStable::headers INTERFACE IMPORTED)
  target_include_directories(TorchStable::headers SYSTEM INTERFACE "${TorchStable_DIR}/include")
  # The oldest torch this binary runs with: 2.11. The first macro makes any other torch header an
  # error.
  target_compile_definitions(TorchStable::headers INTERFACE
    TORCH_STABLE_ONLY TORCH_TARGET_VERSION=0x020b000000000000)

  add_library(TorchStable::cpu SHARED IMPORTED)
  set_target_properties(TorchStable::cpu PROPERTIES IMPORTED_LOCATION "${TorchStable_CPU_LIBRARY}")
  target_link_libraries(TorchStable::cpu INTERFACE TorchStable::headers)

  if(TorchStable_CUDA_LIBRARY)
    add_library(TorchStable::cuda SHARED IMPORTED)
    set_target_properties(TorchStable::cuda PROPERTIES
      IMPORTED_LOCATION "${TorchStable_CUDA_LIBRARY}")
    target_link_libraries(TorchStable::cuda INTERFACE TorchStable::headers)
  endif()
endif()
