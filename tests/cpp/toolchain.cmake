# Cross-compiles for aarch64 with Debian's compiler (g++-aarch64-linux-gnu), and runs the result with qemu-user.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
# Programs are this machine's; headers and libraries are the compiler's own.
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
