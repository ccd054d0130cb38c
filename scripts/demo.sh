#!/bin/bash
# A private daemon in a network of its own, an image made on the spot, a pod of two
# containers that share localhost and /dev/shm, another pod that reaches it by its
# address; then everything is stopped, and nothing may be left.
# `demo.sh BINDIR`; needs root, runc and busybox-static.
set -euo pipefail

bin=$(realpath "${1:-out/bin}")
here=$(dirname "$(realpath "$0")")
if (( EUID != 0 )); then
  echo "longshore: the demo makes namespaces, mounts and cgroups: run it as root" >&2
  exit 1
fi

work=$(mktemp -d /tmp/longshore-demo.XXXXXX)
group=longshore-demo-$$
image=localhost/demo/busybox:1
daemon=
export LONGSHORE_SOCKET=$work/socket

longshore() { "$bin/longshore" "$@"; }
step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
run() { printf '\033[2m$ longshore %s\033[0m\n' "$*"; longshore "$@"; }
die() { echo "demo: $*" >&2; exit 1; }
must_say() { # WANTED COMMAND…
  local wanted=$1 said
  shift
  said=$(run "$@") || die "'longshore $*' failed"
  printf '%s\n' "$said"
  grep -qF -- "$wanted" <<<"$said" || die "'longshore $*' does not say: $wanted"
}

stop_daemon() {
  [[ -n $daemon ]] || return 0
  kill -TERM "$daemon" 2>/dev/null || true
  wait "$daemon" || true
  daemon=
}

finish() {
  local code=$?
  trap - EXIT INT TERM
  set +e
  if (( code )); then
    [[ -s $work/log ]] && { echo "demo: the daemon's last words:" >&2; tail -n 30 "$work/log" >&2; }
    [[ -n $daemon ]] && timeout 20 "$bin/longshore" rm -f demo >/dev/null 2>&1
  fi
  stop_daemon
  mountpoint -q "$work/state/ns" && umount "$work/state/ns"
  find /sys/fs/cgroup -depth -type d -path "*/$group*" -exec rmdir {} + 2>/dev/null || true
  rm -rf --one-file-system "$work"
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM

began=$(date +%s%N)
step "a private daemon in $work"
cat >"$work/config.toml" <<CONFIG
[runtime]
shim_cgroup = "/$group/shims"
[network]
mode = "builtin"
CONFIG
usual_before=$(ls -d /var/lib/longshore /run/longshore 2>/dev/null || true)
# Its network is a namespace that ends with it: the node's own is left alone.
unshare --net -- sh -c 'busybox ip link set lo up; exec "$@"' sh \
  "$bin/longshore" serve --config "$work/config.toml" --root "$work/root" --state "$work/state" >"$work/log" 2>&1 &
daemon=$!
for _ in $(seq 200); do
  longshore version >/dev/null 2>&1 && break
  kill -0 "$daemon" 2>/dev/null || die "the daemon ended"
  sleep 0.05
done
run version

step "an image, made from busybox-static and imported"
"$here/demo-image.sh" "$work/image.tar" "$image"
run import "$work/image.tar"
must_say "$image" images -o json >/dev/null
run images

step "a pod of two containers: one serves on localhost, the other fetches"
run run -d --pod new:demo -p 8080:8080 --cgroup-parent "/$group" --name web "$image" sh -c '
  trap "kill %1; exit 0" TERM
  echo "hello from web" >/www/index.html
  echo "a note in shared memory" >/dev/shm/note
  echo "serving on port 8080"
  httpd -f -p 8080 -h /www &
  wait' >/dev/null
must_say "hello from web" run --rm --pod demo --name visitor "$image" sh -c '
  for i in 1 2 3 4 5 6 7 8 9 10; do
    wget -qO- http://127.0.0.1:8080/ 2>/dev/null && break
    sleep 0.1
  done
  cat /dev/shm/note'
run run -d --pod demo --name idler "$image" sh -c 'trap "exit 0" TERM; echo "I idle in $(hostname)"; sleep 1000 & wait' \
  >/dev/null
run pods
run ps

step "another pod and the node reach it, by its address and by a port of the node"
address=$(longshore inspect demo | grep -o '"ip": "[0-9.]*"' | grep -o '[0-9.]*' | head -n 1)
[[ -n $address ]] || die "the pod has no address"
must_say "hello from web" run --rm --cgroup-parent "/$group" --name neighbour "$image" wget -qO- "http://$address:8080/"
[[ $(nsenter --target "$daemon" --net busybox wget -qO- http://127.0.0.1:8080/) == "hello from web" ]] ||
  die "the node's port 8080 does not lead to the pod"
echo "hello from web, by the node's 127.0.0.1:8080"

step "a command in a running container"
must_say "a note in shared memory" exec idler cat /dev/shm/note

step "its log, and the timeline of the pod's start"
must_say "serving on port 8080" logs web
must_say "RunPodSandbox" timeline demo

step "everything is stopped"
netns=$(longshore inspect demo | grep -o '/run/netns/[^"]*' | head -n 1)
[[ -e $netns ]] || die "the pod's network namespace is not where inspect says"
run stop -t 5 demo
run rm demo
run rmi "$image"
[[ -z $(longshore pods -q) && -z $(longshore ps -aq) && -z $(longshore images -q) ]] || die "the daemon still lists something"
stop_daemon

step "nothing is left"
left=()
# A shim that was told to go may need a moment more.
processes() {
  # The pattern comes by a pipe, or grep would find itself.
  grep -lsaF -f <(printf '%s\n' "$work") /proc/[0-9]*/cmdline || true
  # A zombie is its parent's to reap.
  grep -lsF -- "/$group" /proc/[0-9]*/cgroup | while read -r file; do
    grep -qs '^State:.Z' "${file%/*}/status" || echo "$file"
  done
}
for _ in $(seq 40); do
  [[ -n $(processes) ]] || break
  sleep 0.05
done
for file in $(processes); do
  left+=("process $(tr '\0' ' ' <"${file%/*}/cmdline")")
done
mounts=$(grep -F -- "$work" /proc/self/mountinfo || true)
[[ -z $mounts ]] || left+=("mounts: $mounts")
[[ ! -e $netns ]] || left+=("network namespace $netns")
cgroups=$(find /sys/fs/cgroup -type d -path "*/$group*" 2>/dev/null || true)
[[ -z $cgroups ]] || left+=("cgroups: $cgroups")
logs=$(find "$work/root/logs" -mindepth 1 2>/dev/null || true)
[[ -z $logs ]] || left+=("logs: $logs")
for usual in /var/lib/longshore /run/longshore; do
  [[ ! -e $usual || $usual_before == *$usual* ]] || left+=("files in $usual")
done
[[ ! -S $work/socket ]] || left+=("the socket")
if (( ${#left[@]} )); then
  printf 'demo: left behind: %s\n' "${left[@]}" >&2
  exit 1
fi
echo "no process, mount, network namespace, cgroup or log"
echo
echo "All of it took $(( ($(date +%s%N) - began) / 1000000 )) ms."
