#!/usr/bin/env bash
# Private Postgres, RabbitMQ and S3 servers for developing and testing Kiln. No Docker needed.
#
#   infra/services.sh up                     installs what is missing, starts what is not running, waits until all answer
#   infra/services.sh down                   stops what it started; the data stays
#   infra/services.sh env                    prints the variables that `kiln scheduler`, `kiln worker` and the tests read
#   infra/services.sh status                 a table; exit status 0 if all three answer
#   infra/services.sh start|stop|restart|kill postgres|rabbitmq|s3
#                                            one server, for trying faults; `kill` is SIGKILL
#   infra/services.sh clean                  down, and deletes the data
#
# Everything listens on 127.0.0.1 alone, on free ports that are picked once and remembered with the data.
# Works as root and as an ordinary user (with sudo if Debian packages are missing).
#
#   KILN_SERVICES_DIR=FOLDER   where data, logs and ports live     (default: ~/.cache/kiln/services)
#   KILN_SERVICES_FAST=1       Postgres without fsync: quicker, loses data when the machine crashes
#   KILN_S3_SERVER=garage      Garage as the S3 server instead of s3s-fs (builds for half an hour, once)
set -euo pipefail

CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/kiln
DIR=${KILN_SERVICES_DIR:-$CACHE/services}
TOOLS=$CACHE/tools
S3_SERVER=${KILN_S3_SERVER:-s3s-fs}
SERVICES=(postgres rabbitmq s3)
START_SECONDS=120
export PATH=$PATH:$HOME/.cargo/bin:/usr/sbin:/sbin

say() { echo "services: $*" >&2; }
fail() { say "$*"; exit 1; }

# --- what is remembered: ports, passwords -----------------------------------------------------------

answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# A free port below the range that the kernel hands to outgoing connections.
TAKEN=" "
free_port() {
  local port
  for _ in $(seq 200); do
    port=$((20000 + RANDOM % 12000))
    if [[ $TAKEN != *" $port "* ]] && ! answers "$port"; then
      TAKEN+="$port "
      FREE_PORT=$port
      return
    fi
  done
  fail "found no free port between 20000 and 32000"
}

random_hex() { od -An -N"$1" -tx1 /dev/urandom | tr -d ' \n'; }

remember() {
  mkdir -p "$DIR"
  DIR=$(cd "$DIR" && pwd)
  chmod 711 "$DIR"
  [ -f "$DIR/settings" ] && return
  local name
  (
    umask 077
    for name in PG_PORT AMQP_PORT DIST_PORT EPMD_PORT S3_PORT S3_RPC_PORT S3_ADMIN_PORT; do
      free_port
      echo "$name=$FREE_PORT"
    done
    echo "PASSWORD=$(random_hex 16)"
    echo "S3_KEY=GK$(random_hex 12)"
    echo "S3_SECRET=$(random_hex 32)"
  ) >"$DIR/settings.new"
  mv "$DIR/settings.new" "$DIR/settings"
}

settings() {
  [ -f "$DIR/settings" ] || fail "nothing was ever started in $DIR; run \`infra/services.sh up\` first"
  DIR=$(cd "$DIR" && pwd)
  # shellcheck source=/dev/null
  . "$DIR/settings"
}

# --- processes: a pid counts only together with its start time, so that a reused pid is never touched ---

started_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" && $1 != "X" { print $20 }'; }

record() { echo "$2 $(started_at "$2")" >"$DIR/$1.pid"; }

pid_of() {
  local pid start
  [ -f "$DIR/$1.pid" ] || return 1
  read -r pid start <"$DIR/$1.pid" || return 1
  [ -n "$start" ] && [ "$(started_at "$pid")" = "$start" ] && echo "$pid"
}

