#!/usr/bin/env bash
# Everything that must pass, in one command. `./testkit/verify.sh --help` says what it does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

synapse_version=1.163.2
livekit_version=v1.13.5
cargo_fuzz_version=0.13.2
go_needed=1.26
peers=${ANTIPHON_PEERS:-$PWD/target/peers}
export ANTIPHON_PEERS=$peers

usage() {
  cat <<EOF
./testkit/verify.sh            check and test everything
./testkit/verify.sh --fuzz     the same, and run the fuzz targets (with CI=true they always run)
./testkit/verify.sh --size     the same, with the bot outside the workspace as a release build, and print its size
./testkit/verify.sh --setup    only install, below target/peers, what the tests meet
./testkit/verify.sh --help     this text

1. Tools. Needed: Rust with rustfmt and clippy, a C compiler, make and perl.
2. Peers, installed without root below target/peers when missing or of another version:
     synapse/   Synapse $synapse_version, from PyPI         (needs python3 with venv)
     npm/       node 24, playwright-core, livekit-client, Element Call, matrix-js-sdk, from npm
                as testkit/web/package-lock.json says  (needs npm; x86-64)
     bin/       LiveKit server $livekit_version, as a Go module (needs Go $go_needed or newer)
                cargo-fuzz $cargo_fuzz_version, from crates.io, if the fuzz targets run
   Chromium, Firefox ESR, Redis, coturn, nginx, Caddy, systemd-analyze, ip and unshare need root: what is missing is
   named with the line that installs it.
3. cargo fmt, clippy and doc, all with warnings denied.
4. The bot in examples/embed, a project of its own outside the workspace that depends on the SDK by path. It must
   fit in 50 lines. The tests start it twice. With --size it is built as docs/sdk/embedding.md describes, which
   takes long (a busy two-core machine: 50 minutes), and its size is printed.
5. Every test, the documentation's too, in a network namespace that has only loopback, because browsers
   and SFUs bind every interface they see. Where no such namespace can be made, the tests that need it
   are skipped.
6. With CI=true or --fuzz, every fuzz target for 30 s, two at a time (docs/fuzzing.md).

A test whose peer is missing prints a line that begins with SKIPPED. With CI=true in the environment
whatever is missing is a failure.

Environment: CI, ANTIPHON_PEERS (another folder for the peers), CARGO_TARGET_DIR and all that cargo reads.
Exit status: 0 when everything passed, another when something failed, 2 for a wrong argument.
EOF
}

