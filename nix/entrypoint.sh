#!/usr/bin/env bash
# What a container does before its command. Each step is 1 or 0:
#
#     AUTO_TEST_ENV (1)          describe the machine
#     AUTO_INSTALL_KERNELS (0)   build the CUDA kernels for the GPUs that are here, where none are installed; wants an image with a compiler
#     AUTO_VERIFY (1)            compare installed kernels with their hashes, and on a GPU with this processor
#     RUN_MICROBENCH (0)         measure linear layers
#     SKIP_STARTUP_COMMANDS (0)  none of it
#
# What fails is said and does not keep the command from running, but damaged or wrong kernels do; only gptoss-kernel-install runs then.
set -euo pipefail

say() { echo "gptoss: $*" >&2; }
on() {
  local value=${!1:-$2}
  case $value in
    0 | 1) [ "$value" = 1 ] ;;
    *)
      say "$1 is 0 or 1, not $value"
      exit 2
      ;;
  esac
}

# Kernels of the image, where a volume lies over the place that they are looked for in. A build's folder has its hash for a name.
if [ -d /opt/gptoss/built ]; then
  cp -rn /opt/gptoss/built/. "$GPTOSS_KERNELS/" || say "the image's kernels could not be put into $GPTOSS_KERNELS"
fi

if ! on SKIP_STARTUP_COMMANDS 0; then
  if on AUTO_TEST_ENV 1; then
    gptoss-verify env --format table >&2 || say "the machine could not be described (see above)"
  fi
  if on AUTO_INSTALL_KERNELS 0 && ! compgen -G "${GPTOSS_KERNELS:-/nowhere}/*/manifest.json" >/dev/null; then
    gptoss-kernel-install --yes >/dev/null || say "the kernels were not built (see above). INSTALL_KERNELS=1 make build-image makes an image with a compiler"
  fi
  if on AUTO_VERIFY 1 && [ "${1:-}" != gptoss-kernel-install ]; then
    code=0
    gptoss-kernel-install --list --format table >&2 || code=$?
    case $code in
      0) ;;
      1)
        say "installed kernels are damaged: run gptoss-kernel-install --uninstall all"
        exit 1
        ;;
      *) say "installed kernels could not be read (see above)" ;;
    esac
    if gptoss-verify env --format table 2>/dev/null | grep -q '^gpus *none'; then
      say "kernels were not run: there is no GPU"
    else
      code=0
      gptoss-verify kernels --quiet --format table >&2 || code=$?
      case $code in
        0) ;;
        1)
          say "kernels compute something wrong on this GPU"
          exit 1
          ;;
        *) say "kernels were not run (see above)" ;;
      esac
    fi
  fi
  if on RUN_MICROBENCH 0; then
    gptoss-bench gemm --M 1,16 --format table >&2 || say "nothing was measured (see above)"
  fi
fi
exec "$@"