# stop_pid NAME SIGNAL SECONDS: signals, waits, and kills what does not listen.
stop_pid() {
  local pid
  pid=$(pid_of "$1") || { rm -f "$DIR/$1.pid"; return 0; }
  kill "-$2" "$pid" 2>/dev/null || true
  for _ in $(seq $(($3 * 20))); do
    pid_of "$1" >/dev/null || { rm -f "$DIR/$1.pid"; return 0; }
    sleep 0.05
  done
  say "$1 did not stop within $3 s; killing it"
  kill -KILL "$pid" 2>/dev/null || true
  rm -f "$DIR/$1.pid"
}

# --- installation --------------------------------------------------------------------------------------

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install_packages() {
  say "installing the Debian packages $*"
  [ "$(id -u)" = 0 ] || command -v sudo >/dev/null || fail "as root, run: apt-get install --no-install-recommends $*"
  # Ours are private servers: Debian shall not start its own on the usual ports.
  local policy=/usr/sbin/policy-rc.d ours=
  if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
    ours=1
  fi
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@") done=
  if as_root "${apt[@]}" >"$DIR/apt.log" 2>&1; then
    done=1
  elif as_root apt-get update -q >>"$DIR/apt.log" 2>&1 && as_root "${apt[@]}" >>"$DIR/apt.log" 2>&1; then
    done=1
  fi
  if [ -n "$ours" ]; then as_root rm -f "$policy"; fi
  [ -n "$done" ] || { tail -20 "$DIR/apt.log" >&2; fail "apt-get failed; its log is $DIR/apt.log"; }
}

install_crate() {
  local crate=$1 version=$2
  shift 2
  [ -x "$TOOLS/bin/$crate" ] && return
  command -v cargo >/dev/null || fail "cargo is missing; install Rust from https://rustup.rs"
  say "building $crate $version, once"
  env -u CARGO_TARGET_DIR cargo install "$crate" --version "$version" --locked --root "$TOOLS" "$@" >"$DIR/cargo.log" 2>&1 ||
    { tail -20 "$DIR/cargo.log" >&2; fail "cargo install $crate failed; its log is $DIR/cargo.log"; }
}

postgres_bin() { ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -1; }
rabbitmq_bin() { ls -d /usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin 2>/dev/null | sort -V | tail -1; }

install_missing() {
  local packages=()
  [ -n "$(postgres_bin)" ] || packages+=(postgresql)
  [ -n "$(rabbitmq_bin)" ] || packages+=(rabbitmq-server)
  [ ${#packages[@]} = 0 ] || install_packages "${packages[@]}"
  case $S3_SERVER in
    s3s-fs) install_crate s3s-fs 0.14.1 --features binary ;;
    garage) install_crate garage 2.5.0 ;;
    *) fail "KILN_S3_SERVER must be s3s-fs or garage, but is $S3_SERVER" ;;
  esac
}

# --- Postgres -----------------------------------------------------------------------------------------------

# Postgres refuses to run as root. Its own user often cannot enter root's home, so then its data goes
# to that user's home, under a name derived from ours.
postgres_paths() {
  AS=()
  PG_DIR=$DIR/postgres
  PG_BIN=$(postgres_bin)
  [ "$(id -u)" = 0 ] || { mkdir -p "$PG_DIR"; return 0; }
  AS=(setpriv --reuid=postgres --regid=postgres --clear-groups env HOME=/tmp)
  if ! "${AS[@]}" test -x "$DIR"; then
    PG_DIR=/var/lib/postgresql/kiln-$(printf %s "$DIR" | cksum | cut -d' ' -f1)
  fi
  mkdir -p "$PG_DIR"
  chown postgres: "$PG_DIR"
}

