#!/usr/bin/env bash
# Compares the files of FOLDER with the hashes in LIST, one of the committed tables: kernels/golden-hashes.json or a snapshot of tests/. Manifests have
# no hash there, nor libraries, in which the host's compiler has a part. With `part` the folder need not have every file of the list.
#
#     nix/committed.sh LIST FOLDER [part]
set -euo pipefail
export LC_ALL=C
want=$(sed -nE 's/^ *"([^"]+)": "([0-9a-f]{64})",?$/\2  \1/p; s/^([0-9a-f]{64}) ([^ ]+)$/\1  \2/p' "$1" | sort)
have=$(cd "$2" && find . -type f ! -name '*manifest.json' ! -name '*.so' -exec sha256sum {} + | sed 's,  \./,  ,' | sort)
if [ -z "$want" ] || [ -z "$have" ]; then
  echo "nothing to compare in $1 or $2" >&2
  exit 1
fi
other=$(comm -13 <(echo "$want") <(echo "$have"))
missing=$(comm -23 <(echo "$want") <(echo "$have"))
if [ -n "$other" ]; then
  printf '%s: other hashes than in %s:\n%s\n' "$2" "$1" "$other" >&2
  exit 1
fi
if [ -n "$missing" ] && [ "${3:-}" != part ]; then
  printf '%s: is without\n%s\n' "$2" "$missing" >&2
  exit 1
fi
echo "$(wc -l <<<"$have") files have the committed hashes"
