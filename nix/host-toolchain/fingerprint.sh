#!/usr/bin/env bash
# Writes host.json (where the host's compilers are, and what they are) and wheels.txt (the pinned CUDA wheels), which a flake in a folder of its own
# cannot see otherwise.
set -euo pipefail
cd "$(dirname "$0")"
rust=$(dirname "$(rustup which rustc 2>/dev/null || command -v rustc)")
what=$({ "$rust/rustc" -vV; "$rust/cargo" -V; c++ --version; ld --version; ldd --version; } | sed -n '/version\|^rustc\|^cargo\|(/p' | sha256sum | cut -d' ' -f1)
printf '{ "path": "%s:/usr/local/bin:/usr/bin:/bin", "fingerprint": "%s" }\n' "$rust" "$what" >host.json
cp ../../kernels/requirements.txt wheels.txt
