#!/usr/bin/env bash
# Passes all tests on a Debian machine with Rust: installs and starts the servers that they need, runs
# `cargo test` over the whole workspace, and stops the servers if it was the one who started them.
# Arguments go to cargo: `infra/test.sh -p farm --lib`. Without any: the whole workspace.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$PATH:$HOME/.cargo/bin
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/kiln/target}

command -v cargo >/dev/null || { echo "cargo is missing; install Rust from https://rustup.rs" >&2; exit 1; }
# A C compiler builds SQLite and the cryptography.
if ! command -v cc >/dev/null; then
  echo "test: installing a C compiler" >&2
  SUDO=$([ "$(id -u)" = 0 ] || echo sudo)
  $SUDO apt-get update -q && $SUDO env DEBIAN_FRONTEND=noninteractive apt-get install -y -q build-essential
fi

if ! infra/services.sh status >/dev/null 2>&1; then
  trap 'infra/services.sh down' EXIT
  infra/services.sh up
fi
eval "$(infra/services.sh env)"

if [ $# = 0 ]; then set -- --workspace; fi
cargo test "$@"