start_postgres() {
  postgres_paths
  if [ ! -f "$PG_DIR/data/PG_VERSION" ]; then
    rm -rf "$PG_DIR/data"
    (umask 077 && echo "$PASSWORD" >"$PG_DIR/password")
    [ ${#AS[@]} = 0 ] || chown postgres: "$PG_DIR/password"
    (
      cd / && "${AS[@]}" "$PG_BIN/initdb" -D "$PG_DIR/data" -U kiln -A scram-sha-256 --pwfile="$PG_DIR/password" \
        --no-sync --no-instructions -E UTF8 --locale=C
    ) >"$DIR/postgres.log" 2>&1 || return 1
    rm -f "$PG_DIR/password"
  fi
  local options=(-c listen_addresses=127.0.0.1 -c port="$PG_PORT" -c unix_socket_directories= -c max_connections=200)
  if [ "${KILN_SERVICES_FAST:-}" = 1 ]; then
    options+=(-c fsync=off -c synchronous_commit=off -c full_page_writes=off)
  fi
  (cd / && exec setsid "${AS[@]}" "$PG_BIN/postgres" -D "$PG_DIR/data" "${options[@]}") >>"$DIR/postgres.log" 2>&1 </dev/null 9>&- &
  record postgres $!
}

postgres_answers() { "$(postgres_bin)/pg_isready" -q -h 127.0.0.1 -p "$PG_PORT" -t 2 >/dev/null 2>&1; }

postgres_prepare() {
  PGPASSWORD=$PASSWORD "$(postgres_bin)/createdb" -h 127.0.0.1 -p "$PG_PORT" -U kiln kiln 2>/dev/null || true
}

stop_postgres() { stop_pid postgres INT 30; }

# The postmaster's children would outlive it for a moment and keep a new one from starting.
kill_postgres() {
  local pid children
  pid=$(pid_of postgres) || return 0
  children=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null || true)
  # shellcheck disable=SC2086
  kill -KILL "$pid" $children 2>/dev/null || true
  stop_pid postgres KILL 10
}

# --- RabbitMQ ---------------------------------------------------------------------------------------------

start_rabbitmq() {
  local data=$DIR/rabbitmq sbin
  sbin=$(rabbitmq_bin)
  mkdir -p "$data"/{mnesia,log,home}
  # A small write-ahead log: by default it grows to 512 MiB in memory.
  cat >"$data/rabbitmq.conf" <<CONF
listeners.tcp.1 = 127.0.0.1:$AMQP_PORT
default_user = kiln
default_pass = $PASSWORD
log.file.level = warning
log.console = false
disk_free_limit.absolute = 50MB
vm_memory_high_watermark.absolute = 1GB
raft.wal_max_size_bytes = 16777216
CONF
  chmod 600 "$data/rabbitmq.conf"
  echo '[].' >"$data/enabled_plugins"
  # Our own epmd (Erlang's name server): one that the node starts would stay behind without a known pid.
  if ! pid_of epmd >/dev/null; then
    ERL_EPMD_ADDRESS=127.0.0.1 setsid epmd -port "$EPMD_PORT" >"$DIR/epmd.log" 2>&1 </dev/null 9>&- &
    record epmd $!
    for _ in $(seq 100); do answers "$EPMD_PORT" && break; sleep 0.05; done
  fi
  (
    export HOME=$data/home
    export RABBITMQ_CONF_ENV_FILE=$data/none RABBITMQ_NODENAME=kiln$AMQP_PORT@localhost
    export RABBITMQ_NODE_IP_ADDRESS=127.0.0.1 RABBITMQ_NODE_PORT=$AMQP_PORT RABBITMQ_DIST_PORT=$DIST_PORT
    export ERL_EPMD_PORT=$EPMD_PORT ERL_EPMD_ADDRESS=127.0.0.1
    export RABBITMQ_MNESIA_BASE=$data/mnesia RABBITMQ_LOG_BASE=$data/log RABBITMQ_PID_FILE=$data/rabbit.pid
    export RABBITMQ_CONFIG_FILE=$data/rabbitmq.conf RABBITMQ_ADVANCED_CONFIG_FILE=$data/none
    export RABBITMQ_ENABLED_PLUGINS_FILE=$data/enabled_plugins RABBITMQ_FEATURE_FLAGS_FILE=$data/feature_flags
    export RABBITMQ_GENERATED_CONFIG_DIR=$data/generated
    export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none"
    # With this set the script turns into the virtual machine, so that the pid is the server's own.
    export RUNNING_UNDER_SYSTEMD=1
    cd / && exec setsid "$sbin/rabbitmq-server"
  ) >"$DIR/rabbitmq.log" 2>&1 </dev/null 9>&- &
  record rabbitmq $!
}

# A server that answers the protocol header is through its boot.
rabbitmq_answers() {
  [ "$( (
    exec 3<>"/dev/tcp/127.0.0.1/$AMQP_PORT" || exit 1
    printf 'AMQP\0\0\011\001' >&3
    timeout 3 head -c 1 <&3
  ) 2>/dev/null | od -An -tx1 | tr -d ' ')" = 01 ]
}

