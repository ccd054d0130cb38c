#!/bin/bash
# Installs the Debian packages that are missing: `deps.sh demo` what building and the
# demo need, `deps.sh test` also what the tests need. Does nothing where all are here.
set -euo pipefail

packages=(gcc libc6-dev runc busybox-static)
case "${1:-demo}" in
  demo) ;;
  test)
    packages+=(crun containerd skopeo umoci docker-registry iproute2 openssl procps podman conmon
      containernetworking-plugins iptables nftables)
    ;;
  *) echo "usage: $0 demo|test" >&2; exit 2 ;;
esac

command -v cargo >/dev/null || {
  echo "longshore: no Rust toolchain: install the one that Cargo.toml's rust-version names, see https://rustup.rs" >&2
  exit 1
}
command -v dpkg-query >/dev/null || {
  echo "longshore: this is no Debian: install the equivalents of ${packages[*]} yourself" >&2
  exit 0
}

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
  [[ $status == "install ok installed" ]] || missing+=("$package")
done
(( ${#missing[@]} )) || exit 0

if (( EUID != 0 )); then
  echo "longshore: missing packages: run as root: apt-get install ${missing[*]}" >&2
  exit 1
fi

# Packages of daemons start them; we want their binaries only.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 0755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get install -y --no-install-recommends "${missing[@]}" ||
  { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; }