main() {
  case ${1-} in
    '' | --fuzz | --size | --setup) ;;
    --help | -h) usage && return ;;
    *) usage >&2 && return 2 ;;
  esac
  trap finish EXIT
  missing=()
  [[ ${CI-} != true && ${1-} != --fuzz ]] || fuzzing=yes
  [[ ${1-} != --size ]] || size=yes
  step "tools" tools
  step "Synapse $synapse_version" synapse
  step "npm packages" npm_packages
  step "LiveKit server $livekit_version" livekit
  [[ -z ${fuzzing-} ]] || step "cargo-fuzz $cargo_fuzz_version" cargo_fuzz
  step "programs that need root" programs
  if ((${#missing[@]})); then
    printf '%s\n' '' 'MISSING: the tests that need these will be skipped' "${missing[@]/#/  }" '' >&2
    [[ ${CI-} != true ]] || fail "with CI=true nothing may be missing"
  fi
  if [[ ${1-} != --setup ]]; then check; fi
  current=
}

check() {
  # Incremental compilation costs time and space in a build that is made once.
  [[ ${CI-} != true ]] || export CARGO_INCREMENTAL=0
  # matrix-sdk declares a newer Rust than it needs.
  local any=(--workspace --ignore-rust-version --locked)
  step "format" cargo fmt --all --check
  step "clippy" cargo clippy "${any[@]}" --all-targets -- -D warnings
  # The SDK without features, as programs with a shell of their own use it.
  step "clippy without features" cargo clippy --package antiphon-call-sdk --no-default-features --ignore-rust-version \
    --locked -- -D warnings
  RUSTDOCFLAGS="-D warnings" step "documentation" cargo doc "${any[@]}" --no-deps
  step "bot outside the workspace" embed
  step "build of the tests" cargo test "${any[@]}" --no-run
  step "tests" tests cargo test "${any[@]}" --offline
  if [[ -z ${fuzzing-} ]]; then
    echo "SKIPPED the fuzz targets: ./testkit/verify.sh --fuzz runs them, too"
  elif [[ -x $peers/bin/cargo-fuzz ]]; then
    step "build of the fuzz targets" fuzz_build
    step "fuzz targets" fuzz
  fi
}

tools() {
  need cargo "Rust from https://rustup.rs"
  cargo fmt --version >/dev/null 2>&1 || fail "rustfmt is missing: rustup component add rustfmt"
  cargo clippy --version >/dev/null 2>&1 || fail "clippy is missing: rustup component add clippy"
  local tool
  for tool in cc make perl; do need $tool "apt-get install --yes --no-install-recommends build-essential"; done
  rustc --version
}

synapse() {
  local at=$peers/synapse
  local asks='import importlib.metadata as m; print(m.version("matrix-synapse"))'
  if [[ $("$at/bin/python" -c "$asks" 2>/dev/null) == "$synapse_version" ]]; then
    echo "is there"
  elif ! python3 -c 'import venv, ensurepip' 2>/dev/null; then
    lacks "Synapse: apt-get install --yes --no-install-recommends python3 python3-venv, then run this again"
  else
    rm -rf "$at"
    python3 -m venv "$at" &&
      "$at/bin/pip" install --quiet --disable-pip-version-check "matrix-synapse==$synapse_version" ||
      lacks "Synapse: pip failed, see above"
  fi
}

npm_packages() {
  local at=$peers/npm lock
  lock=$(cat testkit/web/package.json testkit/web/package-lock.json | sha256sum)
  if [[ $(cat "$at/installed" 2>/dev/null) == "$lock" ]]; then
    echo "are there"
  elif ! command -v npm >/dev/null; then
    lacks "npm packages: apt-get install --yes --no-install-recommends npm, then run this again"
  else
    rm -rf "$at" && mkdir -p "$at"
    cp testkit/web/package.json testkit/web/package-lock.json "$at/"
    # Quiet, because npm's own node may be older than the packages want; the tests use the node among them.
    if (cd "$at" && npm ci --no-audit --no-fund --loglevel=error) && "$at/node_modules/.bin/node" --version; then
      echo "$lock" >"$at/installed"
    else
      lacks "npm packages: npm failed, see above"
    fi
  fi
}

livekit() {
  local at=$peers/bin
  if [[ -x $at/server ]] && grep -qaF "livekit-server	$livekit_version	" "$at/server"; then
    echo "is there"
  elif ! command -v go >/dev/null; then
    lacks "LiveKit server: Go $go_needed or newer (https://go.dev/doc/install), then run this again"
  else
    GOBIN=$at go install "github.com/livekit/livekit-server/cmd/server@$livekit_version" ||
      lacks "LiveKit server: go failed (it needs Go $go_needed or newer), see above"
  fi
}

cargo_fuzz() {
  if [[ $("$peers/bin/cargo-fuzz" --version 2>/dev/null) == "cargo-fuzz $cargo_fuzz_version" ]]; then
    echo "is there"
  else
    cargo install --quiet --locked --root "$peers" --force "cargo-fuzz@$cargo_fuzz_version" ||
      { rm -f "$peers/bin/cargo-fuzz" && lacks "cargo-fuzz: cargo failed, see above"; }
  fi
}

programs() {
  local pair
  # Servers are often where only root's path leads.
  local PATH=$PATH:/usr/sbin
  for pair in chromium:chromium firefox-esr:firefox-esr redis-server:redis-server turnserver:coturn nginx:nginx-light \
    caddy:caddy systemd-analyze:systemd ip:iproute2 unshare:util-linux; do
    command -v "${pair%:*}" >/dev/null ||
      lacks "${pair%:*}: apt-get install --yes --no-install-recommends ${pair#*:}"
  done
}

embed() {
  local lines profile=dev out=${CARGO_TARGET_DIR:-$PWD/target}/embed
  lines=$(wc -l <examples/embed/src/main.rs)
  ((lines <= 50)) || fail "examples/embed/src/main.rs has $lines lines; the quick start has 50 at most"
  cargo metadata --manifest-path examples/embed/Cargo.toml --locked --format-version 1 >/dev/null ||
    fail "examples/embed/Cargo.lock is behind: call cargo metadata there without --locked, and commit it"
  cargo fmt --manifest-path examples/embed/Cargo.toml --check
  [[ -z ${size-} ]] || profile=release
  # Debug information would take most of the time and space of the dev build.
  CARGO_PROFILE_DEV_DEBUG=false cargo rustc --manifest-path examples/embed/Cargo.toml --target-dir "$out" \
    --profile "$profile" --ignore-rust-version --locked -- ${size:+-C link-arg=-Wl,-z,pack-relative-relocs}
  ANTIPHON_EMBED_BOT=$(realpath "$out/${profile/dev/debug}/embed")
  export ANTIPHON_EMBED_BOT
  if [[ -n ${size-} ]]; then
    echo "stripped size of the release build: $(stat --format %s "$ANTIPHON_EMBED_BOT") bytes"
  fi
}

tests() {
  local how
  log=$(mktemp)
  if how=$(isolation); then
    echo "in a network namespace with only loopback (unshare $how)"
    # shellcheck disable=SC2086  # several words
    unshare $how sh -c 'ip link set lo up && "$@"; exit $?' sh "$@" 2>&1 | tee "$log"
  else
    [[ ${CI-} != true ]] || fail "no network namespace can be made here, and with CI=true no test may be skipped"
    printf '%s\n' "NO NETWORK NAMESPACE can be made here (root, iproute2 and util-linux are needed):" \
      "the tests with browsers and SFUs will be skipped" >&2
    "$@" 2>&1 | tee "$log"
  fi
  # Once more where the eye ends.
  grep -ao 'SKIPPED .*' "$log" || true
}

fuzz_build() {
  fuzz_out=${CARGO_TARGET_DIR:-$PWD/target}/fuzz
  local crate
  for crate in jwt-service call-sdk; do
    cargo metadata --manifest-path $crate/fuzz/Cargo.toml --locked --format-version 1 >/dev/null ||
      fail "$crate/fuzz/Cargo.lock is behind: call cargo metadata there without --locked, and commit it"
    # No sanitizer: they find errors of memory, which safe Rust does not make, at twice the time. Without one
    # this needs no flag that only nightly compilers take.
    (cd $crate && PATH=$peers/bin:$PATH cargo fuzz build --sanitizer none --target-dir "$fuzz_out")
  done
}

fuzz() {
  local host target
  host=$(rustc -vV | sed -n 's/^host: //p')
  export fuzz_out fuzz_bin=$fuzz_out/$host/release
  for target in {jwt-service,call-sdk}/fuzz/targets/*.rs; do basename "$target" .rs; done | xargs -P 2 -I TARGET bash -c '
    new=$fuzz_out/corpus/TARGET log=$fuzz_out/TARGET.log
    mkdir -p "$new"
    if "$fuzz_bin/TARGET" "$new" */fuzz/corpus/TARGET -max_total_time=30 -timeout=10 -max_len=4096 \
      -rss_limit_mb=1024 -artifact_prefix="$fuzz_out/TARGET-" >"$log" 2>&1
    then
      echo "TARGET: $(tail -n 1 "$log")"
    else
      echo "TARGET FAILED: docs/fuzzing.md says what to do with the input that is named below" >&2
      grep -a -A 8 -m 1 "panicked at" "$log" >&2
      tail -n 5 "$log" >&2
      false
    fi'
}

# Prints unshare's arguments. With a process namespace of its own, whatever a broken test leaves behind ends
# with it. Without root it needs a user namespace, which not every machine allows.
isolation() {
  local how
  for how in "" "--map-root-user "; do
    how+="--net --pid --fork --kill-child --mount-proc"
    # shellcheck disable=SC2086  # several words
    if unshare $how ip link set lo up 2>/dev/null; then echo "$how" && return; fi
  done
  return 1
}

step() {
  current=$1
  printf '\n=== %s\n' "$current"
  local from=$SECONDS
  "${@:2}"
  printf '=== %s: %d s\n' "$current" $((SECONDS - from))
}

lacks() {
  echo "MISSING $1" >&2
  missing+=("$1")
}

need() {
  command -v "$1" >/dev/null || fail "$1 is missing: $2"
}

fail() {
  echo "$1" >&2
  exit 1
}

finish() {
  local status=$?
  rm -f "${log-}"
  if [[ $status == 0 ]]; then
    printf '\nPASSED in %d s\n' "$SECONDS"
  else
    printf '\nFAILED in %d s, at: %s\n' "$SECONDS" "${current-}" >&2
  fi
}

main "$@"
