# shellcheck shell=sh
# Sourced. need COMMAND-THAT-MUST-WORK PACKAGE ...: installs Debian packages where the command fails.
need() {
  check=$1
  shift
  if sh -c "$check" >/dev/null 2>&1; then return; fi
  if ! command -v apt-get >/dev/null; then
    echo "missing: $* (Debian's names); '$check' does not work. Install it and run this again." >&2
    exit 1
  fi
  as_root=
  if [ "$(id -u)" != 0 ]; then as_root=sudo; fi
  echo "installing $*" >&2
  $as_root apt-get update -qq >/dev/null || true
  DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends "$@" >/dev/null
  if ! sh -c "$check" >/dev/null 2>&1; then
    echo "installed $*, but '$check' still does not work" >&2
    exit 1
  fi
}