rabbitmq_prepare() { :; }

stop_rabbitmq() {
  stop_pid rabbitmq TERM 30
  stop_pid epmd TERM 5
}

kill_rabbitmq() { stop_pid rabbitmq KILL 10; }

# --- S3 ----------------------------------------------------------------------------------------------------

start_s3() {
  echo "$S3_SERVER" >"$DIR/s3.server"
  case $S3_SERVER in
    s3s-fs)
      mkdir -p "$DIR/s3s-fs/kiln"
      (cd / && exec setsid "$TOOLS/bin/s3s-fs" --host 127.0.0.1 --port "$S3_PORT" --access-key "$S3_KEY" --secret-key "$S3_SECRET" "$DIR/s3s-fs") >"$DIR/s3.log" 2>&1 </dev/null 9>&- &
      ;;
    garage)
      mkdir -p "$DIR"/garage/{meta,data}
      cat >"$DIR/garage/garage.toml" <<CONF
metadata_dir = "$DIR/garage/meta"
data_dir = "$DIR/garage/data"
db_engine = "sqlite"
replication_factor = 1
rpc_bind_addr = "127.0.0.1:$S3_RPC_PORT"
rpc_public_addr = "127.0.0.1:$S3_RPC_PORT"
rpc_secret = "$S3_SECRET"
[s3_api]
api_bind_addr = "127.0.0.1:$S3_PORT"
s3_region = "us-east-1"
root_domain = ".s3.localhost"
[admin]
api_bind_addr = "127.0.0.1:$S3_ADMIN_PORT"
admin_token = "$PASSWORD"
CONF
      chmod 600 "$DIR/garage/garage.toml"
      (
        export GARAGE_DEFAULT_ACCESS_KEY=$S3_KEY GARAGE_DEFAULT_SECRET_KEY=$S3_SECRET GARAGE_DEFAULT_BUCKET=kiln RUST_LOG=garage=warn
        cd / && exec setsid "$TOOLS/bin/garage" -c "$DIR/garage/garage.toml" server --single-node --default-bucket
      ) >"$DIR/s3.log" 2>&1 </dev/null 9>&- &
      ;;
  esac
  record s3 $!
}

http_status() {
  (
    exec 3<>"/dev/tcp/127.0.0.1/$1" || exit 1
    printf 'GET %s HTTP/1.0\r\nHost: 127.0.0.1:%s\r\n\r\n' "$2" "$1" >&3
    timeout 3 head -c 12 <&3
  ) 2>/dev/null | tr -d '\0'
}

