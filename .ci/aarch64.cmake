# Cross-compiles for the arm64 Debian that .ci/aarch64 unpacks.
set(root "${CMAKE_CURRENT_LIST_DIR}/../.aarch64/root")
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
# Debian's pyconfig.h includes <aarch64-linux-gnu/python3.X/pyconfig.h>; all else comes with the compiler.
set(CMAKE_CXX_FLAGS_INIT "-idirafter ${root}/usr/include")
file(GLOB include "${root}/usr/include/python3.*")
set(Python_INCLUDE_DIR "${include}" CACHE PATH "The device's headers, not those of the Python that builds" FORCE)
