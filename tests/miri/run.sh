#!/usr/bin/env bash
# Runs the fabric's memory, slots, frames and doorbell under Miri, which watches every access: bounds, provenance,
# alignment, lifetimes, races. What waits for another thread runs in 16 interleavings, one per seed.
# Usage: tests/miri/run.sh [SEEDS [FILTER...]], as in `tests/miri/run.sh 0..100 doorbell::`.
set -euo pipefail
cd "$(dirname "$0")/../.."

SEEDS=${1:-0..16}
shift || true
THREADED=("${@:-doorbell::}")
[ $# -gt 0 ] || THREADED+=(two_sides::)
PLAIN=(memory:: region:: lane:: frame:: handshake::)

fail() {
    echo "Miri did not run: $*" >&2
    exit 1
}

has_miri() {
    cargo +nightly miri --version >/dev/null 2>&1 &&
        [ -d "$(rustc +nightly --print sysroot)/lib/rustlib/src/rust/library" ]
}

# Miri comes with nightly compilers only. What is installed is taken as it is.
if ! has_miri; then
    command -v rustup >/dev/null ||
        fail "it needs a nightly Rust toolchain, which rustup installs. Install rustup (https://rustup.rs)."
    if rustc +nightly --version >/dev/null 2>&1; then
        rustup component add --toolchain nightly miri rust-src ||
            fail "rustup cannot add miri and rust-src to the nightly toolchain. See that this host reaches" \
                "the release server of Rust, or install them another way."
    else
        rustup toolchain install nightly --profile minimal --component miri --component rust-src ||
            fail "rustup cannot install a nightly toolchain with miri and rust-src. See that this host reaches" \
                "the release server of Rust, or install them another way."
    fi
    has_miri || fail "the nightly toolchain still has no Miri."
fi

# A folder of its own, so that builds for Miri and others do not undo each other.
export CARGO_TARGET_DIR=target/miri
export RUST_BACKTRACE=0
# Sockets of this host, and examples few enough for an interpreter.
export PROPTEST_CASES=${PROPTEST_CASES:-8} PROPTEST_DISABLE_FAILURE_PERSISTENCE=true

miri() {
    local flags=$1
    shift
    MIRIFLAGS="-Zmiri-strict-provenance $flags" \
        cargo +nightly miri test --package step3rt-fabric --lib --quiet -- "$@"
}

[ $# -gt 0 ] || miri -Zmiri-disable-isolation "${PLAIN[@]}"
# Isolated, so that time is the interpreter's own and a seed says everything.
miri "-Zmiri-many-seeds=$SEEDS" "${THREADED[@]}"
