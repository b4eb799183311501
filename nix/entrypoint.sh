#!/usr/bin/env bash
# What a container does before its command. Each step is 1 or 0:
#
#     AUTO_TEST_ENV (1)          describe the machine
#     AUTO_INSTALL_KERNELS (0)   build the CUDA kernels for the GPUs that are here, where none are installed
#     AUTO_VERIFY (1)            compare installed kernels with their hashes, and on a GPU with this processor
#     RUN_MICROBENCH (0)         measure linear layers
#     SKIP_STARTUP_COMMANDS (0)  none of it
#
# What fails is said and does not keep the command from running, but damaged or wrong kernels do.
set -euo pipefail

on() { [ "${1:-0}" = 1 ]; }
say() { echo "gptoss: $*" >&2; }

if ! on "${SKIP_STARTUP_COMMANDS:-0}"; then
  if on "${AUTO_TEST_ENV:-1}"; then
    gptoss-verify env --format table >&2
  fi
  if on "${AUTO_INSTALL_KERNELS:-0}"; then
    gptoss-kernel-install --yes >/dev/null || say "the kernels were not built (see above)"
  fi
  if on "${AUTO_VERIFY:-1}"; then
    gptoss-kernel-install --list --format table >&2 || { say "installed kernels are damaged: gptoss-kernel-install --uninstall all"; exit 1; }
    code=0
    gptoss-verify kernels --quiet --format table >&2 || code=$?
    case $code in
      0) ;;
      1) say "kernels compute something wrong on this GPU"; exit 1 ;;
      *) say "kernels were not run (see above)" ;;
    esac
  fi
  if on "${RUN_MICROBENCH:-0}"; then
    gptoss-bench gemm --M 1,16 --format table >&2 || say "nothing was measured (see above)"
  fi
fi
exec "$@"