s3_answers() {
  if [ "$(cat "$DIR/s3.server" 2>/dev/null)" = garage ]; then
    [[ $(http_status "$S3_ADMIN_PORT" /health) == HTTP/*200 ]] || return 1
  fi
  [[ $(http_status "$S3_PORT" /) == HTTP/* ]]
}

s3_prepare() { :; }
stop_s3() { stop_pid s3 TERM 20; }
kill_s3() { stop_pid s3 KILL 10; }

# --- all of them -----------------------------------------------------------------------------------------

healthy() { pid_of "$1" >/dev/null && "$1_answers"; }

# await NAME: until it answers. A server that dies at once is started again (its killed predecessor's
# children or sockets may still be in the way), a few times.
await() {
  local name=$1 restarts=0
  local until=$((SECONDS + START_SECONDS))
  while ! healthy "$name"; do
    if ! pid_of "$name" >/dev/null; then
      restarts=$((restarts + 1))
      [ $restarts -le 5 ] || break
      sleep 0.5
      "start_$name" || break
    elif [ $SECONDS -ge $until ]; then
      break
    fi
    sleep 0.1
  done
  if ! healthy "$name"; then
    say "$name did not start; the end of $DIR/$name.log:"
    tail -25 "$DIR/$name.log" >&2 || true
    return 1
  fi
  "${name}_prepare"
}

start_one() { healthy "$1" || { "stop_$1"; "start_$1" && await "$1"; }; }

up() {
  install_missing
  local name failed=
  if [ -f "$DIR/s3.server" ] && [ "$(cat "$DIR/s3.server")" != "$S3_SERVER" ]; then
    say "changing the S3 server to $S3_SERVER"
    stop_s3
  fi
  for name in "${SERVICES[@]}"; do
    if ! healthy "$name"; then
      "stop_$name"
      "start_$name" || say "$name could not be started"
    fi
  done
  for name in "${SERVICES[@]}"; do await "$name" || failed=1; done
  [ -z "$failed" ] || exit 1
  status
}

down() {
  local name
  for name in "${SERVICES[@]}"; do "stop_$name" & done
  wait
}

port_of() {
  case $1 in postgres) echo "$PG_PORT" ;; rabbitmq) echo "$AMQP_PORT" ;; s3) echo "$S3_PORT" ;; esac
}

status() {
  local name pid state all=0
  printf '%-10s %-8s %-6s %-8s %s\n' service state port pid log
  for name in "${SERVICES[@]}"; do
    state=down pid=-
    if pid=$(pid_of "$name"); then
      if "${name}_answers"; then state=up; else state=silent; fi
    else
      pid=-
    fi
    [ $state = up ] || all=3
    printf '%-10s %-8s %-6s %-8s %s\n' "$name" $state "$(port_of "$name")" "$pid" "$DIR/$name.log"
  done
  return $all
}

environment() {
  cat <<ENV
export KILN_STORE_URL='postgres://kiln:$PASSWORD@127.0.0.1:$PG_PORT/kiln'
export KILN_BROKER_URL='amqp://kiln:$PASSWORD@127.0.0.1:$AMQP_PORT/%2f'
export KILN_ARTIFACTS_URL='s3://kiln'
export KILN_ARTIFACTS_ENDPOINT='http://127.0.0.1:$S3_PORT'
export KILN_ARTIFACTS_REGION='us-east-1'
export KILN_ARTIFACTS_ACCESS_KEY_ID='$S3_KEY'
export KILN_ARTIFACTS_SECRET_ACCESS_KEY='$S3_SECRET'
ENV
}

clean() {
  down
  postgres_paths
  rm -rf "$PG_DIR" "$DIR"/{rabbitmq,s3s-fs,garage,postgres}
  rm -f "$DIR"/{*.log,s3.server,settings}
}

one_of() {
  case ${1:-} in
    postgres | rabbitmq | s3) echo "$1" ;;
    *) fail "name one server: postgres, rabbitmq or s3" ;;
  esac
}

# One caller at a time; whoever comes second finds the first one's work done.
locked() {
  exec 9>"$DIR/lock"
  flock -w 3600 9 || fail "another call has been running for an hour; see $DIR/lock"
}

case ${1:-} in
  up)
    remember
    locked
    settings
    up
    ;;
  env)
    settings
    environment
    ;;
  status)
    settings
    status
    ;;
  down | clean)
    settings
    locked
    "$1"
    ;;
  start | stop | restart | kill)
    NAME=$(one_of "${2:-}")
    [ "$1" != start ] || remember
    settings
    locked
    case $1 in
      start) start_one "$NAME" ;;
      restart)
        "stop_$NAME"
        start_one "$NAME"
        ;;
      *) "$1_$NAME" ;;
    esac
    ;;
  *)
    sed -n '2,19s/^# \{0,1\}//p' "$0"
    [ "${1:-}" = --help ] || [ "${1:-}" = -h ] || exit 2
    ;;
esac
