#!/usr/bin/env bash
# Install Debian's Chromium for the browser tests, where that can be done: as root, on a system with apt.
#
# Never fails and never takes longer than three minutes: the tests that need it are skipped without it, and say so.
set -u
say() { echo "chromium: $*" >&2; }

for name in chromium chromium-browser google-chrome; do
  if command -v "$name" >/dev/null; then
    say "$(command -v "$name") is there"
    exit 0
  fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  say "not installed (needs root and apt-get): the browser tests will be skipped"
  exit 0
fi
apt() { # seconds, arguments
  timeout --kill-after=5 "$1" env DEBIAN_FRONTEND=noninteractive \
    apt-get -qq -o Acquire::Retries=1 -o DPkg::Lock::Timeout=20 "${@:2}" </dev/null >/dev/null 2>&1
}
say "installing Debian's package"
apt 30 update || say "apt-get update failed; trying with the lists that are there"
if apt 110 install -y --no-install-recommends chromium && command -v chromium >/dev/null; then
  say "installed $(command -v chromium)"
else
  # A download that was cut short leaves nothing behind; a half-configured package would.
  apt 15 -f install -y || true
  say "could not be installed: the browser tests will be skipped"
fi
exit 0
