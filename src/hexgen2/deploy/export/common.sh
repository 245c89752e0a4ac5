# Functions of the start scripts beside this file: processes under guards, waiting for them, ending them.
# shellcheck shell=bash disable=SC2154  # `here` and `python` are set by the scripts

logs=${HEXGEN2_LOGS:-$here/logs}
declare -A pids=()
declare -a endpoint=() # host and port of the coordinator, if it runs here

say() { printf '%s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

# Guards end their process when a pipe closes (3: its one writing end, 4: the end that guards read), which it does when
# this script ends, however it ends.
prepare() {
  [[ -x $(command -v "$python") ]] || fail "there is no $python here; set HEXGEN2_PYTHON to the Python that has hexgen2"
  mkdir -p "$logs"
  local lifeline
  lifeline=$(mktemp -u -t hexgen2.XXXXXXXX)
  mkfifo -m 600 "$lifeline"
  exec 3<>"$lifeline"
  exec 4<"$lifeline"
  rm "$lifeline"
  trap stop_all EXIT
  trap 'say "ending"; exit 130' INT
  trap 'say "ending"; exit 143' TERM HUP
}

# own_address HOST: the IP address of this machine, whose name is HOST. HEXGEN2_ADDRESS overrides it.
own_address() {
  local found=${HEXGEN2_ADDRESS:-}
  [[ -n $found ]] || found=$(getent ahosts "$1" | awk '{print $1; exit}') || true
  [[ -n $found ]] || fail "the name $1 is not known here; add it to DNS or /etc/hosts, or set HEXGEN2_ADDRESS"
  [[ $found != 127.* && $found != ::1 ]] ||
    fail "$1 is $found here, which other machines cannot reach; set HEXGEN2_ADDRESS to this machine's IP address"
  printf '%s\n' "$found"
}

# start NAME GRACE_SECONDS [VARIABLE=VALUE...] COMMAND...: run it in the background, its output in logs/NAME.log.
start() {
  local name=$1 grace=$2
  shift 2
  setsid "$python" -I -S "$here/guard.py" "$grace" -- env "$@" <&4 >"$logs/$name.log" 2>&1 3>&- 4<&- &
  pids[$name]=$!
  say "started $name (log: $logs/$name.log)"
}

# answers HOST PORT PATH: whether a GET of it is answered with 200.
answers() (
  exec 2>/dev/null 5<>"/dev/tcp/$1/$2" || exit 1
  printf 'GET %s HTTP/1.0\r\nHost: %s\r\n\r\n' "$3" "$1" >&5
  IFS=' ' read -r -t 5 _ status _ <&5 && [[ $status == 200 ]]
)

# wait_ready NAME HOST PORT PATH: return when it answers; fail when a process of ours ends or after HEXGEN2_TIMEOUT s.
wait_ready() {
  local name=$1 deadline=$((SECONDS + ${HEXGEN2_TIMEOUT:-1800}))
  until answers "$2" "$3" "$4"; do
    for started in "${!pids[@]}"; do
      kill -0 "${pids[$started]}" 2>/dev/null || { tell_end "$started"; exit 1; }
    done
    ((SECONDS < deadline)) || fail "$name is not ready after ${HEXGEN2_TIMEOUT:-1800} s"
    sleep 0.5
  done
  say "$name is ready"
}

# tell_end NAME: say how a process that has ended did so, and forget it.
tell_end() {
  local code=0
  wait "${pids[$1]}" || code=$?
  unset "pids[$1]"
  say "$1 ended (exit code $code); the last lines of $logs/$1.log:"
  tail -n 5 "$logs/$1.log" >&2
}

# watch: return never; fail when nothing can be served any more.
watch() {
  while ((${#pids[@]})); do
    wait -n || true
    for name in "${!pids[@]}"; do
      kill -0 "${pids[$name]}" 2>/dev/null && continue
      tell_end "$name"
      [[ $name != coordinator ]] || exit 1
      if ((${#endpoint[@]})); then
        sleep 3 # the coordinator looks every second
        answers "${endpoint[@]}" /health || fail "no whole path from prefill to decode is left"
        say "serving goes on without $name"
      fi
    done
  done
  fail "every process has ended"
}

# stop_all: the coordinator first, so that running requests may finish, then the engines.
stop_all() {
  trap '' INT TERM HUP
  if [[ -n ${pids[coordinator]:-} ]]; then
    kill -TERM "${pids[coordinator]}" 2>/dev/null || true
    wait "${pids[coordinator]}" 2>/dev/null || true
    unset "pids[coordinator]"
  fi
  for name in "${!pids[@]}"; do kill -TERM "${pids[$name]}" 2>/dev/null || true; done
  for name in "${!pids[@]}"; do wait "${pids[$name]}" 2>/dev/null || true; done
}
